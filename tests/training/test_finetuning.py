"""From pretrained weights to one's own folder: the model is that of the file, whatever file it is; the head is new."""

import json
import pathlib
import re

import jax
import numpy as np
import pytest
from PIL import Image

from flexivit_jax import cli, config, errors, experiment, trees, weights
from flexivit_jax.experiment import costs, loaders
from flexivit_jax.models import FlexiViT, vit

FOLDER = pathlib.Path(__file__).parents[2] / "configs" / "folder.py"
TINY = dict(num_classes=5, width=8, depth=2, mlp_dim=16, num_heads=2)
PLAIN = dict(TINY, patch_size=(8, 8), posemb_size=(4, 4), gelu="exact")
FILES = {
  "npz": dict(TINY, pool_type="map", patch_size=(12, 12), posemb_size=(5, 5)),
  "npz of one head": dict(TINY, num_heads=1, gelu="quick", registers=2, pre_norm=True),
  "npz with sine-cosine positions": dict(TINY, posemb="sincos2d", pool_type="gap"),
  "npz without a head": dict(TINY, num_classes=0, pool_type="tok+gap", layer_norm_eps=1e-5),
  "timm": PLAIN,
  "transformers": dict(PLAIN, layer_norm_eps=1e-12),
}


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> pathlib.Path:
  """Two training images and one for validation of each of three classes."""
  root, rng = tmp_path_factory.mktemp("own") / "photos", np.random.default_rng(0)
  for split, number in (("train", 2), ("val", 1)):
    for name in ("cat", "dog", "fox"):
      folder = root / split / name
      folder.mkdir(parents=True)
      for i in range(number):
        Image.fromarray(rng.integers(0, 255, (40, 50, 3), np.uint8)).save(folder / f"{i}.png")
  return root


def write(folder: pathlib.Path, kind: str, **more) -> tuple[pathlib.Path, FlexiViT, dict]:
  """Writes a pretrained model with random numbers; returns its path, the model and the arrays."""
  model = FlexiViT(**FILES[kind] | more)
  rng, image = np.random.default_rng(0), jax.ShapeDtypeStruct((1, *model.patch_size, 3), "float32")
  shapes = jax.eval_shape(model.init, jax.random.key(0), image)["params"]
  params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes)
  fields = {name: getattr(model, name) for name in weights.layouts.FIELDS}
  file, record = folder / "weights", {"notes": [], "model": fields}
  if kind.startswith("npz"):
    file = file.with_suffix(".npz")
    weights.save_npz(file, model, params, record)
  else:
    save = {"timm": weights.save_timm, "transformers": weights.save_transformers}[kind]
    save(file, model, params, record, image_hw=(32, 32))
  return file, model, params


def load(arg: str, *overrides: str):
  return config.load(f"{FOLDER}:{arg}", ["input.batch_size=3", *overrides])


@pytest.mark.parametrize("kind", FILES)
def test_the_model_is_that_of_the_file_and_starts_with_its_arrays(kind, tmp_path, photos):
  file, model, params = write(tmp_path, kind)
  exp = experiment.from_config(load(f"init={file},data_dir={photos},res=80", "flexi.seqhw.v=(5,)"))
  own = ("num_classes", "dtype", "head_zeroinit", "name", "parent")
  if kind == "transformers":  # which resizes in its own way
    assert exp.model.grid_operator == weights.load(file)[0].grid_operator
    own = (*own, "grid_operator", "kernel_operator")
  names = [name for name in model.__dataclass_fields__ if name not in own]
  assert {n: getattr(exp.model, n) for n in names} == {n: getattr(model, n) for n in names}
  assert (exp.model.num_classes, exp.image_shape) == (3, (80, 80, 3))
  expected = {k: v for k, v in params.items() if k != "head"}
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), expected, exp.init)
  assert exp.model_record["width"] == 8 and "like" not in exp.model_record


def test_fields_beside_like_differ_from_the_file_and_its_arrays_are_resized(tmp_path, photos):
  file, model, _ = write(tmp_path, "npz")
  more = ["model.patch_size=(16,16)", "model.posemb_size=(7,7)", "model.scan=True"]
  exp = experiment.from_config(load(f"init={file},data_dir={photos},res=80", *more))
  assert (exp.model.patch_size, exp.model.posemb_size, exp.model.pool_type) == (
    (16, 16),
    (7, 7),
    model.pool_type,
  )
  assert exp.init["embedding"]["kernel"].shape == (16, 16, 3, 8)
  assert exp.init["Transformer"]["encoderblock"]["LayerNorm_0"]["scale"].shape == (2, 8)


def test_how_the_file_is_read_is_said_once_and_counts_for_the_fields_too(tmp_path, photos):
  """Arrays in timm's names alone do not say how many heads there are, nor how their input was normalised."""
  file, _, params = write(tmp_path, "timm")
  arrays = tmp_path / "bare.safetensors"
  arrays.write_bytes((file / "model.safetensors").read_bytes())
  init = ["init.num_heads=4", "init.mean=(0.4,0.4,0.4)", "init.std=(0.2,0.2,0.2)"]
  exp = experiment.from_config(load(f"init={arrays},data_dir={photos},res=80", *init))
  assert exp.model.num_heads == 4
  assert not np.allclose(exp.init["embedding"]["kernel"], params["embedding"]["kernel"])


