"""What training tools put around weights is taken off, however it is nested; two networks are never mixed up."""

import json
import re

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from safetensors.numpy import save_file

from flexivit_jax import trees, weights
from flexivit_jax.errors import UserError
from flexivit_jax.models import FlexiViT
from flexivit_jax.weights import bare, big_vision, other_models, wrappers

BARE = {
  "patch_embed.proj.weight": 1,
  "pos_embed": 2,
  "cls_token": 3,
  "blocks.0.attn.qkv.weight": 4,
  "blocks.1.attn.qkv.weight": 5,
  "norm.weight": 6,
  "head.weight": 7,
}
WORDS = (
  *("module", "_orig_mod", "model", "net", "state_dict", "model_state_dict", "encoder", "backbone"),
  *(
    "teacher",
    "student",
    "visual.trunk",
    "vit",
    "momentum_encoder",
    "ema",
    "model_ema",
    "any",
    "0",
  ),
)
TRAINING_ONLY = (
  *("head.mlp.0.weight", "head.last_layer.weight_v", "dino_head.mlp.0.weight", "mask_token"),
  *("decoder_blocks.0.norm1.weight", "decoder_pos_embed", "predictor.0.weight", "projector.2.bias"),
  "ibot_patch_loss.center",
)


def wrapped(prefix, arrays=BARE):
  return {f"{prefix}{name}": array for name, array in arrays.items()}


@settings(deadline=None, max_examples=150)
@given(
  st.lists(st.sampled_from(WORDS), max_size=4),
  st.lists(st.sampled_from(TRAINING_ONLY), max_size=3, unique=True),
  st.lists(st.sampled_from(["epoch_loss", "text.token_embedding.weight", "fc.weight"]), max_size=2, unique=True),
)  # fmt: skip
def test_any_nest_of_wrappers_comes_off_and_says_so(words, training_only, beside):
  prefix = "".join(f"{word}." for word in words)
  arrays = wrapped(prefix) | wrapped(prefix, dict.fromkeys(training_only, 0))
  arrays |= dict.fromkeys(beside, 0) if prefix else {}
  got, notes = wrappers.unwrap(arrays)
  assert got == BARE
  assert (prefix in " ".join(notes)) if prefix else not any("taken off" in n for n in notes)
  for name in beside if prefix else []:
    assert name.partition(".")[0] in " ".join(notes)
  if training_only:
    assert "only pre-training" in " ".join(notes)


@settings(deadline=None, max_examples=60)
@given(
  st.permutations(["state_dict.", "state_dict_ema."]),
  st.booleans(),
  st.sampled_from(["", "module."]),
)
def test_raw_weights_are_taken_unless_the_ema_is_asked_for(order, ema, inner):
  values = {"state_dict.": 10, "state_dict_ema.": 20}
  arrays = {}
  for level in order:
    arrays |= wrapped(level + inner, {name: a + values[level] for name, a in BARE.items()})
  got, notes = wrappers.unwrap(arrays, ema=ema)
  assert got == {name: a + (20 if ema else 10) for name, a in BARE.items()}
  assert any("--ema" in note for note in notes)


@pytest.mark.parametrize(
  ("best", "other"),
  [
    ("teacher.backbone.", "student.module.backbone."),
    ("target_encoder.module.", "encoder.module."),
    ("module.base_encoder.", "module.momentum_encoder."),
    ("module.encoder_q.", "module.encoder_k."),
    ("model.", "student."),
  ],
)
def test_of_two_networks_the_one_that_is_used_after_training_is_taken(best, other):
  for arrays in (wrapped(best) | wrapped(other, dict.fromkeys(BARE, 0)),
                 wrapped(other, dict.fromkeys(BARE, 0)) | wrapped(best)):  # fmt: skip
    got, notes = wrappers.unwrap(arrays)
    assert got == BARE
    assert any(best in note for note in notes)


def test_two_networks_of_the_same_kind_are_refused_with_both_names():
  with pytest.raises(UserError, match=r"left\..*right\."):
    wrappers.unwrap(wrapped("left.") | wrapped("right."))


def test_an_ema_that_is_not_there_is_an_error():
  with pytest.raises(UserError, match="leave --ema out"):
    wrappers.unwrap(wrapped("model."), ema=True)


def test_dinov2s_chunks_of_blocks_are_renumbered_and_others_are_not():
  chunked = {re.sub(r"blocks\.(\d)", r"blocks.0.\1", name): a for name, a in BARE.items()}
  assert wrappers.unwrap(chunked).arrays == BARE
  twice = {**chunked, "blocks.1.0.attn.qkv.weight": 9}
  assert wrappers.unwrap(twice).arrays == twice


def test_names_of_transformers_keep_their_own_first_part():
  names = {"vit.embeddings.cls_token": 1, "classifier.weight": 2}
  got, notes = wrappers.unwrap(wrapped("module._orig_mod.", names))
  assert got == names
  assert "module._orig_mod." in notes[0]


@pytest.fixture(params=[".npz", ".safetensors"])
def saved(request, tmp_path, timm_state_dict):
  """Writes the arrays of a small ViT behind a prefix; returns the path."""

  def save(prefix="", change=lambda arrays: arrays):
    arrays = change({f"{prefix}{name}": a for name, a in timm_state_dict().items()})
    path = tmp_path / f"weights{request.param}"
    if request.param == ".npz":
      np.savez(path, **arrays)
    else:
      save_file(arrays, path)
    return path

  return save


def test_a_wrapped_file_is_the_model_of_the_bare_one(saved):
  _, bare_params, _ = weights.load_with_record(saved(), num_heads=4)
  _, params, record = weights.load_with_record(saved("state_dict.module._orig_mod."), num_heads=4)
  assert any("_orig_mod" in note for note in record["notes"])
  np.testing.assert_array_equal(params["head"]["kernel"], bare_params["head"]["kernel"])


