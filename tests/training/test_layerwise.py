"""Layer-wise learning rates and frozen layers, each by one argument: against numbers that are counted here by hand."""

import re

import jax
import numpy as np
import optax
import pytest
from hypothesis import given, settings, strategies as st

from flexivit_jax import errors, trees
from flexivit_jax.models import FlexiViT, vit
from flexivit_jax.training import optim, steps

DEPTH = 3
FIELDS = dict(num_classes=4, width=8, depth=DEPTH, mlp_dim=16, num_heads=2, patch_size=(4, 4))


def params_of(**fields):
  model, rng = FlexiViT(**{**FIELDS, **fields}), np.random.default_rng(0)
  shapes = jax.eval_shape(lambda: steps.init_params(model, {"image": (8, 8, 3)}, seed=0))
  return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes)


def powers(depth):
  """What each group's power of the decay is, written out: the embedding, the blocks, the rest."""
  names = {"embedding": depth + 1, "pos_embedding": depth + 1, "cls": depth + 1}
  names |= {"registers": depth + 1, "pre_norm": depth + 1}
  names |= {f"encoderblock_{i}": depth - i for i in range(depth)}
  return names | {"encoder_norm": 0, "head": 0, "MAPHead_0": 0}


def part_of(name):
  return name.removeprefix("Transformer/").partition("/")[0]


def moved(params, **kw):
  """How far one step of plain descent goes, decay included, for gradients of ones."""
  optimizer = optim.make(
    params, total_steps=1, name="sgd", schedule={"decay_type": "constant"}, **kw
  )
  ones = jax.tree.map(np.ones_like, params)
  updates, _ = jax.jit(optimizer.tx.update)(ones, optimizer.tx.init(params), params)
  return updates


@settings(deadline=None, max_examples=5)
@given(
  st.floats(0.3, 1.0),
  st.sampled_from([{}, {"registers": 2, "pre_norm": True}, {"pool_type": "map"}, {"depth": 1}]),
)
def test_a_layers_step_is_that_power_of_the_decay_and_its_weight_decay_too(decay, fields):
  params = params_of(**fields)
  got = trees.flatten(moved(params, lr=0.5, wd=0.1, layer_decay=decay))
  flat, power = trees.flatten(params), powers(fields.get("depth", DEPTH))
  for name, value in flat.items():
    step = 0.5 + (0.1 * value if name.endswith("/kernel") else 0.0)
    want = -(decay ** power[part_of(name)]) * np.broadcast_to(step, value.shape)
    np.testing.assert_allclose(got[name], want, rtol=2e-6, err_msg=name)


def test_stacked_blocks_get_the_same_steps_as_those_one_by_one():
  params, kw = params_of(), dict(lr=0.5, wd=0.1, layer_decay=0.7)
  stacked = vit.unstack_blocks(moved(vit.stack_blocks(params), **kw))
  jax.tree.map(np.testing.assert_array_equal, stacked, moved(params, **kw))


def test_without_layer_decay_or_with_1_all_steps_are_the_same():
  params = params_of()
  plain = moved(params, lr=0.5, wd=0.1)
  jax.tree.map(np.testing.assert_array_equal, plain, moved(params, lr=0.5, wd=0.1, layer_decay=1))


def embedding_and(blocks):
  names = ["embedding", "pos_embedding", "cls", *(f"encoderblock_{i}" for i in range(blocks))]
  return {*names}


@pytest.mark.parametrize(
  ("freeze", "frozen"),
  [
    (0, embedding_and(0)),
    (2, embedding_and(2)),
    (DEPTH, embedding_and(DEPTH)),
    ("all_but_head", embedding_and(DEPTH) | {"encoder_norm"}),
    (["cls", "Transformer/encoder_norm/.*"], {"cls", "encoder_norm"}),
  ],
)
def test_what_is_frozen_keeps_every_bit_and_has_no_state_and_the_rest_moves(freeze, frozen):
  params = params_of()
  optimizer = optim.make(params, total_steps=3, lr=0.1, wd=0.1, clip=1.0, freeze=freeze)
  state, now = optimizer.tx.init(params), params
  ones, update = jax.tree.map(np.ones_like, params), jax.jit(optimizer.tx.update)
  for _ in range(3):
    updates, state = update(ones, state, now)
    now = optax.apply_updates(now, updates)
  before, after = trees.flatten(params), trees.flatten(now)
  still = {n for n in before if np.asarray(after[n]).tobytes() == before[n].tobytes()}
  assert still == {n for n in before if part_of(n) in frozen}
  moments = sum(x.size for x in jax.tree.leaves(state) if x.ndim)
  assert moments == 2 * sum(x.size for n, x in before.items() if n not in still)


def test_all_stacked_blocks_can_be_frozen_and_some_of_them_cannot():
  stacked = vit.stack_blocks(params_of())
  frozen = trees.flatten(optim.make(stacked, total_steps=1, lr=0.1, freeze=DEPTH).frozen)
  assert {n for n, still in frozen.items() if not still} == {
    n for n in frozen if part_of(n) in ("head", "encoder_norm")
  }
  with pytest.raises(errors.UserError, match=r"freeze=2 with model.scan=True.*model.scan=False"):
    optim.make(stacked, total_steps=1, lr=0.1, freeze=2)


def test_a_schedule_by_names_comes_after_what_is_frozen():
  schedule = [("head/.*", {"decay_type": "constant"}), (".*", {})]
  made = optim.make(params_of(), total_steps=3, lr=0.1, freeze=1, schedule=schedule)
  assert set(made.schedules) == {"head/.*", ".*"}