def test_a_grid_that_is_not_square_is_that_of_the_file_and_may_become_another(tmp_path, photos):
  _, _, params = write(tmp_path, "npz", posemb_size=(2, 6))
  bare = tmp_path / "bare.npz"
  np.savez(bare, **trees.flatten(params))
  spec, grid = f"init={bare},data_dir={photos},res=80", "init.posemb_size=(2,6)"
  assert experiment.from_config(load(spec, grid)).model.posemb_size == (2, 6)
  exp = experiment.from_config(load(spec, grid, "model.posemb_size=(5,5)"))
  assert (exp.model.posemb_size, exp.init["pos_embedding"].shape) == ((5, 5), (1, 25, 8))


@pytest.mark.parametrize("kind", ["npz", "timm"])
def test_one_patch_size_has_images_as_large_as_the_model_was_made_for(kind, tmp_path, photos):
  file, _, _ = write(tmp_path, kind)
  side = {"npz": 240, "timm": 32}[kind]
  settings = load(f"init={file},data_dir={photos},fixed=4")
  assert f"decode_inception_crop({side}," in settings["input"]["pp"]
  assert settings["flexi"]["seqhw"]["v"] == (4,)
  assert load(f"init={file},fixed=4,res=64")["evals"]["test"]["seqhw"] == (2, 4, 8)


def test_layer_decay_and_freeze_are_arguments(tmp_path, photos):
  file, _, _ = write(tmp_path, "npz")
  spec = f"init={file},data_dir={photos},res=80,layer_decay=0.5,freeze=1"
  exp = experiment.from_config(load(spec))
  frozen = trees.flatten(exp.optimizer.frozen)
  assert frozen["Transformer/encoderblock_0/LayerNorm_0/scale"] and frozen["embedding/kernel"]
  assert not frozen["Transformer/encoderblock_1/LayerNorm_0/scale"] and not frozen["head/kernel"]
  assert load("init=x,layer_decay=0.5")["optim"]["layer_decay"] == 0.5
  assert load("init=x,freeze=all_but_head")["optim"]["freeze"] == "all_but_head"
  assert not {"layer_decay", "freeze"} & load("init=x")["optim"].keys()


@pytest.mark.parametrize("kind", ["npz", "timm"])
def test_weights_of_another_model_say_what_to_add_and_with_that_it_works(kind, tmp_path, photos):
  file, _, _ = write(tmp_path, kind)
  given = ["init.checkpoint=" + str(file)]
  with pytest.raises(errors.UserError, match=r"width: 8 in the file, 192 in the model") as caught:
    experiment.from_config(load(f"data_dir={photos}", *given))
  said = str(caught.value).splitlines()[-1]
  advice = re.findall(r'"--config\.(.+?)"|--config\.(\S+)', said)
  assert len(advice) == 2
  exp = experiment.from_config(load(f"data_dir={photos}", *given, *("".join(a) for a in advice)))
  assert (exp.model.width, exp.model.num_classes) == (8, 3)


def test_a_run_fine_tunes_keeps_what_is_frozen_and_needs_no_file_afterwards(
  tmp_path, photos, monkeypatch
):
  file, _, params = write(tmp_path, "timm")
  monkeypatch.chdir(tmp_path)
  spec = f"{FOLDER}:init=weights,data_dir={photos},fixed=2,res=32,epochs=2,lr=0.01,freeze=1"
  few = ["--config.input.batch_size=3", "--config.evals.test.seqhw=(2,)"]
  few.append("--config.model.head_zeroinit=False")  # of a head of zeros the others learn late
  cli.main(["train", "--config", spec, "--workdir", "run", *few])
  file.rename(tmp_path / "elsewhere")
  model, trained = weights.load("run")
  assert (model.gelu, model.num_classes) == ("exact", 3)
  flat, before = trees.flatten(vit.unstack_blocks(trained)), trees.flatten(params)
  still = {n for n, x in flat.items() if "head" not in n and np.array_equal(x, before[n])}
  first = {n for n in flat if n.startswith(("embedding/", "Transformer/encoderblock_0/"))}
  assert still == first | {"cls", "pos_embedding"}
  assert json.loads((tmp_path / "run" / "eval.json").read_text())["rows"][0]["n"] == 3


def test_a_published_name_is_planned_before_it_is_fetched(photos, monkeypatch, tmp_path):
  monkeypatch.setenv("FLEXIVIT_CACHE", str(tmp_path / "nothing"))
  spec = f"init=flexivit_s_i1k,data_dir={photos}"
  settings = load(spec, "flexi.seqhw.v=(5,)", "evals=None")
  exp = experiment.from_config(settings, opening=costs.PLANNED)
  assert (exp.model.width, exp.model.posemb_size, exp.model.num_classes) == (384, (7, 7), 3)
  assert not (tmp_path / "nothing").exists()


def test_weights_for_other_channels_are_refused(tmp_path, photos):
  _, _, params = write(tmp_path, "npz")
  flat = trees.flatten(params)
  flat["embedding/kernel"] = flat["embedding/kernel"][:, :, :1]
  bare = tmp_path / "grey.npz"
  np.savez(bare, **flat)
  with pytest.raises(errors.UserError, match="init: the weights take images of 1 channels, the d"):
    experiment.from_config(load(f"init={bare},data_dir={photos},res=80"))


def test_a_variant_beside_like_is_refused():
  with pytest.raises(errors.UserError, match=r"variant='S' and like='x'.*give one of them"):
    loaders.model_like({"variant": "S", "like": "x"}, None)
