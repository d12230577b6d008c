"""Stochastic depth: which examples skip which branches, and that nothing else changes."""

import flax.errors
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexivit_jax.errors import UserError
from flexivit_jax.models import FlexiViT, vit

DEPTH, RATE = 3, 0.6
RATES = (0.0, 0.3, 0.6)  # of the blocks, linearly
CONFIG = vit.BlockConfig(mlp_dim=8, num_heads=2)
TOKENS = jnp.asarray(np.random.default_rng(0).normal(size=(400, 2, 8)), jnp.float32)


def encoder(**fields):
  return vit.Encoder(DEPTH, CONFIG, **{"stochastic_depth": RATE} | fields)


@pytest.fixture(scope="module")
def params():
  shapes = jax.eval_shape(encoder().init, jax.random.key(0), TOKENS)["params"]
  rng = np.random.default_rng(1)
  return jax.tree.map(lambda s: rng.normal(size=s.shape).astype(np.float32) * 0.3, shapes)


def run(params, key=0, depth=None, **fields):
  """The tokens and intermediates of a step of training."""
  model = encoder(**fields)
  params = vit.stack_blocks({"Transformer": params})["Transformer"] if model.scan else params

  def apply(params, key):
    return model.apply({"params": params}, TOKENS, True, depth, rngs={"dropout": key})

  return jax.jit(apply)(params, jax.random.key(key))


@pytest.fixture(scope="module")
def out(params):
  return run(params)[1]


def kept(out, i):
  """Which examples keep the attention and the MLP of block i: two arrays [n] of bools.

  Checks that a branch is skipped whole or is there whole, divided by the probability to keep it.
  """
  block, masks = out[f"block{i:02d}"], []
  before = TOKENS if not i else out[f"block{i - 1:02d}"]["+mlp"]
  for name in ("sa", "mlp"):
    after = block[f"+{name}"]
    mask = np.any(np.asarray(after != before), axis=(1, 2))
    want = before + mask[:, None, None] * block[name] / (1 - RATES[i])
    np.testing.assert_allclose(after, want, atol=1e-5)
    masks.append(mask)
    before = after
  return masks


def test_a_branch_is_there_in_proportion_and_scaled_so_that_its_mean_stays(out):
  for i in (1, 2):
    attention, mlp = kept(out, i)
    for mask in (attention, mlp):
      assert abs(mask.mean() - (1 - RATES[i])) < 4 * np.sqrt(RATES[i] * (1 - RATES[i]) / 400)
    both = (1 - RATES[i]) ** 2  # each branch has masks of its own
    assert abs((attention & mlp).mean() - both) < 4 * np.sqrt(both * (1 - both) / 400)


def test_blocks_have_masks_of_their_own(out):
  assert not np.array_equal(kept(out, 1)[0], kept(out, 2)[0])


def test_no_example_skips_the_first_block(params, out):
  assert all(mask.all() for mask in kept(out, 0))
  plain = run(params, stochastic_depth=0.0)[1]["block00"]
  jax.tree.map(np.testing.assert_array_equal, out["block00"], plain)


def test_the_first_blocks_alone_keep_their_probabilities(params):
  masks = kept(run(params, depth=2)[1], 1)
  assert all(abs(mask.mean() - 0.7) < 0.1 for mask in masks)


@pytest.mark.parametrize(
  "options", [dict(scan=True), dict(remat=True), dict(scan=True, remat=True)]
)
def test_scan_and_remat_draw_the_same_masks(params, out, options):
  got = run(params, **options)[1]
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, out)


def test_a_rate_of_zero_takes_no_key_and_changes_no_bit(params):
  plain = {"params": params}, TOKENS
  model = encoder(stochastic_depth=0.0)
  trained, tested = (jax.jit(model.apply, static_argnums=2)(*plain, t)[0] for t in (True, False))
  np.testing.assert_array_equal(trained, tested)
  assert str(jax.make_jaxpr(lambda: encoder().apply(*plain))()) == str(
    jax.make_jaxpr(lambda: model.apply(*plain))()
  )
  with pytest.raises(flax.errors.InvalidRngError, match="dropout"):
    encoder().apply(*plain, True)


def test_gradients_are_finite_and_zero_where_all_skip(params):
  def loss(params):
    rngs = {"dropout": jax.random.key(0)}
    model = encoder(stochastic_depth=0.999)
    return (model.apply({"params": params}, TOKENS[:4], True, rngs=rngs)[0] ** 2).sum()

  grads = jax.jit(jax.grad(loss))(params)
  assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
  assert all((g == 0).all() for g in jax.tree.leaves(grads["encoderblock_2"]))
  assert any((g != 0).any() for g in jax.tree.leaves(grads["encoderblock_0"]))


def test_the_model_says_whether_training_draws_masks():
  model = FlexiViT(variant="mu")
  assert not model.is_random
  assert model.clone(stochastic_depth=0.1).is_random and model.clone(dropout=0.1).is_random


@pytest.mark.parametrize("rate", [-0.1, 1.0, float("nan")])
def test_a_rate_is_a_probability_below_1(rate):
  with pytest.raises(UserError, match=f"stochastic_depth={rate}: expected a probability"):
    FlexiViT(variant="mu", stochastic_depth=rate)


def test_a_model_passes_its_rate_on():
  model = FlexiViT(
    width=8, depth=2, mlp_dim=8, num_heads=2, patch_size=(4, 4), stochastic_depth=0.5
  )
  image, key = jnp.ones((16, 8, 8, 3)), jax.random.key(0)
  params = jax.jit(model.init)(key, image)
  blocks = jax.jit(lambda: model.apply(params, image, train=True, rngs={"dropout": key})[1])()
  last = blocks["encoder"]["block01"]
  skipped = np.asarray(last["+sa"] == last["+mlp"]).all(axis=(1, 2))
  assert 0 < skipped.sum() < 16