def test_a_model_without_biases_of_queries_is_one_with_zeros(saved):
  def without(arrays):
    return {name: a for name, a in arrays.items() if not name.endswith("attn.qkv.bias")}

  _, params, record = weights.load_with_record(saved("", without), num_heads=4)
  attention = params["Transformer"]["encoderblock_0"]["MultiHeadDotProductAttention_0"]
  assert not np.any(attention["query"]["bias"])
  assert any("qkv_bias=False" in note for note in record["notes"])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_arrays_that_are_not_finite_are_named_at_load(saved, value):
  def spoil(arrays):
    arrays["blocks.1.mlp.fc1.weight"].flat[7] = value
    return arrays

  path = saved("", spoil)
  with pytest.raises(
    UserError, match=r"not finite in 1 arrays: .*encoderblock_1/MlpBlock_0/Dense_0"
  ):
    weights.load(path, num_heads=4)
  _, params, _ = weights.load_with_record(path, num_heads=4, finite=False)
  assert len(weights.not_finite(params)) == 1


UNREADABLE = {
  "blocks.0.attn.relative_position_bias_table": "relative positions",
  "rope.periods": "rotary positions",
  "rope_embed.periods": "rotary positions",
  "blocks.0.mlp.w12.weight": "gated MLP",
  "blocks.0.mlp.fc1_g.weight": "gated MLP",
  "blocks.0.attn.q_bias": "relative or rotary positions",
  "blocks.0.attn.q_norm.weight": "norms inside the attention",
  "stages.0.blocks.0.conv_dw.weight": "stages of different resolutions",
  "layers.0.blocks.0.attn.qkv.weight": "stages of different resolutions",
  "patch_embed.backbone.stem.conv.weight": "several layers",
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_a_vit_does_not_have_is_said_without_a_near_name_or_advice_that_cannot_help(
  saved, name
):
  path = saved("", lambda arrays: {**arrays, name: np.zeros(3, np.float32)})
  with pytest.raises(UserError) as error:
    weights.load(path, num_heads=4)
  text = str(error.value)
  assert UNREADABLE[name] in text and name in text
  assert "Did you mean" not in text and "pool_type" not in text


def test_a_file_of_another_kind_gets_no_near_names(tmp_path):
  np.savez(
    tmp_path / "resnet.npz", **{"conv1.weight": np.zeros(3), "layer1.0.bn1.weight": np.zeros(3)}
  )
  with pytest.raises(UserError) as error:
    weights.load(tmp_path / "resnet.npz")
  assert "conv1.weight" in str(error.value)
  assert "Did you mean" not in str(error.value)


def test_names_of_plain_models_are_none_of_other_models(timm_state_dict):
  for options in ({}, dict(scaled=True), dict(pool="map")):
    try:
      arrays = timm_state_dict(**options)
    except TypeError:
      continue
    assert other_models.feature(arrays) is None
  assert other_models.kind("dinov3_vit") and other_models.kind("beit")
  assert other_models.kind("dinov2") is None and other_models.kind("vit") is None


def test_config_json_of_another_model_says_what_it_has(tmp_path):
  (tmp_path / "config.json").write_text(json.dumps({"model_type": "dinov3_vit"}))
  (tmp_path / "model.safetensors").write_bytes(b"")
  with pytest.raises(UserError, match="rotary positions") as error:
    weights.load(tmp_path)
  assert "Did you mean" not in str(error.value)


def test_the_image_tower_of_a_two_tower_file_is_read(tmp_path, random_params):
  shape = dict(width=16, depth=1, mlp_dim=32, num_heads=2, patch_size=(8, 8), posemb_size=(4, 4))
  model = FlexiViT(num_classes=0, pool_type="map", **shape)
  flat = trees.flatten(random_params(model, (32, 32, 3)))
  arrays = {f"params/img/{name}": a for name, a in flat.items()}
  arrays |= {
    "params/txt/Embed_0/embedding": np.zeros((7, 4), np.float32),
    "params/t": np.zeros(1),
    "params/b": np.zeros(1),
  }
  for outer in ("params/", ""):
    shorter = {name.replace("params/", outer): a for name, a in arrays.items()}
    np.savez(tmp_path / "two.npz", **shorter)
    loaded, params, record = weights.load_with_record(tmp_path / "two.npz")
    assert loaded.width == model.width
    np.testing.assert_array_equal(params["embedding"]["kernel"], flat["embedding/kernel"])
    assert any("txt" in note for note in record["notes"])


@pytest.mark.parametrize(
  "cells,named", [(144, "--posemb_size=9,16"), (576, "--posemb_size=18,32"), (196, ""), (225, "")]
)
def test_a_grid_that_may_not_be_square_is_said(cells, named):
  side = int(cells**0.5)
  notes = big_vision.assumed_square((side, side))
  assert bool(notes) == bool(named)
  assert named in " ".join(notes)


def test_suffixes_are_read_in_capitals_too():
  assert ".ckpt" in bare.READERS and ".tar" in bare.READERS


def test_an_incomplete_image_tower_names_the_project_and_the_form_to_get(tmp_path):
  names = ("class_embedding", "conv1.weight", "transformer.resblocks.0.ln_1.weight")
  arrays = {f"visual.{name}": np.zeros((8, 3, 4, 4), np.float32) for name in names}
  save_file(arrays, tmp_path / "open_clip_model.safetensors")
  with pytest.raises(UserError, match=r"OpenCLIP.*vit_\*_clip_\*") as error:
    weights.load(tmp_path / "open_clip_model.safetensors")
  assert "Did you mean" not in str(error.value) and "\n" not in str(error.value)
