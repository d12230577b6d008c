"""A folder of timm's: config.json is read, and what it says that no FlexiViT has is an error."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import save_file

from flexivit_jax import weights
from flexivit_jax.errors import UserError
from flexivit_jax.weights import conversion

HALF, MEAN, STD = [0.5] * 3, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


@pytest.fixture
def folder(tmp_path, timm_state_dict):
  """Writes a folder: arrays of the options, a config with the arguments and what else is given."""

  def write(
    options=None, args=None, architecture="vit_tiny_patch16_224", mean=HALF, std=HALF, **top
  ):
    path = tmp_path / "hub"
    path.mkdir(exist_ok=True)
    save_file(timm_state_dict(**(options or {})), path / "model.safetensors")
    cfg = {"input_size": [3, 32, 32], "mean": mean, "std": std, "num_classes": 7}
    config = {"architecture": architecture, "model_args": {"num_heads": 4} | (args or {})}
    (path / "config.json").write_text(json.dumps({**config, "pretrained_cfg": cfg, **top}))
    return path

  return write


@pytest.mark.parametrize(
  ("options", "args", "architecture", "want"),
  [
    ({}, {}, "vit_tiny_patch16_224.augreg", dict(gelu="exact", pool_type="tok", num_heads=4)),
    ({}, dict(act_layer="gelu_tanh"), "vit_tiny_patch16_224", dict(gelu="tanh")),
    ({}, dict(act_layer="quick_gelu"), "vit_tiny_patch16_224", dict(gelu="quick")),
    ({}, dict(act_layer="gelu"), "vit_base_patch16_clip_quickgelu_224", dict(gelu="exact")),
    ({}, dict(num_heads=None), "vit_base_patch16_gap_224", dict(num_heads=16)),
    ({}, {}, "vit_large_patch16_siglip_gap_512", dict(gelu="tanh")),
    ({}, {}, "vit_large_patch16_siglip_256", dict(gelu="exact")),
    (
      dict(pre_norm=True),
      {},
      "vit_base_patch32_clip_quickgelu_224",
      dict(gelu="quick", layer_norm_eps=1e-5, pre_norm=True),
    ),
    (
      dict(pre_norm=True),
      dict(norm_layer="layernorm"),
      "vit_base_patch32_clip_224",
      dict(layer_norm_eps=1e-6),
    ),
    ({}, dict(global_pool="avg", fc_norm=False), "vit_tiny_patch16_224", dict(pool_type="gap", registers=1)),
    (dict(final_norm="fc_norm"), dict(global_pool="token"), "vit_tiny_patch16_224", dict(pool_type="tok")),
    (dict(distilled=True), dict(global_pool="token"), "deit_tiny_distilled_patch16_224", dict(pool_type="tok+reg")),
    (
      dict(cls=False, attention_pool=True, registers=2),
      dict(global_pool="map", pool_include_prefix=True),
      "vit_tiny_patch16_224",
      dict(pool_type="map", registers=2),
    ),
  ],
)  # fmt: skip
def test_what_arrays_do_not_say_is_read_from_the_config(folder, options, args, architecture, want):
  architecture, _, _ = architecture.partition(".")
  path = folder(options, args, architecture, num_classes=7)
  model, _, record = weights.load_with_record(path)
  assert {name: getattr(model, name) for name in want} == want
  assert record["format"] == "folder with safetensors in timm's names"
  assert record["source"] == {"file": "hub", "format": record["format"]}
  assert not any("heads: as usual" in note for note in record["notes"])


def test_a_grid_that_is_no_square_is_told_by_the_image_size(folder):
  path = folder(args=dict(img_size=[16, 64]))
  assert weights.load(path)[0].posemb_size == (2, 8)
  path = folder(args=dict(img_size=[16, 48]))  # 12 cells for 16 positions: not these weights'
  assert weights.load(path)[0].posemb_size == (4, 4)


def test_mean_and_std_are_folded_unless_they_are_given(folder):
  path = folder(mean=MEAN, std=STD)
  _, params, record = weights.load_with_record(path)
  assert record["folded_input"] == {"mean": MEAN, "std": STD}
  alone = shutil.copy(path / "model.safetensors", path.parent)
  _, given, _ = weights.load_with_record(alone, num_heads=4, mean=MEAN, std=STD)
  np.testing.assert_array_equal(params["embedding"]["kernel"], given["embedding"]["kernel"])
  _, half, _ = weights.load_with_record(path, mean=HALF, std=HALF)
  _, plain, _ = weights.load_with_record(alone, num_heads=4)
  np.testing.assert_array_equal(half["embedding"]["kernel"], plain["embedding"]["kernel"])
  assert "folded_input" not in weights.load_with_record(folder(mean=HALF, std=HALF))[2]


def test_a_folder_converts_with_its_own_mean_and_with_another(folder, tmp_path, monkeypatch):
  monkeypatch.setattr(conversion, "_sizes", lambda *_: [4])
  path = folder(mean=MEAN, std=STD)
  for name, given in (("own", {}), ("other", dict(mean=STD, std=MEAN))):
    rows = conversion.convert(path, tmp_path / f"{name}.npz", **given)
    assert [row.seqhw for row in rows] == [4] and rows[0].difference < 1e-5


def test_the_oldest_configs_have_one_level(folder):
  path = folder()
  old = {"architecture": "vit_tiny_patch16_224", "input_size": [3, 32, 32], "num_classes": 7}
  (path / "config.json").write_text(json.dumps(old | {"mean": MEAN, "std": STD}))
  model, _, record = weights.load_with_record(path, num_heads=4)
  assert model.num_classes == 7 and record["folded_input"]["mean"] == MEAN


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (dict(architecture="vit_base_patch16_rope_ape_224"), "is no plain ViT; .* without rope"),
    (dict(architecture="resnet50"), "architecture 'resnet50' has convolutions"),
    (dict(architecture=3), "architecture 3 is no plain ViT"),
    (dict(args=dict(act_layer="relu")), "act_layer .*'relu'; known: gelu, gelu_tanh, quick_gelu"),
    (dict(args=dict(act_layer=["relu"])), "act_layer"),
    (dict(args=dict(norm_layer="rmsnorm")), "norm_layer is 'rmsnorm'"),
    (dict(args=dict(global_pool="avgmax")), "global_pool 'avgmax'; a FlexiViT has"),
    (dict(args=dict(global_pool="")), "global_pool ''"),
    (dict(args=dict(global_pool="avg", pool_include_prefix=True)), "with pool_include_prefix"),
    (dict(args=dict(attn_layer="diff")), "model_args of .* 'attn_layer'; known"),
    (dict(args=dict(depth=3)), "depth is 3, and the weights have 2 blocks"),
    (dict(args=dict(depth=10**9)), "depth is 1000000000, and the weights have 2 blocks"),
    (dict(args=dict(embed_dim=16)), "width is 16, and the weights have 32"),
    (dict(args=dict(num_heads="4")), "num_heads is '4'; expected a whole number"),
    (dict(num_classes=8), "num_classes is 8, and the weights have 7"),
    (dict(model_args=[1]), r"model_args is \[1\]; expected a JSON object"),
    (dict(mean="0.5"), "mean is '0.5'; expected a list of numbers"),
    (dict(std=[0.5, float("nan"), 0.5]), "std is .*; expected a list of numbers"),
  ],
)
def test_what_no_flexivit_has_is_an_error(folder, change, message):
  with pytest.raises(UserError, match=message):
    weights.load(folder(**change))


def test_folders_without_weights_or_with_a_broken_config_are_errors(folder):
  path = folder()
  (path / "model.safetensors").unlink()
  with pytest.raises(UserError, match=r"has a config.json and no weights; expected model.safe"):
    weights.load(path)
  for content, message in (("{", "cannot be read as JSON"), ("[1]", "expected a JSON object")):
    (path / "config.json").write_text(content)
    with pytest.raises(UserError, match=message):
      weights.load(path)


def test_a_run_folder_is_no_timm_folder(folder):
  path = folder()
  (path / "checkpoints").mkdir()
  with pytest.raises(UserError, match="No checkpoint in"):
    weights.load(path)
