"""Wrappers inside a network, networks inside a network, and heads of pre-training that have a head's name."""

import json
import re

import hypothesis.strategies as st
import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from safetensors.numpy import save_file

from flexivit_jax import trees, weights
from flexivit_jax.errors import UserError
from flexivit_jax.weights import wrappers

BARE = {
  "patch_embed.proj.weight": 1,
  "pos_embed": 2,
  "blocks.0.attn.qkv.weight": 3,
  "blocks.1.attn.qkv.weight": 4,
  "blocks.1.mlp.fc1.weight": 5,
  "norm.weight": 6,
}
INNER = ("_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


@settings(deadline=None, max_examples=60)
@given(
  st.sampled_from(["", "model.", "state_dict.net."]),
  st.dictionaries(
    st.sampled_from(["patch_embed.", "blocks.0.", "blocks.1.", "blocks.1.mlp.", "norm."]),
    st.lists(st.sampled_from(INNER), min_size=1, max_size=2),
    min_size=1,
  ),
)
def test_wrappers_around_a_module_inside_the_network_come_off_and_are_named(prefix, modules):
  arrays = {}
  for bare, array in BARE.items():
    full = bare
    for module, words in modules.items():
      inside = module + "".join(f"{word}." for word in words)
      full = inside + full.removeprefix(module) if full.startswith(module) else full
    arrays[prefix + full] = array
  got, notes = wrappers.unwrap(arrays)
  assert got == BARE
  words = {word for words in modules.values() for word in words}
  text = " ".join(notes)
  assert all(word in text for word in words if any(f".{word}." in f".{n}" for n in arrays))


def test_names_that_would_become_the_same_keep_their_wrappers():
  arrays = BARE | {"blocks.0._orig_mod.attn.qkv.weight": 9}
  assert wrappers.unwrap(arrays) == (arrays, [])


@pytest.mark.parametrize("ema", [False, True])
def test_an_ema_that_is_a_module_of_the_model_is_another_network(ema):
  arrays = {f"model.{name}": array for name, array in BARE.items()}
  arrays |= {f"model.ema.{name}": -array for name, array in BARE.items()}
  got, notes = wrappers.unwrap(arrays, ema=ema)
  assert got == {name: -array if ema else array for name, array in BARE.items()}
  assert "--ema" in " ".join(notes)


@pytest.mark.parametrize("names", [["head.0.weight", "head.1.running_mean", "head.3.weight"],
                                   ["masked_embed"], ["head.mlp.0.weight", "head.last_layer.weight_g"]])  # fmt: skip
def test_heads_and_tokens_of_pretraining_are_left_out_and_named(names):
  got, notes = wrappers.unwrap(BARE | dict.fromkeys(names, 0))
  assert got == BARE
  assert names[0] in " ".join(notes)


def test_blocks_in_chunks_are_noted():
  chunked = {re.sub(r"blocks\.(\d)", r"blocks.0.\1", name): a for name, a in BARE.items()}
  got, notes = wrappers.unwrap(chunked)
  assert got == BARE
  assert "chunks" in " ".join(notes)


def test_a_timm_folder_with_both_takes_the_ema_if_asked(tmp_path, timm_state_dict):
  arrays = timm_state_dict()
  both = {f"state_dict.module.{name}": array for name, array in arrays.items()}
  both |= {f"state_dict_ema.{name}": array + np.float32(1) for name, array in arrays.items()}
  save_file(both, tmp_path / "model.safetensors")
  half = [0.5, 0.5, 0.5]
  config = {"architecture": "vit_tiny_patch16_224", "pretrained_cfg": {"mean": half, "std": half}}
  (tmp_path / "config.json").write_text(json.dumps(config))
  heads = {"num_heads": 4, "num_classes": 7}
  _, raw, record = weights.load_with_record(tmp_path, **heads)
  assert any("--ema" in note for note in record["notes"])
  _, averaged = weights.load(tmp_path, ema=True, **heads)
  np.testing.assert_array_equal(averaged["head"]["bias"], raw["head"]["bias"] + 1)


def test_timms_pre_logits_are_left_out_with_the_head_behind_them(tmp_path, timm_state_dict):
  more = {"pre_logits.fc.weight": np.eye(32, dtype=np.float32)}
  more |= {"pre_logits.fc.bias": np.zeros(32, np.float32)}
  save_file(timm_state_dict() | more, tmp_path / "w.safetensors")
  model, params, record = weights.load_with_record(tmp_path / "w.safetensors", num_heads=4)
  assert not model.num_classes and "head" not in params
  assert any("pre_logits" in note for note in record["notes"])


def test_a_start_without_a_head_says_that_a_new_one_is_wanted(tmp_path, timm_state_dict):
  path = tmp_path / "w.safetensors"
  save_file(timm_state_dict(classes=0), path)
  model, _ = weights.load(path, num_heads=4)
  with pytest.raises(UserError, match=r"has no head, and the model has 3 classes; .*new_head=True"):
    weights.load_into(path, model.clone(num_classes=3), num_heads=4)
  params = weights.load_into(path, model.clone(num_classes=3), num_heads=4, new_head=True)
  assert "head" not in params


def test_a_class_token_alone_and_one_with_the_mean_have_the_same_parameters_but_the_head(
  tmp_path, timm_state_dict
):
  path = tmp_path / "w.safetensors"
  save_file(timm_state_dict(), path)
  model, stored = weights.load(path, num_heads=4)
  both = model.clone(pool_type="tok+gap")
  params = weights.load_into(path, both, num_heads=4, new_head=True)
  assert trees.digest(params) == trees.digest({k: v for k, v in stored.items() if k != "head"})
  for other, new_head in ((both, False), (model.clone(pool_type="gap"), True)):
    with pytest.raises(UserError, match="pool_type"):
      weights.load_into(path, other, num_heads=4, new_head=new_head)


@pytest.mark.parametrize("other", [{"patch_embed.proj.weight": np.zeros((8, 3, 2, 2))},
                                   {"blocks.2.attn.qkv.weight": 0}])  # fmt: skip
def test_a_teacher_of_another_size_is_no_copy_and_is_not_taken_silently(other):
  arrays = {f"student.{name}": array for name, array in BARE.items()}
  arrays |= {f"teacher.{name}": array for name, array in (BARE | other).items()}
  with pytest.raises(UserError, match=r"several Vision Transformers.*student.*teacher"):
    wrappers.unwrap(arrays)


@pytest.mark.parametrize("chunk", ["", "0."])
def test_a_teacher_beside_the_network_itself_may_have_its_blocks_in_chunks(chunk):
  arrays = {f"teacher.{n.replace('blocks.', 'blocks.' + chunk)}": a for n, a in BARE.items()}
  got, _ = wrappers.unwrap(arrays | {f"student.{name}": -array for name, array in BARE.items()})
  assert got == BARE


@settings(
  deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
  words=st.lists(st.sampled_from(["module", "_orig_mod", "model", "encoder", "state_dict"]), max_size=4),
  kind=st.sampled_from([".npz", ".safetensors", ".NPZ"]),
  separator=st.sampled_from([".", "/"]),
)  # fmt: skip
def test_any_nest_in_a_file_is_the_bare_model(tmp_path, timm_state_dict, words, kind, separator):
  arrays = timm_state_dict()
  save_file(arrays, tmp_path / "bare.safetensors")
  wrapped = {separator.join([*words, name]): array for name, array in arrays.items()}
  path = tmp_path / f"weights{kind}"
  if kind == ".safetensors":
    save_file(wrapped, path)
  else:
    with path.open("wb") as file:
      np.savez(file, **wrapped)
  _, want = weights.load(tmp_path / "bare.safetensors", num_heads=4)
  _, got, record = weights.load_with_record(path, num_heads=4)
  jax.tree.map(np.testing.assert_array_equal, got, want)
  assert all(word in " ".join(record["notes"]) for word in words)
