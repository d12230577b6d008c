"""Shards, preprocessing and broken folders of transformers. Nothing is read in part, and nothing unpickled."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from flexivit_jax import weights
from flexivit_jax.errors import UserError
from flexivit_jax.models import FlexiViT
from flexivit_jax.running import checkpoint
from flexivit_jax.weights.transformers import (
  folder as transformers_folder,
  images as transformers_images,
)

pytestmark = pytest.mark.faults

CONFIG = {"model_type": "vit", "architectures": ["ViTModel"]}
INDEX = "model.safetensors.index.json"
IMAGENET = dict(image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225])


def write(folder, **contents):
  """Writes JSON files by their names, dots spelt `__`."""
  for name, content in contents.items():
    (folder / name.replace("__", ".")).write_text(json.dumps(content))


def arrays(names="abc"):
  return {name: np.full(3, ord(name), np.float32) for name in names}


@pytest.fixture
def shards(tmp_path):
  """A folder with arrays a, b in one file and c in another."""
  save_file(arrays("ab"), tmp_path / "one.safetensors")
  save_file(arrays("c"), tmp_path / "two.safetensors")
  places = {"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors"}
  write(tmp_path, config__json=CONFIG)
  (tmp_path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
  return tmp_path


def test_shards_are_put_together(shards):
  got = transformers_folder.read_arrays(shards)
  assert got.keys() == arrays().keys()
  for name, array in arrays().items():
    np.testing.assert_array_equal(got[name], array)


def test_a_missing_shard_is_an_error(shards):
  (shards / "two.safetensors").unlink()
  with pytest.raises(UserError, match=r"names files that are not there: two\.safetensors"):
    transformers_folder.read_arrays(shards)


def test_every_array_stands_in_its_own_shard_and_in_no_other(shards):
  save_file(arrays("bc"), shards / "two.safetensors")
  with pytest.raises(UserError, match=r"two\.safetensors does not hold what .*\n  extra b$"):
    transformers_folder.read_arrays(shards)
  save_file(arrays("ad"), shards / "one.safetensors")
  with pytest.raises(UserError, match=r"one\.safetensors .*\n  missing b\n  extra d$"):
    transformers_folder.read_arrays(shards)


@pytest.mark.parametrize(
  "place",
  ["../one.safetensors", "/tmp/one.safetensors", "a/b", "a\\b.safetensors", "..", "one.bin", 3],
)
def test_a_shard_outside_the_folder_is_refused(shards, place):
  (shards / INDEX).write_text(json.dumps({"weight_map": {"a": place}}))
  with pytest.raises(UserError, match="is no name of a file in the folder"):
    transformers_folder.read_arrays(shards)


@pytest.mark.parametrize("content", ["{}", '{"weight_map": []}', '{"weight_map": {}}'])
def test_an_index_without_places_is_an_error(shards, content):
  (shards / INDEX).write_text(content)
  with pytest.raises(UserError, match="expected names of files by array in 'weight_map'"):
    transformers_folder.read_arrays(shards)


def test_two_sets_of_weights_are_an_error(shards):
  save_file(arrays(), shards / "model.safetensors")
  with pytest.raises(UserError, match="remove the one that is not meant"):
    transformers_folder.read_arrays(shards)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model.bin.index.json"])
def test_pickled_weights_are_to_be_saved_otherwise(tmp_path, name):
  write(tmp_path, config__json=CONFIG)
  (tmp_path / name).write_bytes(b"\x80\x04")
  with pytest.raises(UserError, match=f"in {name}, which is pickled; expected model.safetensors"):
    weights.load(tmp_path)


def test_a_folder_without_weights_is_an_error(tmp_path):
  write(tmp_path, config__json=CONFIG)
  with pytest.raises(
    UserError, match=r"has no model\.safetensors and no model\.safetensors\.index"
  ):
    weights.load(tmp_path)


@pytest.mark.parametrize(
  ("content", "message"),
  [
    ("{", "cannot be read as JSON"),
    ("[1]", "expected a JSON object, got list"),
    ("[" * 10**5, "JSON"),
  ],
)
def test_a_broken_config_is_an_error(tmp_path, content, message):
  (tmp_path / "config.json").write_text(content)
  save_file(arrays(), tmp_path / "model.safetensors")
  with pytest.raises(UserError, match=message):
    weights.load(tmp_path)


def test_a_run_folder_is_not_taken_for_one(tmp_path):
  fields = dict(width=16, depth=1, mlp_dim=24, num_heads=4, patch_size=(4, 4), num_classes=3)
  params = jax.jit(FlexiViT(**fields).init)(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]
  write(tmp_path, config__json={"model": {"variant": "mu"}})
  with pytest.raises(UserError, match="No checkpoint in"):  # a run that was stopped too early
    weights.load(tmp_path)
  checkpoints = checkpoint.Checkpoints(tmp_path / "checkpoints")
  checkpoints.save(1, params, {"step": jnp.int32(1)}, {"model": {"name": "flexivit", **fields}})
  checkpoints.close()
  write(tmp_path, config__json=CONFIG)
  _, _, record = weights.load_with_record(tmp_path)
  assert record["format"] == "checkpoint of a run"


def normalisation(folder, **contents):
  write(folder, **contents)
  processor = transformers_images.find(folder, "vit")
  return processor and transformers_images.normalisation(processor)


def test_mean_and_std_are_those_of_the_preprocessor(tmp_path):
  want = (IMAGENET["image_mean"], IMAGENET["image_std"])
  assert normalisation(tmp_path) is None
  # One processor for text and images has that for images inside.
  assert normalisation(tmp_path, processor_config__json={"image_processor": IMAGENET}) == want
  (tmp_path / "processor_config.json").unlink()
  half = ([0.5] * 3, [0.5] * 3)  # the default of its class
  assert normalisation(tmp_path, preprocessor_config__json={"do_resize": True}) == half
  assert normalisation(tmp_path, preprocessor_config__json=IMAGENET) == want
  rescaled = IMAGENET | {"do_rescale": True, "rescale_factor": 0.00392156862745098}
  assert normalisation(tmp_path, preprocessor_config__json=rescaled) == want


def test_the_newest_form_of_the_settings_comes_first(tmp_path):
  new = {"image_mean": [0.4] * 3, "image_std": [0.3] * 3}
  write(
    tmp_path, processor_config__json={"image_processor": new, "processor_class": "CLIPProcessor"}
  )
  assert normalisation(tmp_path, preprocessor_config__json=IMAGENET) == ([0.4] * 3, [0.3] * 3)
  write(tmp_path, processor_config__json={"processor_class": "CLIPProcessor"})
  assert normalisation(tmp_path)[0] == IMAGENET["image_mean"]


def test_pixels_of_another_range_are_folded_too(tmp_path):
  """Mean and std are of pixels in [0, 1], whatever the processor does with those in 0 ... 255."""
  none = {"do_normalize": False}
  assert normalisation(tmp_path, preprocessor_config__json=none) == ([0] * 3, [1] * 3)
  raw = {"image_mean": [127.5] * 3, "image_std": [63.75] * 3, "do_rescale": False}
  mean, std = normalisation(tmp_path, preprocessor_config__json=raw)
  assert mean == pytest.approx([0.5] * 3) and std == pytest.approx([0.25] * 3)
  double = {"image_mean": [1.0] * 3, "image_std": [1.0] * 3, "rescale_factor": 1 / 127.5}
  mean, std = normalisation(tmp_path, preprocessor_config__json=double)
  assert mean == pytest.approx([0.5] * 3) and std == pytest.approx([0.5] * 3)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"image_mean": 0.5}, r"image_mean=0\.5; expected a list of numbers"),
    ({"image_std": ["1"]}, "image_std=.*expected a list of numbers"),
    ({"rescale_factor": "1"}, "rescale_factor='1'; expected a number > 0"),
    ({"rescale_factor": 0}, "rescale_factor=0; expected a number > 0"),
  ],
)
def test_a_broken_preprocessor_is_an_error(tmp_path, change, message):
  with pytest.raises(UserError, match=message):
    normalisation(tmp_path, preprocessor_config__json=IMAGENET | change)
