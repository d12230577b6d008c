"""One training step against its definition; randomness is a function of (seed, step)."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special

from flexivit_jax.errors import UserError
from flexivit_jax.models import FlexiViT
from flexivit_jax.objectives import supervised
from flexivit_jax.objectives.base import Losses, keep
from flexivit_jax.training import steps

pytestmark = pytest.mark.faults


class Tiny(nn.Module):
  """Mean of what a small network sees in each of seqhw x seqhw patches; compiles in no time."""

  dropout: float = 0.0

  @nn.compact
  def __call__(self, image, *, seqhw, train=False):
    n, h, w, c = image.shape
    x = image.reshape(n, seqhw, h // seqhw, seqhw, w // seqhw, c).mean((2, 4))
    x = nn.tanh(nn.Dense(8, name="embedding")(x))
    x = nn.Dropout(self.dropout)(x, deterministic=not train).mean((1, 2))
    x = nn.Dense(3, name="head", kernel_init=nn.initializers.zeros)(x)
    return x, {"logits": x}

  @nn.nowrap
  def example(self, shapes):
    return {"image": jnp.zeros((1, *shapes["image"]))}, {"seqhw": 1}


MODEL = Tiny()


def make_batch(n=8):
  rng = np.random.default_rng(1)
  labels = np.eye(3, dtype=np.float32)[rng.integers(3, size=n)]
  image = rng.uniform(-1, 1, size=(n, 12, 12, 3)).astype(np.float32)
  return {"image": jnp.asarray(image), "labels": jnp.asarray(labels), "_id": jnp.arange(n)}


@functools.cache
def compiled(model=MODEL, tx=None, mixup_p=0.0, **options):
  """Returns (initial state, step function)."""
  tx = tx or optax.sgd(0.1)
  options = dict(seed=0, seqhw=4) | options
  fn = functools.partial(
    steps.step, model=model, objective=supervised(mixup_p=mixup_p), tx=tx, **options
  )
  params = steps.init_params(model, {"image": (12, 12, 3)}, seed=0)
  # A zero head, as it is initialised, would hide all other gradients.
  head = np.random.default_rng(0).normal(size=params["head"]["kernel"].shape)
  params["head"]["kernel"] = jnp.asarray(head, jnp.float32)
  return steps.TrainState(jnp.int32(0), params, tx.init(params)), jax.jit(fn)


def assert_close(a, b, atol):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=atol), a, b)


@pytest.mark.parametrize("spoil", [1e30, np.nan, np.inf])
def test_an_update_that_is_skipped_changes_no_bit(spoil):
  tx = optax.adam(0.1)
  state, _ = compiled(tx=tx)
  grads = jax.tree.map(jnp.ones_like, state.params)
  update = jax.jit(functools.partial(steps.update, objective=supervised(), tx=tx, skip_above=100.0))
  state, measured = update(state, jnp.float32(1.0), grads)  # of a norm below 100
  assert measured["skipped"] == 0
  bad = {**grads, "head": jax.tree.map(lambda g: g * spoil, grads["head"])}
  new, measured = update(state, jnp.float32(1.0), bad)
  assert measured["skipped"] == 1 and new.step == state.step + 1
  assert np.isfinite(measured["param_norm"])
  for a, b in zip(jax.tree.leaves(new[1:]), jax.tree.leaves(state[1:]), strict=True):
    assert a.dtype == b.dtype and a.tobytes() == b.tobytes()
  _, measured = update(state, jnp.float32(np.nan), grads)
  assert measured["skipped"] == 1


def test_step_is_gradient_descent_on_the_mean_loss():
  tx = optax.chain(optax.clip_by_global_norm(0.1), optax.adam(1e-2))
  state, step = compiled(tx=tx)
  batch = make_batch()
  new, measured = step(state, batch)

  predict = lambda p: MODEL.apply({"params": p}, batch["image"], seqhw=4)[0]  # noqa: E731
  logits, pull_back = jax.vjp(jax.jit(predict), state.params)
  log_p = scipy.special.log_softmax(np.asarray(logits, np.float64), axis=-1)
  labels = np.asarray(batch["labels"], np.float64)
  np.testing.assert_allclose(measured["loss"], -(labels * log_p).sum(-1).mean(), rtol=1e-6)
  # The mean cross-entropy's gradient at the logits, by hand.
  (grads,) = pull_back(jnp.asarray((np.exp(log_p) - labels) / 8, jnp.float32))
  norm = np.sqrt(sum(np.sum(np.square(g, dtype=np.float64)) for g in jax.tree.leaves(grads)))
  assert norm > 0.1  # so that it is clipped, and the unclipped norm is what is reported
  np.testing.assert_allclose(measured["grad_norm"], norm, rtol=1e-5)
  # Adam's first step is lr * g / (|g| + eps): the sign of the gradient, almost.
  for p, q, g in zip(*map(jax.tree.leaves, (state.params, new.params, grads)), strict=True):
    clipped = np.asarray(g, np.float64) * 0.1 / norm
    np.testing.assert_allclose(q - p, -1e-2 * clipped / (np.abs(clipped) + 1e-8), atol=1e-6)
  assert new.step == 1 and measured["loss"].dtype == measured["grad_norm"].dtype == jnp.float32


def test_several_steps_are_plain_optax():
  tx = optax.adam(1e-3)
  state, step = compiled(tx=tx)
  batch = make_batch()

  @jax.jit
  def plain(params, opt_state):
    def loss(p):
      logits = MODEL.apply({"params": p}, batch["image"], seqhw=4)[0]
      return optax.softmax_cross_entropy(logits, batch["labels"]).mean()

    updates, opt_state = tx.update(jax.grad(loss)(params), opt_state, params)
    return optax.apply_updates(params, updates), opt_state

  params, opt_state = state.params, state.opt_state
  for _ in range(3):
    state, _ = step(state, batch)
    params, opt_state = plain(params, opt_state)
  assert_close(state.params, params, atol=1e-6)


@pytest.mark.parametrize("mixup_p", [0.0, 1.0])
def test_accumulation_changes_nothing(mixup_p):
  (state, whole), (_, parts) = (compiled(mixup_p=mixup_p, accumulate=k) for k in (1, 4))
  batch = make_batch()
  (a, measured), (b, measured_in_parts) = whole(state, batch), parts(state, batch)
  # float32 sums in another order; parameters and gradients are of order one.
  assert_close(a.params, b.params, atol=1e-6)
  assert_close(measured, measured_in_parts, atol=1e-6)


def test_mixup_is_drawn_for_each_step_from_the_seed():
  (state, step), (_, other_seed) = compiled(mixup_p=1.0), compiled(mixup_p=1.0, seed=1)
  (_, unmixed), batch = compiled(), make_batch()
  loss = lambda step, i: float(step(state._replace(step=jnp.int32(i)), batch)[1]["loss"])  # noqa: E731
  losses = [*(loss(step, i) for i in range(4)), loss(other_seed, 0), loss(unmixed, 0)]
  assert len(set(losses)) == len(losses)
  # As far as the batch, an unmixed step does not depend on the seed or the step.
  assert loss(unmixed, 0) == loss(unmixed, 3)


def test_mixup_is_that_of_the_steps_own_key():
  state, step = compiled(mixup_p=1.0)
  batch = make_batch()
  key, _ = jax.random.split(jax.random.fold_in(jax.random.key(0), 1 + 5))
  mixed = jax.jit(supervised(mixup_p=1.0).prepare)(batch, key)
  assert mixed.keys() == {"image", "labels"}  # what else the batch holds is not mixed, but dropped
  assert 0.5 <= float(mixed["labels"].max(axis=-1).min()) < 1.0
  at_five = state._replace(step=jnp.int32(5))
  (want, _), (got, _) = compiled()[1](at_five, mixed), step(at_five, batch)
  assert_close(got.params, want.params, atol=1e-6)
  assert got.step == 6


def test_dropout_differs_between_steps_and_parts_and_repeats_bitwise():
  model = MODEL.clone(dropout=0.3)
  state, step = compiled(model)
  batch = make_batch()
  first, again, later = (
    step(state._replace(step=jnp.int32(i)), batch)[1]["loss"] for i in (0, 0, 1)
  )
  assert first == again != later
  # Two equal halves, one after the other: with one mask for both, their mean would be either.
  _, two_parts = compiled(model, accumulate=2)
  _, one_part = compiled(model)
  half = jax.tree.map(lambda x: x[:4], batch)
  twice = jax.tree.map(lambda x: jnp.repeat(x, 2, axis=0), half)
  assert two_parts(state, twice)[1]["loss"] != one_part(state, half)[1]["loss"]


def test_one_seed_gives_the_same_bits():
  batch = make_batch()

  def train():
    _, step = compiled(mixup_p=1.0)
    params, tx = steps.init_params(MODEL, {"image": (12, 12, 3)}, seed=0), optax.sgd(0.1)
    state = steps.TrainState(jnp.int32(0), params, tx.init(params))
    for _ in range(2):
      state, measured = step(state, batch)
    return state, measured

  jax.tree.map(np.testing.assert_array_equal, train(), train())


def weighted(weights):
  """Cross-entropy of which each example counts as much as its weight says."""

  def loss(predict, batch):
    logits = predict({"image": batch["image"]})["logits"]
    total = optax.softmax_cross_entropy(logits, batch["labels"]) * weights[batch["_id"]]
    return Losses(total, weights[batch["_id"]])

  prepare = keep("image", "labels", "_id")
  return supervised()._replace(prepare=prepare, loss=loss)


def gradients_of(objective, state, **options):
  fn = functools.partial(steps.gradients, model=MODEL, objective=objective, seed=0, seqhw=4)
  return jax.jit(functools.partial(fn, **options))(state, make_batch())


@pytest.mark.parametrize("weights", [[0, 0, 0, 0, 5, 1, 1, 30], [0, 0, 0, 0, 2, 0, 0, 0]])
def test_sums_of_examples_are_divided_once_by_their_weight(weights):
  """Of microbatches the weights differ, and of some they are 0: a mean of means would be another number."""
  (state, _), objective = compiled(), weighted(jnp.asarray(weights, jnp.float32))
  loss, grads = gradients_of(objective, state)

  def mean(params):
    logits = MODEL.apply({"params": params}, make_batch()["image"], seqhw=4)[0]
    total = optax.softmax_cross_entropy(logits, make_batch()["labels"])
    return (total * jnp.asarray(weights)).sum() / sum(weights)

  want, want_grads = jax.value_and_grad(mean)(state.params)
  for accumulate in (1, 2, 4, 8):
    loss, grads = gradients_of(objective, state, accumulate=accumulate)
    np.testing.assert_allclose(loss, want, rtol=1e-6)
    assert_close(grads, want_grads, atol=1e-6)


def test_a_batch_in_which_nothing_counts_changes_nothing():
  (state, _), objective = compiled(), weighted(jnp.zeros(8))
  for accumulate in (1, 4):
    loss, grads = gradients_of(objective, state, accumulate=accumulate)
    assert loss == 0 and not any(g.any() for g in jax.tree.leaves(grads))


@pytest.mark.parametrize("accumulate", [1, 4])
def test_the_gradient_of_each_example_is_clipped_before_the_mean(accumulate):
  state, _ = compiled()
  frozen = jax.tree.map(lambda _: False, state.params)
  frozen["embedding"] = {"kernel": True, "bias": True}
  batch, each, norms = make_batch(), [], []
  for i in range(8):
    one = {k: v[i : i + 1] for k, v in batch.items()}

    def loss(params, one=one):
      logits = MODEL.apply({"params": params}, one["image"], seqhw=4)[0]
      return optax.softmax_cross_entropy(logits, one["labels"])[0]

    grads = jax.grad(loss)(state.params)
    each.append(grads)
    norms.append(float(optax.tree.norm(grads["head"])))
  limit = float(np.median(norms))  # so that half of them are clipped
  clipped = [
    jax.tree.map(lambda g, norm=norm: g * min(1, limit / norm), grads)
    for grads, norm in zip(each, norms, strict=True)
  ]
  want = jax.tree.map(lambda *g: sum(g) / 8, *clipped)
  want["embedding"] = jax.tree.map(jnp.zeros_like, want["embedding"])
  options = dict(clip_each=limit, frozen=frozen, accumulate=accumulate)
  assert_close(gradients_of(supervised(), state, **options)[1], want, atol=1e-6)
  with pytest.raises(UserError, match="use clip, or an objective that divides per example"):
    gradients_of(weighted(jnp.ones(8)), state, **options)


def test_initial_parameters_are_a_function_of_the_seed():
  fields = dict(patch_size=(4, 4), posemb_size=(2, 2), width=16, depth=1, mlp_dim=8, num_heads=2)
  model = FlexiViT(num_classes=3, **fields)
  shapes = {"image": (12, 12, 3)}
  a, other = (jax.jit(lambda s=s: steps.init_params(model, shapes, s))() for s in (0, 1))
  b = jax.jit(lambda: steps.init_params(model.clone(head_bias=-10.0), shapes, 0))()
  np.testing.assert_array_equal(b["head"].pop("bias"), np.full(3, -10.0, np.float32))
  assert not a["head"].pop("bias").any() and not a["head"]["kernel"].any()
  jax.tree.map(np.testing.assert_array_equal, a, b)
  assert not np.allclose(a["embedding"]["kernel"], other["embedding"]["kernel"])


def test_parameters_of_a_kernel_that_does_not_divide_the_image_can_be_made():
  model = FlexiViT(patch_size=(6, 6), posemb_size=(2, 2), width=16, depth=1, mlp_dim=8, num_heads=2)
  params = jax.eval_shape(lambda: steps.init_params(model, {"image": (10, 10, 3)}, seed=0))
  assert params["embedding"]["kernel"].shape == (6, 6, 3, 16)
