"""How far a classifier's probabilities can be trusted: calibration error and temperature (arXiv 1706.04599)."""

import numpy as np
from jaxtyping import Float, Int

from flexivit_jax import errors


def log_softmax(logits: Float[np.ndarray, "n k"]) -> Float[np.ndarray, "n k"]:
  """Logarithms of the probabilities, in float64."""
  shifted = np.asarray(logits, np.float64) - np.max(logits, axis=1, keepdims=True)
  return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def nll(logits: Float[np.ndarray, "n k"], labels: Int[np.ndarray, "n"]) -> float:
  """Mean negative log-likelihood of the labels, in nats."""
  return float(-log_softmax(logits)[np.arange(len(labels)), labels].mean())


def ece(logits: Float[np.ndarray, "n k"], labels: Int[np.ndarray, "n"], bins: int = 15) -> float:
  """Expected calibration error: how far confidence is from accuracy, in bins of equal width, by their examples."""
  logs = log_softmax(logits)
  confidence, right = np.exp(logs.max(axis=1)), logs.argmax(axis=1) == labels
  which = np.minimum((confidence * bins).astype(int), bins - 1)
  gaps = np.bincount(which, weights=right - confidence, minlength=bins)
  return float(np.abs(gaps).sum() / len(labels))


def temperature(logits: Float[np.ndarray, "n k"], labels: Int[np.ndarray, "n"]) -> float:
  """The number by which logits are divided for the smallest `nll`, from 0.05 to 20, within 1e-4 of its logarithm.

  Raises:
    UserError: no examples.
  """
  if not len(labels):
    raise errors.UserError("A temperature cannot be fitted to 0 examples.")
  # The loss is convex in 1 / temperature, so it has one minimum in its logarithm: golden section.
  low, high = np.log(0.05), np.log(20.0)
  ratio = (np.sqrt(5.0) - 1) / 2

  def loss(at: float) -> float:
    return nll(np.asarray(logits, np.float64) / np.exp(at), labels)

  a, b = high - ratio * (high - low), low + ratio * (high - low)
  fa, fb = loss(a), loss(b)
  while high - low > 1e-4:
    if fa <= fb:
      high, b, fb = b, a, fa
      a = high - ratio * (high - low)
      fa = loss(a)
    else:
      low, a, fa = a, b, fb
      b = low + ratio * (high - low)
      fb = loss(b)
  return float(np.exp((low + high) / 2))
