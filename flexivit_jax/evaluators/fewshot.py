"""Few-shot linear probe at every patch size: ridge regression on frozen features, solved exactly.

Least squares from the standardised pre-logits of a few training images of each class to targets of -1 and +1, as in
big_vision's evaluators/fewshot_lsr.py. Two things differ: there l2 is one given constant, here it is chosen on the
training images; there the bias is a column of 100s, so hardly penalised, here it is not penalised at all.

The model's own head is not used, so that the data may have other classes than the model.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool, Float

from flexivit_jax import errors
from flexivit_jax.evaluators import metrics
from flexivit_jax.evaluators.base import Batches
from flexivit_jax.evaluators.probing import Classify, Probing
from flexivit_jax.models import Model
from flexivit_jax.sizes import SeqHw

METRICS = (metrics.TOP1,)
POWERS = tuple(2.0**i for i in range(-10, 11))


class Decomposed(NamedTuple):
  """Training features `mean + (u * s @ vt) * scale`; float64. `u * s @ vt` are the standardised ones: mean 0, std 1."""

  mean: Float[np.ndarray, "d"]
  scale: Float[np.ndarray, "d"]
  u: Float[np.ndarray, "n r"]
  s: Float[np.ndarray, "r"]
  vt: Float[np.ndarray, "r d"]


class Probe(NamedTuple):
  """`features @ kernel + bias` are the scores of the classes; `l2` is what was chosen."""

  kernel: Float[np.ndarray, "d k"]
  bias: Float[np.ndarray, "k"]
  l2: float


def decompose(features: Float[np.ndarray, "n d"]) -> Decomposed:
  """Standardises features and takes their thin singular value decomposition, once for all values of l2.

  A feature that hardly varies, by less than 1e-5 of the one that varies most, is rounding: it is not blown up to 1.
  """
  features = features.astype(np.float64)
  mean, std = features.mean(axis=0), features.std(axis=0)
  scale = np.maximum(std, 1e-5 * std.max() or 1.0)
  u, s, vt = np.linalg.svd((features - mean[None]) / scale[None], full_matrices=False)
  return Decomposed(mean, scale, u, s, vt)


def ridge(x: Decomposed, targets: Float[np.ndarray, "n k"], l2: float) -> Probe:
  """Minimises `|z @ w + b - targets|^2 + l2 |w|^2` over w and b, z the standardised features.

  The bias is not penalised: since z has mean 0 it is the targets' mean. With z = u s vt the kernel is
  `vt' s / (s^2 + l2) u' targets`: the primal form, `(z'z + l2)^-1 z' targets`, where n >= d, and the dual one,
  `z' (zz' + l2)^-1 targets`, where n < d, at the cost of the smaller of the two.

  Returns:
    The probe for features as they are, not standardised.
  """
  mean = targets.mean(axis=0)
  weights = (x.s / (x.s**2 + l2))[:, None] * (x.u.T @ (targets - mean[None]))
  kernel = (x.vt.T @ weights) / x.scale[:, None]
  return Probe(kernel, mean - x.mean @ kernel, float(l2))


def left_out(
  x: Decomposed, targets: Float[np.ndarray, "n k"], l2: float
) -> Float[np.ndarray, "n k"]:
  """Each example's scores under `ridge` of all the others: exact, without refitting, for a fixed `scale`.

  The fit is `H @ targets` with `H = 1/n + u s^2 / (s^2 + l2) u'`, and leaving out example i divides its residual by
  1 - H_ii (PRESS; Allen 1974, Technometrics 16(1)). That the mean is of all examples does no harm: the bias is free.
  """
  shrink = x.s**2 / (x.s**2 + l2)
  mean = targets.mean(axis=0, keepdims=True)
  fitted = mean + (x.u * shrink[None]) @ (x.u.T @ (targets - mean))
  leverage = 1 / len(targets) + x.u**2 @ shrink
  return targets - (targets - fitted) / (1 - leverage)[:, None]


def fit(
  features: Float[np.ndarray, "n d"], labels: Bool[np.ndarray, "n k"], l2: Sequence[float]
) -> Probe:
  """The ridge probe with that of the values of l2 whose `left_out` scores have the least squared error.

  No other example is looked at, so that no test label and no second split takes part in the choice.
  """
  x, targets = decompose(features), np.where(labels, 1.0, -1.0)
  error = {value: np.square(left_out(x, targets, value) - targets).sum() for value in l2}
  return ridge(x, targets, min(error, key=lambda value: error[value]))


def fewshot(
  model: Model,
  batches: Batches,
  mesh: Mesh | None,
  *,
  train_batches: Batches,
  num_classes: int,
  seqhw: Sequence[SeqHw] = (),
  stride: Sequence[int] = (),
  depth: Sequence[int] = (),
  l2: float | Sequence[float] = POWERS,
) -> Probing:
  """Top-1 of a linear probe that is fitted to a few images of each class, anew at each patch size.

  l2 is chosen for each size by the squared error of the left-out training images (`fit`): never on `batches`; it
  stands in the row. What takes memory: `Probing`.

  Args:
    model, batches, mesh, num_classes: see `Probing`.
    train_batches: as `batches`, of the same shapes: what the probe is fitted to, a few images of each class.
    seqhw, stride, depth: sizes to evaluate, see `per_size.sizes_of`.
    l2: values to choose from, or the one to take, in units of the sum (not the mean) over the training images.

  Raises:
    UserError: an l2 that is not positive.
  """
  values = np.ravel(l2).tolist()
  if not values or not all(0 < value < math.inf for value in values):
    raise errors.UserError(f"l2={l2}; expected one or more numbers, all greater than 0.")

  def fitted(features: np.ndarray, labels: np.ndarray) -> tuple[Classify, dict[str, Any]]:
    probe = fit(features, labels, values)
    return lambda asked: scores(probe, asked).argmax(axis=-1), {"l2": probe.l2}

  return Probing(
    model,
    batches,
    mesh,
    train_batches=train_batches,
    fit=fitted,
    num_classes=num_classes,
    seqhw=seqhw,
    stride=stride,
    depth=depth,
  )


def scores(probe: Probe, features: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n k"]:
  """What the probe says of each class."""
  return features @ probe.kernel + probe.bias[None]
