"""What is written for timm comes back as it was; tests/foreign runs it in timm."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from flexivit_jax import trees, weights
from flexivit_jax.errors import UserError
from flexivit_jax.models import FlexiViT, vit

FIELDS = dict(
  num_classes=5, patch_size=(8, 8), posemb_size=(3, 3), width=16, depth=2, mlp_dim=24, num_heads=4
)


def made(**fields):
  """Returns (model, params, record): small, every array random and NumPy."""
  model = FlexiViT(**{**FIELDS, **fields})
  image = jax.ShapeDtypeStruct((1, *model.patch_size, 3), np.float32)
  shapes = jax.eval_shape(model.init, jax.random.key(0), image)["params"]
  rng = np.random.default_rng(0)
  params = jax.tree.map(lambda s: rng.normal(size=s.shape).astype(np.float32) * 0.3, shapes)
  return model, params, {"model": {**FIELDS, **fields}, "class_names": [*"abcde"]}


def make_foreign(folder):
  for name in ("flexivit_manifest.txt", "flexivit_record.json"):
    (folder / name).unlink()


def logits(model, params, image, **size):
  forward = jax.jit(lambda p, x: model.apply({"params": p}, x, **size)[0])
  with jax.default_matmul_precision("highest"):
    return np.asarray(forward(params, image))


def images(hw=(24, 24)):
  return np.random.default_rng(1).uniform(-1, 1, (2, *hw, 3)).astype(np.float32)


VARIETY = [
  {},
  dict(pool_type="gap", gelu="exact"),
  dict(pool_type="map", gelu="quick"),
  dict(registers=3, num_classes=0),
  dict(pool_type="gap", registers=2),
  dict(pool_type="map", registers=2),
  dict(layer_norm_eps=1e-5, kernel_operator="cubic_antialias", grid_operator="cubic_antialias"),
  dict(scan=True),
  dict(patch_size=(8, 6), posemb_size=(3, 4)),
]


@pytest.mark.parametrize("fields", VARIETY)
def test_model_parameters_and_record_come_back(tmp_path, fields):
  model, params, record = made(**fields)
  weights.save_timm(tmp_path / "out", model, params, record, image_hw=(24, 24))
  got, back, again = weights.load_with_record(tmp_path / "out", scan=model.scan)
  assert got == model
  assert again["class_names"] == [*"abcde"] and again["notes"] == []
  assert again["format"] == "folder with safetensors in timm's names" == again["source"]["format"]
  assert "folded_input" not in again
  jax.tree.map(np.testing.assert_array_equal, back, params)
  names = {"config.json", "model.safetensors", "flexivit_record.json", "flexivit_manifest.txt"}
  assert {p.name for p in (tmp_path / "out").iterdir()} == names
  assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
  "fields", [*VARIETY, dict(pre_norm=True), dict(pre_norm=True, layer_norm_eps=1e-5)]
)
def test_timms_config_alone_tells_all_but_how_to_resize(tmp_path, fields):
  model, params, record = made(**fields)
  weights.save_timm(tmp_path / "out", model, params, record, image_hw=(24, 24))
  make_foreign(tmp_path / "out")
  resize = dict(kernel_operator=model.kernel_operator, grid_operator=model.grid_operator)
  got, _ = weights.load(tmp_path / "out", scan=model.scan, **resize)
  assert got == model


def test_a_layer_norm_before_the_blocks_moves_the_bias_into_the_positions(tmp_path):
  model, params, record = made(pre_norm=True, layer_norm_eps=1e-5)
  weights.save_timm(tmp_path / "out", model, params, record, image_hw=(24, 24))
  got, back = weights.load(tmp_path / "out")
  assert got == model
  np.testing.assert_array_equal(back["embedding"]["bias"], 0)
  for size in (2, 6):
    want = logits(model, params, images(), seqhw=size)
    np.testing.assert_allclose(logits(got, back, images(), seqhw=size), want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("fields", [{}, dict(posemb="sincos2d"), dict(kernel_resize="area")])
def test_at_one_size_kernel_and_positions_are_those_in_use(tmp_path, fields):
  model, params, record = made(**fields)
  weights.save_timm(tmp_path / "out", model, params, record, image_hw=(24, 24), seqhw=6)
  arrays = load_file(tmp_path / "out" / "model.safetensors")
  assert arrays["patch_embed.proj.weight"].shape == (16, 3, 4, 4)
  assert arrays["pos_embed"].shape == (1, 36, 16)
  if model.posemb == "sincos2d":
    np.testing.assert_array_equal(arrays["pos_embed"][0], vit.sincos2d((6, 6), 16).reshape(36, 16))
  got, back, again = weights.load_with_record(tmp_path / "out")
  assert (got.patch_size, got.posemb_size, got.posemb) == ((4, 4), (6, 6), "learn")
  assert again["image_size"] == [24, 24] and again["native_grid"] == [6, 6]
  want = logits(model, params, images(), seqhw=6)
  np.testing.assert_allclose(logits(got, back, images()), want, rtol=0, atol=1e-5)


def test_every_argument_is_written_out(tmp_path):
  weights.save_timm(tmp_path / "out", *made(registers=2), image_hw=(24, 24), seqhw=6)
  config = json.loads((tmp_path / "out" / "config.json").read_text())
  assert config["architecture"] == "flexivit_base"
  want = dict(img_size=[24, 24], patch_size=[4, 4], in_chans=3, num_classes=5, embed_dim=16)
  want |= dict(depth=2, num_heads=4, mlp_ratio=1.5, qkv_bias=True, class_token=True, reg_tokens=2)
  want |= dict(no_embed_class=True, pre_norm=False, global_pool="token", fc_norm=False)
  assert config["model_args"] == want | dict(pool_include_prefix=False, act_layer="gelu_tanh")
  cfg = config["pretrained_cfg"]
  assert cfg["mean"] == cfg["std"] == [0.5] * 3 and cfg["input_size"] == [3, 24, 24]


def test_names_of_classes_are_written_where_timm_looks_for_them(tmp_path):
  model, params, record = made()

  def written(names, **fields):
    changed = record | {"class_names": names}
    out = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
    given = made(**fields)[:2] if fields else (model, params)
    weights.save_timm(out, *given, changed, image_hw=(24, 24))
    return json.loads((out / "config.json").read_text())

  assert written(["b", "é", "a a", "b", "0"])["label_names"] == ["b", "é", "a a", "b", "0"]
  record["class_descriptions"] = ["first", "second", "third", "fourth", "fifth"]
  described = written([*"abcde"])
  assert described["label_names"] == [*"abcde"]
  assert (
    described["label_descriptions"]["b"] == "second" and len(described["label_descriptions"]) == 5
  )
  assert "label_names" not in written(None)
  assert "label_names" not in written([*"abcde"], num_classes=0)
  with pytest.raises(UserError, match="out4 has 2 class_names; the model has 5 classes"):
    written(["a", "b"])
  assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize(
  ("fields", "name"),
  [
    (dict(width=384, num_heads=6), "flexivit_small"),
    (dict(width=768, num_heads=12), "flexivit_base"),
    (dict(width=1024, num_heads=16), "flexivit_large"),
    (dict(kernel_operator="cubic_antialias"), "vit_base_patch16_224"),
    (dict(layer_norm_eps=1e-5), "vit_base_patch16_clip_224"),
  ],
)
def test_the_architecture_is_one_that_resizes_alike(tmp_path, fields, name):
  weights.save_timm(tmp_path / "out", *made(depth=1, **fields), image_hw=(24, 24))
  assert json.loads((tmp_path / "out" / "config.json").read_text())["architecture"] == name


@pytest.mark.parametrize("mlp_dim", [24, 4304, 19, 5461])
def test_the_ratio_gives_the_width_of_the_mlp_when_timm_rounds_down(tmp_path, mlp_dim):
  weights.save_timm(tmp_path / "out", *made(mlp_dim=mlp_dim, width=12), image_hw=(24, 24))
  config = json.loads((tmp_path / "out" / "config.json").read_text())
  assert int(12 * config["model_args"]["mlp_ratio"]) == mlp_dim


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    (dict(pool_type="tok+gap"), r"pool_type='tok\+gap'.*`flexivit convert`"),
    (dict(pool_type="tok+reg", registers=1), r"pool_type='tok\+reg'.*`flexivit export`"),
    (dict(layer_norm_eps=1e-12), "layer_norm_eps=1e-12 cannot be said"),
    (dict(posemb="sincos2d"), "posemb='sincos2d'.*give seqhw"),
    (dict(kernel_resize="norm"), "kernel_resize='norm'.*give seqhw"),
  ],
)
def test_what_timm_cannot_hold_is_refused(tmp_path, fields, message):
  with pytest.raises(UserError, match=message):
    weights.save_timm(tmp_path / "out", *made(**fields), image_hw=(24, 24))
  assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten_and_no_parameter_is_cast(tmp_path):
  model, params, record = made()
  (tmp_path / "out").mkdir()
  with pytest.raises(UserError, match="out is there already"):
    weights.save_timm(tmp_path / "out", model, params, record, image_hw=(24, 24))
  params = params | {"cls": params["cls"].astype(np.float64)}
  with pytest.raises(UserError, match=r"cls: expected float32\[1,1,16\], got float64"):
    weights.save_timm(tmp_path / "new", model, params, record, image_hw=(24, 24))
  assert not (tmp_path / "new").exists()


def test_weights_that_were_changed_are_an_error_until_the_folder_is_timms(tmp_path):
  model, params, record = made()
  weights.save_timm(tmp_path / "out", model, params, record, image_hw=(24, 24))
  arrays = load_file(tmp_path / "out" / "model.safetensors")
  arrays["norm.bias"] += 1
  save_file(arrays, tmp_path / "out" / "model.safetensors")
  for path in ("out", "out/model.safetensors"):
    with pytest.raises(UserError, match=r"model\.safetensors has .* changed on purpose, remove"):
      weights.load(tmp_path / path)
  make_foreign(tmp_path / "out")
  got, back, again = weights.load_with_record(tmp_path / "out")
  assert any("No checksums" in note for note in again["notes"])
  assert again["class_names"] == [*"abcde"] and got.kernel_operator == "cubic_antialias"
  bias = trees.flatten(back)["Transformer/encoder_norm/bias"]
  np.testing.assert_array_equal(bias, params["Transformer"]["encoder_norm"]["bias"] + 1)
