"""Losses against float64 NumPy, mixup against its definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

from flexivit_jax.errors import UserError
from flexivit_jax.objectives.losses import (
  DISTANCES,
  LOSSES,
  SparseLogits,
  dense_logits,
  kl,
  logsoftmax_euclidean,
  mixup,
  sigmoid_xent,
  softmax_xent,
  sparse_logits,
)


def _arrays(scale=5.0):
  rng = np.random.default_rng(0)
  return scale * rng.normal(size=(7, 11)), rng.dirichlet(np.ones(11), size=7)


def _f32(*arrays):
  return tuple(jnp.asarray(a, jnp.float32) for a in arrays)


def test_softmax_xent_is_minus_label_times_log_softmax():
  logits, labels = _arrays()
  want = -(labels * scipy.special.log_softmax(logits, axis=-1)).sum(-1)
  np.testing.assert_allclose(softmax_xent(*_f32(logits, labels)), want, rtol=1e-6)


def test_sigmoid_xent_is_the_sum_over_classes():
  logits, labels = _arrays()
  p = scipy.special.expit(logits)
  want = -(labels * np.log(p) + (1 - labels) * np.log1p(-p)).sum(-1)
  np.testing.assert_allclose(sigmoid_xent(*_f32(logits, labels)), want, rtol=1e-6)


def test_kl_is_of_the_teacher_from_the_student():
  student, _ = _arrays()
  teacher = student[::-1] * 0.5
  p, q = (scipy.special.softmax(x, axis=-1) for x in (teacher, student))
  want = scipy.stats.entropy(p, q, axis=-1)
  assert not np.allclose(want, scipy.stats.entropy(q, p, axis=-1), rtol=0.1)
  np.testing.assert_allclose(kl(*_f32(student, teacher)), want, rtol=1e-5)


def test_distances_of_equal_logits_and_their_gradients_are_zero():
  logits, _ = _f32(*_arrays())
  for distance in DISTANCES.values():
    shifted = logits + 3.0  # logits are only given up to a constant
    np.testing.assert_allclose(distance(logits, shifted), 0, atol=1e-5)
    gradient = jax.grad(lambda x, d=distance: d(x, logits).sum())(logits)
    assert np.abs(gradient).max() < 1e-5
  a, b = _arrays()[0], _arrays(2.0)[0]
  want = np.linalg.norm(
    scipy.special.log_softmax(a, axis=-1) - scipy.special.log_softmax(b, axis=-1), axis=-1
  )
  np.testing.assert_allclose(logsoftmax_euclidean(*_f32(a, b)), want, rtol=1e-5)


@pytest.mark.parametrize("top", [1, 4, 10])
def test_sparse_logits_keep_the_largest_probabilities_and_the_sum_of_the_others(top):
  logits, _ = _arrays()
  order = np.argsort(-logits, axis=-1)
  kept = sparse_logits(_f32(logits)[0], top)
  np.testing.assert_array_equal(kept.indices, order[:, :top])
  np.testing.assert_array_equal(
    kept.values, np.float32(np.take_along_axis(logits, order, 1))[:, :top]
  )
  p = np.take_along_axis(scipy.special.softmax(logits, axis=-1), order, 1)
  dense = dense_logits(kept, 11)
  got = np.take_along_axis(scipy.special.softmax(np.float64(dense), axis=-1), order, 1)
  np.testing.assert_allclose(got[:, :top], p[:, :top], rtol=2e-6)
  rest = p[:, top:].sum(-1, keepdims=True) / (11 - top)
  np.testing.assert_allclose(got[:, top:], np.repeat(rest, 11 - top, axis=1), rtol=2e-6)
  # Not only the probabilities, the logits themselves too.
  assert scipy.special.logsumexp(np.float64(dense), axis=-1) == pytest.approx(
    scipy.special.logsumexp(logits, axis=-1), abs=2e-6
  )


def test_dense_logits_puts_each_value_where_it_was():
  rng = np.random.default_rng(2)
  values, rest = np.float32(rng.normal(size=(5, 3))), np.float32(rng.normal(size=5))
  indices = np.stack([rng.permutation(8)[:3] for _ in range(5)])
  want = np.repeat(rest[:, None], 8, axis=1)
  for i in range(5):
    want[i, indices[i]] = values[i]
  got = jax.jit(dense_logits, static_argnums=1)(
    SparseLogits(*map(jnp.asarray, (values, indices, rest))), 8
  )
  np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("top", [11, 50])
def test_logits_that_are_all_kept_come_back_bit_for_bit(top):
  (logits,) = _f32(_arrays()[0])
  np.testing.assert_array_equal(dense_logits(sparse_logits(logits, top), 11), logits)
  half = logits.astype(jnp.bfloat16)
  kept = sparse_logits(half, top)
  assert kept.values.dtype == kept.rest.dtype == jnp.float32
  np.testing.assert_array_equal(dense_logits(kept, 11), half.astype(jnp.float32))


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_extreme_logits_stay_finite_and_bf16_is_computed_in_f32(loss):
  labels = jax.nn.one_hot(jnp.arange(3), 3)
  wrong = -1e4 * (2 * labels - 1)
  assert np.isfinite(loss(wrong, labels)).all()
  np.testing.assert_allclose(loss(-wrong, labels), 0.0, atol=1e-6)
  logits = jnp.asarray(_arrays()[0][:3, :3], jnp.bfloat16)
  got = loss(logits, labels.astype(jnp.bfloat16))
  assert got.dtype == jnp.float32
  np.testing.assert_array_equal(got, loss(logits.astype(jnp.float32), labels))


def test_softmax_gradient_is_softmax_minus_label():
  logits, labels = _f32(*_arrays())
  grad = jax.grad(lambda x: softmax_xent(x, labels).sum())(logits)
  np.testing.assert_allclose(grad, jax.nn.softmax(logits) - labels, atol=1e-6)


def test_mixup_mixes_all_arrays_with_the_same_partner_and_amount():
  rng = np.random.default_rng(1)
  image, labels = _f32(rng.normal(size=(6, 4, 4, 3)), np.eye(6))
  mixed, mixed_labels = jax.jit(mixup, static_argnames="p")(jax.random.key(3), image, labels, p=1.0)
  a = float(mixed_labels[0, 0])
  assert 0.5 <= a < 1.0
  want = a * np.eye(6) + (1 - a) * np.roll(np.eye(6), 1, axis=0)  # The partner of i is i - 1.
  np.testing.assert_allclose(mixed_labels, want, atol=1e-7)
  np.testing.assert_allclose(mixed, a * image + (1 - a) * np.roll(image, 1, axis=0), atol=1e-6)


@pytest.mark.parametrize("p", [0.5, 1.0, 3.0])  # Below, float32 rounds many draws to exactly 1.
def test_mixup_amount_is_a_folded_beta(p):
  labels = jnp.eye(2)
  keys = jax.random.split(jax.random.key(0), 4000)
  a = np.asarray(jax.vmap(lambda key: mixup(key, labels, p=p)[0][0, 0])(keys))
  beta = scipy.stats.beta(p, p)
  assert scipy.stats.kstest(a, lambda x: beta.cdf(x) - beta.cdf(1 - x)).pvalue > 0.01


def test_mixup_of_zero_changes_nothing_and_negative_is_an_error():
  labels = jnp.eye(4)
  np.testing.assert_array_equal(mixup(jax.random.key(0), labels, p=0.0)[0], labels)
  with pytest.raises(UserError, match=r"mixup_p=-0\.1; expected a finite number >= 0"):
    mixup(jax.random.key(0), labels, p=-0.1)
