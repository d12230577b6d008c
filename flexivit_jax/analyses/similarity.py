"""How alike representations are: centered kernel alignment (CKA) over minibatches, and a map of many of them.

CKA: arXiv 1905.00414. Minibatches with the unbiased estimator of HSIC: arXiv 2010.15327, equation 3; the estimator is
that of Song et al., Feature selection via dependence maximization, JMLR 2012, equation 5.
"""

from collections.abc import Sequence
from typing import final

import numpy as np
from jaxtyping import Float

from flexivit_jax import errors


@final
class MinibatchCKA:
  """Linear CKA between each pair of several features of the same examples, summed over minibatches.

  Args:
    count: how many features there are.
  """

  def __init__(self, count: int):
    self._sums = np.zeros((count, count))

  def update(self, features: Sequence[Float[np.ndarray, "n _"]]) -> None:
    """Adds a minibatch: for each feature the values [n, p] of the same n examples.

    Raises:
      UserError: fewer than four examples, of which HSIC cannot be estimated; another number of features.
    """
    if len(features) != len(self._sums):
      raise errors.UserError(f"Got {len(features)} features, expected {len(self._sums)}.")
    grams = [_gram(x) for x in features]
    self._sums += _hsic(grams)

  def result(self) -> Float[np.ndarray, "k k"]:
    """CKA of each pair: 1 on the diagonal, near 0 where there is nothing in common (the estimate may be below).

    NaN, not defined, with a feature that is the same for all examples (its HSIC with itself is not above 0).
    """
    norms = np.diag(self._sums)
    root = np.sqrt(np.where(norms > 0, norms, np.nan))
    return self._sums / np.outer(root, root)


def cka(x: Float[np.ndarray, "n _"], y: Float[np.ndarray, "n _"]) -> float:
  """Linear CKA of two features of all examples at once, with the same estimator."""
  whole = MinibatchCKA(2)
  whole.update([x, y])
  return float(whole.result()[0, 1])


def arc_cosine(similarity: Float[np.ndarray, "k k"]) -> Float[np.ndarray, "k k"]:
  """The distance that belongs to CKA, an angle: 0 for equal, pi/2 for nothing in common (arXiv 2110.14739)."""
  return np.arccos(np.clip(similarity, 0.0, 1.0))


def embed(distances: Float[np.ndarray, "k k"]) -> Float[np.ndarray, "k 2"]:
  """Points in the plane whose distances are nearest to these: classical multidimensional scaling.

  The signs are so that the largest coordinate of each axis is positive. What has no distances (NaN) has no point.
  """
  known = ~np.isnan(np.diag(distances))
  points = np.full((len(distances), 2), np.nan)
  if known.sum() >= 2:
    points[known] = _scale(distances[np.ix_(known, known)])
  return points


def _scale(distances: Float[np.ndarray, "k k"]) -> Float[np.ndarray, "k 2"]:
  """The points, where all distances are known."""
  k = len(distances)
  centre = np.eye(k) - 1.0 / k
  values, vectors = np.linalg.eigh(-0.5 * centre @ distances**2 @ centre)
  points = vectors[:, -2:][:, ::-1] * np.sqrt(np.maximum(values[-2:][::-1], 0.0))
  largest = points[np.abs(points).argmax(axis=0), [0, 1]]
  return points * np.where(largest < 0, -1.0, 1.0)


def _gram(x: Float[np.ndarray, "n p"]) -> Float[np.ndarray, "n n"]:
  """Inner products, with zeros on the diagonal, as the unbiased estimator takes them."""
  if len(x) < 4:
    raise errors.UserError(f"CKA of {len(x)} examples; it takes at least 4 in a minibatch.")
  x = np.asarray(x, np.float64)
  x = x - x[:1]  # a shift does not change HSIC, and what is constant becomes 0 to the last bit
  gram = x @ x.T
  np.fill_diagonal(gram, 0.0)
  return gram


def _hsic(grams: Sequence[Float[np.ndarray, "n n"]]) -> Float[np.ndarray, "k k"]:
  """The unbiased estimate of HSIC for each pair."""
  n = len(grams[0])
  stacked = np.stack(grams)
  rows = stacked.sum(axis=2)  # [k, n]
  sums = rows.sum(axis=1)
  flat = stacked.reshape(len(grams), -1)
  traces = flat @ flat.T
  between = rows @ rows.T
  total = traces + np.outer(sums, sums) / ((n - 1) * (n - 2)) - 2 / (n - 2) * between
  return total / (n * (n - 3))
