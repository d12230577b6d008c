"""Contrastive losses against double loops in float64, and what must not change them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from flexivit_jax import errors
from flexivit_jax.objectives import OBJECTIVES, contrastive

LOSSES = ("softmax_contrastive", "sigmoid_contrastive")


def embedded(n, seed, e=5):
  rng = np.random.default_rng(seed)
  image, text = rng.normal(size=(2, n, e))
  image, text = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (image, text))
  scalars = dict(t=np.full(n, rng.uniform(0, 4)), b=np.full(n, rng.uniform(-8, 2)))
  return {k: np.float32(v) for k, v in dict(image=image, text=text, **scalars).items()}


def double_loop(name, e):
  """The formulas of the papers, pair by pair; returns the mean loss."""
  image, text, t, b = (np.float64(e[k]) for k in ("image", "text", "t", "b"))
  n, scale = len(image), np.exp(t[0])
  if name == "softmax_contrastive":
    scores = np.minimum(scale, 100.0) * np.array([[sum(x * y) for y in text] for x in image])
    row = [np.log(np.exp(scores[i]).sum()) - scores[i, i] for i in range(n)]
    column = [np.log(np.exp(scores[:, i]).sum()) - scores[i, i] for i in range(n)]
    return 0.5 * (np.mean(row) + np.mean(column))
  total = 0.0
  for i in range(n):
    for j in range(n):
      z = scale * sum(image[i] * text[j]) + b[0]
      total += np.log1p(np.exp(-z if i == j else z))
  return total / n


@functools.cache
def gradient_of(name, chunk=contrastive.CHUNK):
  """Compiled once for each number of pairs."""
  return jax.jit(jax.value_and_grad(mean_of(name, chunk)))


def mean_of(name, chunk=contrastive.CHUNK):
  objective = OBJECTIVES[name](chunk=chunk)
  return lambda e: objective.loss.loss(e, {}).mean()


@pytest.mark.parametrize("name", LOSSES)
@settings(max_examples=15, deadline=None)
@given(n=st.sampled_from([2, 3, 8]), seed=st.integers(0, 99), chunk=st.sampled_from([1, 4, 100]))
def test_losses_and_gradients_are_those_of_double_loops(name, n, seed, chunk):
  e = embedded(n, seed)
  loss, grads = gradient_of(name, chunk)(e)
  np.testing.assert_allclose(loss, double_loop(name, e), rtol=1e-5, atol=1e-6)
  rng = np.random.default_rng(seed)
  step = 1e-6
  for key in e.keys() - ({"b"} if name == "softmax_contrastive" else set()):
    along = rng.normal(size=e[key].shape)
    if along.ndim == 1:
      along[:] = 1  # one number, repeated
    moved = [{**e, key: np.float64(e[key]) + s * step * along} for s in (1, -1)]
    slope = (double_loop(name, moved[0]) - double_loop(name, moved[1])) / (2 * step)
    np.testing.assert_allclose((np.float64(grads[key]) * along).sum(), slope, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_the_order_of_the_pairs_changes_nothing(name):
  e, order = embedded(8, 3), np.random.default_rng(0).permutation(8)
  permuted = {k: v[order] for k, v in e.items()}
  loss, grads = gradient_of(name)(e)
  other, other_grads = gradient_of(name)(permuted)
  np.testing.assert_allclose(loss, other, rtol=1e-6)
  for key in ("image", "text"):
    np.testing.assert_allclose(grads[key][order], other_grads[key], atol=1e-6)


def test_a_scale_above_the_limit_is_the_limit():
  e = embedded(4, 0)
  above, at = ({**e, "t": np.full(4, np.log(s), np.float32)} for s in (1000.0, 100.0))
  loss = lambda e: float(gradient_of("softmax_contrastive")(e)[0])  # noqa: E731
  assert loss(above) == pytest.approx(loss(at), rel=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_memory_grows_with_the_batch_and_not_with_its_square(name):
  n, e = 4096, 8
  shapes = {k: jax.ShapeDtypeStruct((n, e), jnp.float32) for k in ("image", "text")}
  shapes |= {k: jax.ShapeDtypeStruct((n,), jnp.float32) for k in ("t", "b")}
  compiled = jax.jit(jax.grad(mean_of(name, chunk=64))).lower(shapes).compile()
  assert compiled.memory_analysis().temp_size_in_bytes < 4 * n * n / 8


@pytest.mark.parametrize(
  ("make", "expected"),
  [
    (functools.partial(OBJECTIVES["softmax_contrastive"], max_scale=0.0), "max_scale=0.0"),
    (functools.partial(OBJECTIVES["sigmoid_contrastive"], chunk=0), "chunk=0; expected at least"),
  ],
)
def test_bad_options_are_refused(make, expected):
  with pytest.raises(errors.UserError, match=expected):
    make()
