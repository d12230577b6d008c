"""95 % confidence intervals: of a rate of n images in closed form, of other metrics by a bootstrap over the images.

SciPy is imported at use.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Int

CONFIDENCE = 0.95
RESAMPLES = 1000
BLOCK = 2**22  # draws that are in memory at once

Statistic = Callable[[Int[np.ndarray, "r n"]], Float[np.ndarray, "r m"]]


def wilson(successes: int, n: int) -> tuple[float, float]:
  """Returns the ends of the 95 % interval of a rate. Source: Wilson 1927, JASA 22(158).

  Args:
    successes: number of images that were right, 0 to n.
    n: number of images, 1 or more.

  Raises:
    ValueError: more successes than images, or no image.
  """
  from scipy import stats

  interval = stats.binomtest(successes, n).proportion_ci(CONFIDENCE, method="wilson")
  return float(interval.low), float(interval.high)


def binomial(p: float, n: int) -> tuple[float, float]:
  """Returns the ends of the 95 % percentile interval of the bootstrap, in the limit of infinitely many resamples.

  A resample draws n of the images with replacement, so its number of hits is binomial (n, p): the ends are that
  distribution's quantiles at 2.5 and 97.5 %, and no list of answers is needed. If all images are right, or all are
  wrong, all resamples are equal; the ends are then those of `wilson`. Source: Efron & Tibshirani 1993, An Introduction
  to the Bootstrap, chapter 13.

  Args:
    p: the accuracy, 0 to 1.
    n: number of images.
  """
  if not 0 < p < 1:
    return wilson(round(p * n), n)
  from scipy import stats

  tail = (1 - CONFIDENCE) / 2
  low, high = stats.binom.ppf([tail, 1 - tail], n, p)
  return float(low / n), float(high / n)


def bootstrap(
  statistic: Statistic, n: int, *, resamples: int = RESAMPLES, seed: int = 0
) -> Float[np.ndarray, "2 m"]:
  """Returns the low and the high ends of the 95 % percentile intervals of m metrics of the same n images.

  A resample draws n of the images with replacement. What a metric makes of it is up to `statistic`, which is told how
  often each image was drawn: the mean of per-image values is `drawn @ values / n`, an intersection over union is that
  of the weighted sums, an average precision counts each image's detections as often. If all images are alike, so are
  all resamples, and the interval has no width. Source: as of `binomial`.

  Args:
    statistic: number of times that each image was drawn [r, n], in r resamples, to the metrics [r, m] of each resample.
    n: number of images.
    resamples: how many there are; the ends of 1000 vary with the seed by about a fiftieth of the width.
    seed: of the draws: the same seed and n give the same resamples.
  """
  rng = np.random.Generator(np.random.Philox(seed))
  rows = max(1, BLOCK // n)
  parts = []
  for begin in range(0, resamples, rows):
    images = rng.integers(n, size=(min(rows, resamples - begin), n))
    parts.append(statistic(np.stack([np.bincount(drawn, minlength=n) for drawn in images])))
  tail = (1 - CONFIDENCE) / 2
  return np.quantile(np.concatenate(parts), [tail, 1 - tail], axis=0)


def mean(values: Float[np.ndarray, "r"]) -> Float[np.ndarray, "r"]:
  """The metric that is the mean over the images of one number of each: that mean itself."""
  return values
