"""How far a rate of so many tries can be trusted: 95 % intervals, without a draw."""

import math

import numpy as np


def wilson(p: float, n: int, z: float = 1.959964) -> tuple[float, float]:
  """The 95 % interval of a rate `p` of `n` tries. Source: Wilson 1927, JASA 22(158)."""
  centre = (p + z * z / (2 * n)) / (1 + z * z / n)
  half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
  return max(0.0, centre - half), min(1.0, centre + half)


def bootstrap(p: float, n: int) -> tuple[float, float]:
  """The 95 % percentile interval of the bootstrap of a rate `p` of `n` tries, as of endlessly many resamples.

  A resample draws `n` of the tries with replacement, so that its hits are binomial (n, p): the ends are the quantiles
  of that at 2.5 and 97.5 %, and no list of the tries is needed. Where all tries are alike all resamples are, too: then
  the ends are `wilson`'s. Source: Efron & Tibshirani 1993, An Introduction to the Bootstrap, chapter 13.
  """
  if not 0 < p < 1:
    return wilson(p, n)
  hits = np.arange(n)
  steps = np.log(n - hits) - np.log(hits + 1) + math.log(p) - math.log1p(-p)
  logs = n * math.log1p(-p) + np.concatenate(
    [[0.0], np.cumsum(steps)]
  )  # of the probability of each number of hits
  low, high = np.searchsorted(np.cumsum(np.exp(logs)), [0.025, 0.975])
  return float(low / n), float(high / n)
