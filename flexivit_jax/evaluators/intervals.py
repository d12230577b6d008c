"""95 % confidence intervals of an accuracy measured on n images, in closed form. SciPy is imported at use."""

CONFIDENCE = 0.95


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


def bootstrap(p: float, n: int) -> tuple[float, float]:
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
