"""Losses of pixels against loops in float64, with pixels of no class, absent classes and images without any."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexivit_jax import errors
from flexivit_jax.objectives import OBJECTIVES
from flexivit_jax.objectives.segmentation import pixel_losses

segmentation = OBJECTIVES["segmentation"]


def case(seed, n=3, h=4, w=5, k=4, ignored=0.3):
  rng = np.random.default_rng(seed)
  logits = rng.normal(size=(n, h, w, k)).astype("f") * 3
  mask = rng.integers(0, k - 1, (n, h, w))  # the last class is in no image
  mask[rng.random(mask.shape) < ignored] = -1
  mask[0] = -1  # an image without any class
  return logits, mask.astype(np.int32)


def loop(logits, mask, shares, gamma, weights):
  """Sums and counts of the images, one pixel after the other."""
  sums, numbers = [], []
  for scores, truth in zip(logits.astype(np.float64), mask, strict=True):
    k = scores.shape[-1]
    w = np.ones(k) if weights is None else np.asarray(weights, np.float64)
    total, number = 0.0, int((truth >= 0).sum())
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    for y, x in zip(*np.nonzero(truth >= 0), strict=True):
      c = truth[y, x]
      nll = -np.log(p[y, x, c])
      total += shares.get("cross_entropy", 0) * w[c] * nll
      total += shares.get("focal", 0) * w[c] * (1 - p[y, x, c]) ** gamma * nll
    if "dice" in shares and number:
      each = {}
      for c in set(truth[truth >= 0]):
        both = p[truth == c, c].sum()
        each[c] = 1 - 2 * both / (p[truth >= 0, c].sum() + (truth == c).sum())
      mean = sum(w[c] * d for c, d in each.items()) / sum(w[c] for c in each)
      total += shares["dice"] * number * mean
    sums.append(total)
    numbers.append(number)
  return np.array(sums), np.array(numbers)


@pytest.mark.parametrize(
  ("shares", "gamma", "weights"),
  [
    (dict(cross_entropy=1.0), 2.0, None),
    (dict(focal=1.0), 2.0, None),
    (dict(focal=0.5), 0.5, (1.0, 2.0, 0.0, 3.0)),
    (dict(dice=1.0), 2.0, None),
    (dict(cross_entropy=1.0, dice=0.5, focal=0.25), 1.0, (0.5, 2.0, 1.0, 3.0)),
  ],
)
def test_losses_are_those_of_a_loop_in_float64(shares, gamma, weights):
  for seed in range(20):
    logits, mask = case(seed)
    got = pixel_losses(jnp.asarray(logits), jnp.asarray(mask), shares, gamma, weights)
    total, number = loop(logits, mask, shares, gamma, weights)
    np.testing.assert_allclose(got.total, total, rtol=2e-5, atol=1e-5)
    np.testing.assert_array_equal(got.weight, number)


@pytest.mark.parametrize("loss", ["cross_entropy", "focal", "dice"])
def test_what_stands_where_there_is_no_class_changes_nothing(loss):
  logits, mask = case(0)
  batch = {"image": jnp.zeros((3, 4, 5, 3)), "mask": jnp.asarray(mask)}
  objective = segmentation(loss=loss)

  def mean(logits):
    return objective.loss(lambda inputs: {"pixel_logits": logits}, batch).mean()

  value, slope = jax.value_and_grad(mean)(jnp.asarray(logits))
  other = np.where((mask == -1)[..., None], 99.0, logits)
  assert mean(jnp.asarray(other)) == value
  assert not np.asarray(slope)[mask == -1].any()
  assert np.isfinite(slope).all()


@pytest.mark.parametrize("loss", ["cross_entropy", "focal", "dice"])
def test_pixels_that_are_sure_have_finite_gradients(loss):
  logits = jnp.full((1, 2, 2, 3), -200.0).at[..., 0].set(200.0)
  mask = jnp.array([[[0, 0], [1, -1]]])
  for gamma in (0.0, 0.5, 2.0):
    slope = jax.grad(lambda x, gamma=gamma: pixel_losses(x, mask, {loss: 1.0}, gamma).mean())(
      logits
    )
    assert np.isfinite(slope).all()


def test_a_batch_without_any_class_has_the_loss_0():
  logits, mask = case(0)
  for loss in ("cross_entropy", "focal", "dice"):
    assert pixel_losses(jnp.asarray(logits), jnp.full_like(mask, -1), {loss: 1.0}).mean() == 0


@pytest.mark.parametrize(
  ("arguments", "expected"),
  [
    (dict(loss="dise"), "loss 'dise'"),
    (dict(loss={}), "expected one of cross_entropy"),
    (dict(loss={"dice": 0.0}), "dice has the weight 0.0; expected a finite number > 0"),
    (dict(loss="focal", gamma=-1), "gamma=-1; expected a finite number >= 0"),
    (dict(class_weights="balanced"), "class_weights='balanced'; expected a number for each class"),
  ],
)
def test_bad_arguments_are_refused(arguments, expected):
  with pytest.raises(errors.UserError, match=expected):
    segmentation(**arguments)
