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
  """Returns the temperature that minimises the negative log-likelihood of the labels under logits / temperature.

  Searched from 0.05 to 20, to within 1e-4 of its logarithm. The loss is convex in 1 / temperature, so it has one
  minimum. Source: Guo et al. 2017, arXiv 1706.04599, section 4.2.

  Raises:
    UserError: no examples.
  """
  from scipy import optimize  # at use: it takes a third of a second

  if not len(labels):
    raise errors.UserError("A temperature cannot be fitted to 0 examples.")
  scores = np.asarray(logits, np.float64)
  best = optimize.minimize_scalar(
    lambda log: nll(scores / np.exp(log), labels),
    bounds=(np.log(0.05), np.log(20.0)),
    method="bounded",
    options={"xatol": 1e-4},
  )
  return float(np.exp(best.x))