@pytest.mark.parametrize(
  ("kw", "message"),
  [
    ({"layer_decay": 0}, "layer_decay=0; expected more than 0, at most 1"),
    ({"layer_decay": 1.5}, "layer_decay=1.5; expected"),
    ({"freeze": 4}, "freeze=4: the model has 3 blocks; expected 0 .* to 3"),
    ({"freeze": -1}, "freeze=-1: the model has 3 blocks"),
    ({"freeze": "head"}, "freeze='head'; expected 'all_but_head', how many blocks"),
    ({"freeze": [".*"]}, "freezes all parameters"),
    ({"freeze": ["blocks.0.*"]}, "optim.freeze: 'blocks.0.*' matches no whole name"),
    ({"freeze": ["("]}, r"optim.freeze: '\(' is not a regular expression"),
  ],
)
def test_what_cannot_be_is_one_line(kw, message):
  with pytest.raises(errors.UserError, match=message) as caught:
    optim.make(params_of(), total_steps=1, lr=0.1, **kw)
  assert "\n" not in str(caught.value)


def test_a_model_without_blocks_has_no_layers():
  params = {"head": {"kernel": np.zeros((2, 3), np.float32)}}
  for kw in ({"layer_decay": 0.5}, {"freeze": 1}):
    with pytest.raises(errors.UserError, match=re.escape("the model has no blocks")):
      optim.make(params, total_steps=1, lr=0.1, **kw)


def two_towers():
  """A tower of three blocks and one of two, each under its name, and what belongs to neither."""
  image, text = params_of(num_classes=0), params_of(num_classes=0, depth=2)
  return {"image": image, "text": text, "t": np.ones(1, np.float32)}


def test_each_backbone_under_a_name_has_a_decay_of_its_own():
  params, kw = two_towers(), dict(lr=0.5, wd=0.1)
  got = moved(params, layer_decay=[("image", 0.7), ("text", 0.5)], **kw)
  for name, decay in (("image", 0.7), ("text", 0.5)):
    alone = moved(params[name], layer_decay=decay, **kw)
    jax.tree.map(np.testing.assert_array_equal, got[name], alone)
  np.testing.assert_array_equal(got["t"], np.float32(-0.5))
  some = moved(params, layer_decay=[("image", 0.7)], **kw)
  jax.tree.map(np.testing.assert_array_equal, some["image"], got["image"])
  jax.tree.map(np.testing.assert_array_equal, some["text"], moved(params["text"], **kw))


@pytest.mark.parametrize("stack", [lambda params: params, vit.stack_blocks])
def test_one_number_is_that_of_the_only_backbone_wherever_it_is(stack):
  backbone, head = stack(params_of(num_classes=0)), {"kernel": np.ones((8, 4), np.float32)}
  params = {"net": {"backbone": backbone}, "head": head}
  got = moved(params, lr=0.5, layer_decay=0.7)
  alone = moved(backbone, lr=0.5, layer_decay=0.7)
  jax.tree.map(np.testing.assert_array_equal, got["net"]["backbone"], alone)
  np.testing.assert_array_equal(got["head"]["kernel"], np.float32(-0.5))
  still = optim.make(params, total_steps=1, lr=0.1, freeze=DEPTH).frozen
  assert (
    still["net"]["backbone"] == optim.make(backbone, total_steps=1, lr=0.1, freeze=DEPTH).frozen
  )
  assert not still["head"]["kernel"]


def test_of_a_decoder_with_blocks_the_backbone_at_the_root_is_named_by_nothing():
  params = params_of(num_classes=0) | {"decoder": {"Transformer": params_of()["Transformer"]}}
  got = moved(params, lr=0.5, layer_decay=[("", 0.7)])
  plain = moved(params["decoder"], lr=0.5)
  jax.tree.map(np.testing.assert_array_equal, got.pop("decoder"), plain)
  alone = moved(params_of(num_classes=0), lr=0.5, layer_decay=0.7)
  jax.tree.map(np.testing.assert_array_equal, got, alone)


@pytest.mark.parametrize(
  ("kw", "message"),
  [
    (
      {"layer_decay": 0.7},
      r"layer_decay=0.7: the model has 2 backbones \('image', 'text'\); give pairs, as layer_decay=\(\('text'",
    ),
    ({"freeze": 1}, r"freeze=1: the model has 2 backbones .*as freeze=\('text/.\*',\)"),
    (
      {"layer_decay": [("imag", 0.7)]},
      "backbone in optim.layer_decay 'imag'.*Did you mean 'image'",
    ),
    ({"layer_decay": [("text", 0.7), ("text", 0.8)]}, "named twice"),
    ({"layer_decay": [("text", 7)]}, r"expected more than 0, at most 1"),
  ],
)
def test_which_of_several_backbones_has_to_be_said(kw, message):
  with pytest.raises(errors.UserError, match=message):
    optim.make(two_towers(), total_steps=1, lr=0.1, **kw)


def test_learning_rate_and_decay_of_a_tower_by_its_name():
  params = two_towers()
  mults = dict(lr_mults=[("image/.*", 0.1)], wd_mults=[("text/.*/kernel", 1.0)])
  got = trees.flatten(moved(params, lr=0.5, wd=0.1, **mults))
  for name, value in trees.flatten(params).items():
    step = 0.05 if name.startswith("image/") else 0.5
    decay = 0.1 * value if name.startswith("text/") and name.endswith("/kernel") else 0.0
    want = -np.broadcast_to(step + decay, value.shape)
    np.testing.assert_allclose(got[name], want, rtol=2e-6, atol=1e-8, err_msg=name)
