"""What is written is read back as the same model; what transformers' ViT cannot hold is refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open

from flexivit_jax import trees, weights
from flexivit_jax.errors import UserError
from flexivit_jax.models import FlexiViT, vit
from flexivit_jax.weights.transformers import writer as transformers_writer

FIELDS = dict(
  num_classes=5, patch_size=(6, 6), posemb_size=(3, 3), width=16, depth=2, mlp_dim=24, num_heads=4
)
RECORD = {"model": {}, "source": {"file": "a.npz", "format": "npz"}, "notes": []}


def make(**fields):
  """Returns (model, its parameters), every array random."""
  model = FlexiViT(**{**FIELDS, **fields})
  image = jax.ShapeDtypeStruct((1, *model.patch_size, 3), np.float32)
  shapes = jax.eval_shape(model.init, jax.random.key(0), image)["params"]
  rng = np.random.default_rng(0)
  random = lambda s: jnp.asarray((0.3 * rng.normal(size=s.shape)).astype(np.float32))  # noqa: E731
  return model, jax.tree.map(random, shapes)


def write(folder, model, params, *, image_hw=(24, 24), record=RECORD, **size):
  weights.save_transformers(folder, model, params, record, image_hw=image_hw, **size)
  return folder


def read_json(folder, name="config.json"):
  return json.loads((folder / name).read_text())


@pytest.mark.parametrize(
  ("fields", "size"),
  [
    ({}, {"seqhw": 4}),
    ({}, {"seqhw": 8}),
    ({}, {}),
    ({}, {"image_hw": (24, 36), "seqhw": 4}),
    ({"num_classes": 0}, {"seqhw": 4}),
    ({"gelu": "exact"}, {"seqhw": 4}),
    ({"gelu": "quick", "layer_norm_eps": 1e-3}, {"seqhw": 4}),
    ({"scan": True}, {"seqhw": 4}),
  ],
)
def test_it_comes_back_bit_for_bit(tmp_path, fields, size):
  model, params = make(**fields)
  folder = write(tmp_path / "vit", model, params, **size)
  got, read, record = weights.load_with_record(folder)
  fixed, baked = weights.bake(model, params, **({"image_hw": (24, 24)} | size))
  # Fixed as it is, its resizes are transformers' from now on.
  cubic = dict(kernel_operator="cubic_antialias", grid_operator="cubic_antialias")
  assert got == fixed.clone(scan=False, **cubic)
  want = trees.flatten(vit.unstack_blocks(baked))
  read = trees.flatten(read)
  assert read.keys() == want.keys()
  for name, array in want.items():
    np.testing.assert_array_equal(read[name], array, err_msg=name)
  assert record["format"] == "transformers folder, vit"
  assert record["image_size"] == list(size.get("image_hw", (24, 24)))


def test_computed_positions_are_written_out(tmp_path):
  model, params = make(posemb="sincos2d")
  folder = write(tmp_path / "vit", model, params, seqhw=4)
  got, read = weights.load(folder)
  assert got.posemb == "learn" and got.posemb_size == (4, 4)
  image = np.random.default_rng(1).uniform(-1, 1, (2, 24, 24, 3)).astype(np.float32)
  want, _ = model.apply({"params": params}, image, seqhw=4)
  np.testing.assert_allclose(got.apply({"params": read}, image)[0], want, rtol=0, atol=1e-6)


def test_the_files_say_what_transformers_asks_for(tmp_path):
  names = [f"bird {i}" for i in range(5)]
  folder = write(tmp_path / "vit", *make(), seqhw=8, record=RECORD | {"class_names": names})
  assert sorted(p.name for p in folder.iterdir()) == [
    "config.json",
    "flexivit_manifest.txt",
    "flexivit_record.json",
    "model.safetensors",
    "preprocessor_config.json",
  ]
  config = read_json(folder)
  assert config["architectures"] == ["ViTForImageClassification"]
  assert (config["image_size"], config["patch_size"]) == (24, 3)
  assert config["hidden_act"] == "gelu_pytorch_tanh" and config["layer_norm_eps"] == 1e-6
  assert config["id2label"] == {str(i): name for i, name in enumerate(names)}
  assert config["label2id"] == {name: i for i, name in enumerate(names)}
  processor = read_json(folder, "preprocessor_config.json")
  assert processor["size"] == {"height": 24, "width": 24} and processor["resample"] == 2
  assert processor["image_mean"] == processor["image_std"] == [0.5] * 3
  with safe_open(folder / "model.safetensors", "np") as file:
    assert file.metadata() == {"format": "pt"}
    assert len(file.keys()) == 40
    position = file.get_tensor("vit.embeddings.position_embeddings")
  assert position.shape == (1, 65, 16) and not position[:, 0].any()


def test_the_record_is_inside(tmp_path):
  folder = write(tmp_path / "vit", *make(), seqhw=8)
  record = read_json(folder, "flexivit_record.json")
  assert record["source"] == RECORD["source"]
  assert (record["patch_size"], record["grid"], record["image_size"]) == ([3, 3], [8, 8], [24, 24])


def test_a_model_without_a_head_is_a_vitmodel(tmp_path):
  folder = write(tmp_path / "vit", *make(num_classes=0))
  config = read_json(folder)
  assert config["architectures"] == ["ViTModel"] and "id2label" not in config
  with safe_open(folder / "model.safetensors", "np") as file:
    assert "embeddings.cls_token" in file.keys() and len(file.keys()) == 38  # noqa: SIM118


def test_sides_that_differ_are_written_as_two(tmp_path):
  config = read_json(write(tmp_path / "vit", *make(), image_hw=(24, 36), seqhw=4))
  assert config["image_size"] == [24, 36] and config["patch_size"] == [6, 9]


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    (dict(pool_type="gap"), "pool_type='gap': transformers' ViT has only pool_type='tok'"),
    (dict(pool_type="map"), "pool_type='map': .*flexivit convert.*flexivit export"),
    (dict(registers=2), "registers=2: "),
    (dict(pre_norm=True), "pre_norm=True: "),
  ],
)
def test_models_that_are_no_vit_are_refused(tmp_path, fields, message):
  with pytest.raises(UserError, match=message):
    write(tmp_path / "vit", *make(**fields), seqhw=4)
  assert not list(tmp_path.iterdir())


def test_other_mistakes_leave_nothing_behind(tmp_path):
  model, params = make()
  with pytest.raises(UserError, match="seqhw=5 does not divide"):
    write(tmp_path / "vit", model, params, seqhw=5)
  with pytest.raises(UserError, match="3 class_names; the model has 5 classes"):
    write(tmp_path / "vit", model, params, record=RECORD | {"class_names": ["a", "b", "c"]})
  assert not list(tmp_path.iterdir())
  (tmp_path / "vit").mkdir()
  with pytest.raises(UserError, match="vit is there already"):
    write(tmp_path / "vit", model, params)
  assert not list((tmp_path / "vit").iterdir())


def test_the_folder_appears_only_when_it_is_complete(tmp_path, monkeypatch):
  def stop(self, target):
    raise KeyboardInterrupt

  rename = transformers_writer.pathlib.Path.rename
  monkeypatch.setattr(transformers_writer.pathlib.Path, "rename", stop)
  with pytest.raises(KeyboardInterrupt):
    write(tmp_path / "vit", *make())
  assert not (tmp_path / "vit").exists()
  monkeypatch.setattr(transformers_writer.pathlib.Path, "rename", rename)
  write(tmp_path / "vit", *make())  # what was left of the first try is no obstacle
  assert [p.name for p in tmp_path.iterdir()] == ["vit"]
