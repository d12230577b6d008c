"""Two towers: what they give, what they refuse, and that a locked one costs nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexivit_jax import errors, trees
from flexivit_jax.models import TextTower, TwoTowers
from flexivit_jax.models.text import KINDS
from flexivit_jax.objectives import OBJECTIVES
from flexivit_jax.training import optim, steps

SHAPES = {"image": (12, 12, 3), "tokens": (6,)}
IMAGE = dict(variant="mu", depth=1)
TEXT = dict(width=16, depth=1, mlp_dim=32, num_heads=2, vocab_size=30, max_length=6)


def towers(**fields):
  return TwoTowers(image=IMAGE, text=TEXT, embed_dim=8, **fields)


def pairs(n=8, seed=0):
  rng = np.random.default_rng(seed)
  image = rng.normal(size=(n, *SHAPES["image"])).astype(np.float32)
  return {"image": jnp.asarray(image), "tokens": jnp.asarray(rng.integers(4, 30, (n, 6)))}


def test_texts_and_images_alone_are_embedded_as_together():
  model, batch = towers().with_batch(8), pairs()
  params = {"params": jax.jit(lambda: steps.init_params(model, SHAPES, 0))()}
  both = jax.jit(lambda p: model.apply(p, **batch, seqhw=3)[1])(params)
  assert model.outputs.keys() == both.keys()
  for name, spec in model.outputs.items():
    assert both[name].shape == (8, *spec.shape)
  image = jax.jit(lambda p: model.apply(p, batch["image"], seqhw=3)[0])(params)
  text = model.apply(params, tokens=batch["tokens"][:5])[0]
  np.testing.assert_allclose(image, both["image"], atol=1e-6)
  np.testing.assert_allclose(text, both["text"][:5], atol=1e-6)
  np.testing.assert_allclose(np.linalg.norm(image, axis=1), 1, atol=1e-6)


def test_the_bias_begins_at_the_log_odds_of_a_pair_in_the_batch():
  """Source of the three numbers: open_clip issue 650."""
  for batch_size, expected in ((64, -4.14), (256, -5.54), (1024, -6.93)):
    assert towers().with_batch(batch_size).bias == pytest.approx(expected, abs=0.005)
  params = jax.jit(lambda: steps.init_params(towers(bias=-6.93), SHAPES, 0))()
  np.testing.assert_allclose(params["b"], -6.93, rtol=1e-6)
  np.testing.assert_allclose(np.exp(params["t"]), 10.0, rtol=1e-6)
  assert "b" not in jax.eval_shape(lambda: steps.init_params(towers(bias=None), SHAPES, 0))


@pytest.mark.parametrize(
  ("fields", "expected"),
  [
    (dict(embed_dim=None), r"vectors of length 32, the text tower of 16; give embed_dim"),
    (dict(temperature=0.0), "temperature=0.0; expected more than 0"),
    (dict(bias="log"), "bias='log'; expected a number"),
    (dict(text=TEXT | {"kind": "gpt"}), "kind of a text tower"),
    (dict(text=TEXT | {"pool_type": "eos"}), "eos_token=None; expected a token"),
    (dict(text=TEXT | {"pad_token": 30}), "pad_token=30; expected 0 to 29"),
    (dict(text=TEXT | {"num_heads": 3}), "heads that divide the width"),
  ],
)
def test_towers_that_cannot_be_are_refused(fields, expected):
  with pytest.raises(errors.UserError, match=expected):
    TwoTowers(**(dict(image=IMAGE, text=TEXT, embed_dim=8) | fields))


@pytest.mark.parametrize("kind", KINDS)
def test_padding_that_is_masked_changes_nothing_and_what_is_causal_does_not_look_ahead(kind):
  token = dict(eos_token=2) if kind == "clip" else {}
  model = TextTower(kind=kind, **TEXT, **token)
  tokens = np.array([[5, 6, 2, 0, 0, 0]])
  params = jax.jit(model.init)(jax.random.key(0), tokens)
  apply = jax.jit(lambda tokens: model.apply(params, tokens)[0])
  full = apply(tokens)
  if model.pad_token is not None:
    np.testing.assert_allclose(apply(tokens[:, :3]), full, atol=1e-6)
  if model.causal:
    np.testing.assert_allclose(apply(np.array([[5, 6, 2, 9, 9, 9]])), full, atol=1e-6)
  assert np.abs(apply(np.array([[6, 5, 2, 0, 0, 0]])) - full).max() > 1e-3
  with pytest.raises(errors.UserError, match="Got 7 tokens, the text tower has 6 positions"):
    model.apply(params, np.zeros((1, 7), int))


def test_a_locked_tower_keeps_every_bit_and_no_backward_pass_goes_through_it():
  model, batch = towers().with_batch(8), pairs()
  params = jax.jit(lambda: steps.init_params(model, SHAPES, 0))()
  optimizer = optim.make(params, total_steps=3, lr=0.1, clip=1.0, freeze=["image/.*"])
  objective = OBJECTIVES["sigmoid_contrastive"]()
  state = jax.jit(lambda p: steps.init_state(p, optimizer.tx, objective))(params)

  def gradients(state, frozen):
    options = dict(model=model, objective=objective, seed=0, seqhw=3, frozen=frozen)
    return steps.gradients(state, batch, **options)

  programs = {
    locked: jax.jit(lambda s, locked=locked: gradients(s, optimizer.frozen if locked else None))
    .lower(state)
    .compile()
    for locked in (True, False)
  }
  flops = {k: f.cost_analysis()["flops"] for k, f in programs.items()}
  forward = 2e9 * 8 * model.gmacs(SHAPES, seqhw=3)
  assert flops[True] < flops[False] - 0.8 * forward  # the image tower is most of it
  loss, grads = programs[True](state)
  whole, all_grads = programs[False](state)
  np.testing.assert_allclose(loss, whole, rtol=1e-6)
  for name in ("text", "t", "b"):
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), grads[name], all_grads[name]
    )
  norm = lambda tree: sum(np.abs(x).sum() for x in jax.tree.leaves(jax.device_get(tree)))  # noqa: E731
  assert norm(grads["image"]) == 0 < norm(all_grads["image"])
  update = jax.jit(lambda *args: steps.update(*args, objective=objective, tx=optimizer.tx))
  new, _ = update(state, loss, grads)
  jax.tree.map(np.testing.assert_array_equal, new.params["image"], params["image"])
  assert not np.array_equal(new.params["t"], params["t"])
  moments = [k for k in trees.flatten(new.opt_state) if "image/" in k]
  assert not moments
