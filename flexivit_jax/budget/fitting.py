"""Which stages and thresholds a cascade gets: the least expected cost that keeps its guarantee (`budget.cascade`).

The guarantee holds with a probability of at least 1 - delta over the calibration images, whatever the model, if they
are drawn as the later images are. Method: learn then test, fixed-sequence testing (Angelopoulos et al., arXiv
2110.01052, section 2). A tuning part of the images gives a path of settings, from careful to cheap; the other part
tests them in this order.
"""

import functools
import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from flexivit_jax import errors
from flexivit_jax.budget import calibration
from flexivit_jax.budget.cascade import (
  RISKS,
  SIGNALS,
  UNITS,
  Cascade,
  Scores,
  calibrated,
  mean_cost,
)
from flexivit_jax.sizes import SeqHw, size_text

COARSE = 3  # coarse stages at most; a fourth one hardly pays, and all subsets are tried
_WEIGHTS = np.geomspace(3e3, 0.3, 40)  # costs of an image at the finest size that one loss may save
_SWEEPS = 4
_RATES = 12
_FACTORS = np.linspace(0.01, 2.0, 200)


class _Setting(NamedTuple):
  """Stages by their places among the sizes, thresholds, and on the tuning part the losses and the mean cost.

  Of the risk "drop" gains are subtracted from the losses.
  """

  chosen: tuple[int, ...]
  thresholds: tuple[float, ...]
  losses: int
  cost: float


def fit(
  sizes: Sequence[SeqHw],
  costs: Sequence[float],
  scores: Sequence[Float[np.ndarray, "_ _"]],
  labels: Int[np.ndarray, "_"],
  *,
  alpha: float,
  delta: float = 0.05,
  signal: str = "confidence",
  unit: str = "ms",
  seed: int = 0,
  risk: str = "lost",
  **about: Any,
) -> Cascade:
  """Returns the cascade of least expected cost that keeps the guarantee.

  The images are divided into halves. The first gives the temperatures, and the stages and thresholds of least cost
  among those that lose as many images as could pass. A path of nested settings leads through these, from careful to
  cheap. The second half tests it from its careful end, each setting by an exact test at level delta (`allowed`,
  `drop_p`), and stops at the first that fails; the last that passed is the cheapest. The finest size alone loses
  nothing and needs no test.

  Args:
    sizes: from coarse to fine; the last one is what the guarantee compares with.
    costs: of one image at each size.
    scores: at each size.
    labels: class of each image.
    alpha, delta, signal, unit, seed, risk: see `Cascade`.
    **about: further attributes of it.

  Raises:
    UserError: too few images for the guarantee; labels of other classes; values that cannot be.
  """
  _check(sizes, costs, scores, labels, alpha, delta, signal, unit, risk)
  order = np.random.Generator(np.random.Philox(seed)).permutation(len(labels))
  tuning, certifying = np.split(order, [len(labels) // 2])
  temperatures = [calibration.temperature(each[tuning], labels[tuning]) for each in scores]
  probabilities = [calibrated(each, t) for each, t in zip(scores, temperatures, strict=True)]
  right = np.stack([each.argmax(axis=1) == labels for each in scores])
  lost, gained = ~right & right[-1], right & ~right[-1]
  n = len(certifying)
  most = allowed(n, alpha, delta)

  def passes(losses: int, gains: int) -> bool:
    return losses <= most if risk == "lost" else drop_p(losses, gains, n, alpha, delta) <= delta

  counted = lost.astype(int) - gained if risk == "drop" else lost.astype(int)
  limit = most / n if risk == "lost" else alpha
  tuned = _best(
    costs, counted[:, tuning], [each[tuning] for each in probabilities], signal, limit, delta
  )
  held = _signals([each[certifying] for each in probabilities], tuned.chosen, signal)
  best, answered = _cheapest_that_passes(
    tuned, costs, held, lost[:, certifying], gained[:, certifying], passes
  )
  chosen = np.array(best.chosen)
  own = [costs[k] for k in chosen]
  shares = (np.bincount(answered, minlength=len(chosen)) / n).tolist()
  return Cascade(
    sizes=tuple(sizes[k] for k in chosen),
    thresholds=best.thresholds,
    temperatures=tuple(temperatures[k] for k in chosen),
    signal=signal,
    alpha=alpha,
    delta=delta,
    costs=tuple(map(float, own)),
    unit=unit,
    expected_cost=mean_cost(own, shares),
    shares=tuple(shares),
    lost=float(lost[chosen[answered], certifying].mean()),
    value=float(right[chosen[answered], certifying].mean()),
    finest_value=float(right[-1, certifying].mean()),
    n=n,
    seed=seed,
    classes=scores[0].shape[1],
    risk=risk,
    **about,
  )


def _cheapest_that_passes(
  tuned: _Setting,
  costs: Sequence[float],
  signals: Sequence[Float[np.ndarray, "n"]],
  lost: Bool[np.ndarray, "sizes n"],
  gained: Bool[np.ndarray, "sizes n"],
  passes: Callable[[int, int], bool],
) -> tuple[_Setting, Int[np.ndarray, "n"]]:
  """Tests the path through a setting from its careful end to the first that fails.

  Returns:
    The last setting that passed and costs less than the finest size, else that of the finest size alone; and the stage
    at which it answers each image of the certifying part.
  """
  n = lost.shape[1]
  best, answered = _Setting((len(costs) - 1,), (), 0, costs[-1]), np.zeros(n, int)
  for setting in _path(tuned) if signals else ():
    stages = _stages(signals, setting.thresholds, n)
    ends, images = np.array(setting.chosen)[stages], np.arange(n)
    if not passes(int(lost[ends, images].sum()), int(gained[ends, images].sum())):
      break
    if np.cumsum([costs[k] for k in setting.chosen])[stages].mean() < costs[-1]:
      best, answered = setting, stages
  return best, answered


@functools.lru_cache(maxsize=4096)
def drop_p(losses: int, gains: int, n: int, alpha: float, delta: float) -> float:
  """Returns a p-value of the hypothesis that the accuracy falls by alpha or more.

  The probability that so many images, losses - gains, are lost less gained among n, or fewer. It depends on how many
  images are either: the largest over `_RATES` of their rates up to the upper end of an interval, whose own error, a
  tenth of delta, is added (Berger & Boos 1994, JASA 89(427)); both parts are exact binomials.

  Args:
    losses: images that the cascade gets wrong and the finest size right.
    gains: images of the reverse.
    n: all images.
    alpha, delta: see `Cascade`.
  """
  from scipy import stats

  error = delta / 10
  either = losses + gains
  upper = stats.beta.ppf(1 - error, either + 1, n - either) if either < n else 1.0
  rates = np.linspace(alpha, max(alpha, upper), _RATES)[:, None]
  width = 8 * np.sqrt(n * rates) + 8
  counts = np.arange(n + 1)[None]
  counts = counts[:, int(max(0, (n * rates - width).min())) : int((n * rates + width).max()) + 1]
  below = np.floor((counts + losses - gains) / 2)
  lost_of_them = np.minimum((rates + alpha) / (2 * rates), 1.0)
  joint = stats.binom.pmf(counts, n, rates) * stats.binom.cdf(below, counts, lost_of_them)
  return float(joint.sum(axis=1).max()) + error


def allowed(n: int, alpha: float, delta: float) -> int:
  """Returns the most losses among n images that pass the exact binomial test; -1: not even none.

  A rate of alpha or more gives so few with a probability of at most delta: the upper end of Clopper and Pearson's
  one-sided interval is below alpha.
  """
  from scipy import stats  # at use: it takes a third of a second

  most = int(stats.binom.ppf(delta, n, alpha))  # the least number whose probability reaches delta
  return most if stats.binom.cdf(most, n, alpha) <= delta else most - 1


def needed(alpha: float, delta: float) -> int:
  """Returns how many calibration images the guarantee takes at least: half of them without a loss has to pass."""
  return 2 * math.ceil(math.log(delta) / math.log1p(-alpha) - 1e-9) - 1


def _signals(
  probabilities: Sequence[Scores], chosen: Sequence[int], signal: str
) -> list[Float[np.ndarray, "n"]]:
  """The signals of all chosen stages but the last."""
  before = [None, *(probabilities[k] for k in chosen)]
  return [SIGNALS[signal](probabilities[k], before[i]) for i, k in enumerate(chosen[:-1])]


def _stages(
  signals: Sequence[Float[np.ndarray, "n"]], thresholds: Sequence[float], n: int
) -> Int[np.ndarray, "n"]:
  """The stage that answers each of n images, from the signals of all stages but the last."""
  found = np.full(n, len(signals))
  for k in reversed(range(len(signals))):
    found[signals[k] >= thresholds[k]] = k
  return found


def _path(best: _Setting) -> list[_Setting]:
  """Returns nested settings from careful to cheap, through one: each stops all images that those before it stop.

  Its thresholds' distances from 1, the largest signal, are multiplied by a factor from 0 to 2.
  """
  thresholds = np.array(best.thresholds)
  return [
    best._replace(thresholds=tuple((1 - factor * (1 - thresholds)).tolist())) for factor in _FACTORS
  ]


def _best(
  costs: Sequence[float],
  lost: Int[np.ndarray, "sizes n"],
  probabilities: Sequence[Scores],
  signal: str,
  limit: float,
  delta: float,
) -> _Setting:
  """Returns the setting of least cost on the tuning part that would pass; the finest size alone is one.

  Args:
    costs, probabilities, signal: as for `fit`.
    lost: images that a size loses: 1; where gains count, -1 for one that it gains.
    limit: the most losses, as a share.
    delta: where gains count, their scatter has to leave room for it (a normal approximation).
  """
  coarse, last = range(len(costs) - 1), len(costs) - 1
  n = lost.shape[1]
  found = set()
  for count in range(1, COARSE + 1):
    for chosen in itertools.combinations(coarse, count):
      found |= _settings((*chosen, last), costs, lost, probabilities, signal, int(limit * n))
  quantile = statistics.NormalDist().inv_cdf(1 - delta) if (lost < 0).any() else 0.0
  for setting in sorted(found, key=lambda s: (s.cost, s.losses, s.chosen, s.thresholds)):
    stages = _stages(_signals(probabilities, setting.chosen, signal), setting.thresholds, n)
    either = np.abs(lost[np.array(setting.chosen)[stages], np.arange(n)]).sum()
    if setting.losses + quantile * math.sqrt(either) <= limit * n:
      return setting
  return _Setting((last,), (), 0, costs[-1])


class _Stages:
  """Thresholds of a choice of stages on the tuning part, improved in turn.

  Args:
    chosen: places of the stages.
    costs: of one image at each stage.
    lost: images that are lost, 1, where a stage answers them; -1: gained.
    signals: of each stage but the last.
  """

  def __init__(
    self,
    chosen: tuple[int, ...],
    costs: Float[np.ndarray, "stages"],
    lost: Int[np.ndarray, "stages n"],
    signals: Sequence[Float[np.ndarray, "n"]],
  ):
    self.chosen, self.costs, self.lost, self.signals = chosen, costs, lost, signals
    self.orders = [np.argsort(-signal, kind="stable") for signal in signals]
    self.thresholds = [math.inf] * len(signals)

  def improve(self, weight: float) -> bool:
    """Takes for each threshold in turn that of least cost plus weight times losses; tells whether one changed."""
    before = list(self.thresholds)
    for k in reversed(range(len(self.signals))):
      order, cost, losses = self._if_stopped(k)
      if len(order):
        total = cost + weight * losses
        self.thresholds[k] = self._between(k, order, int(np.argmin(total)))
    return self.thresholds != before

  def around(self, most: int) -> set[_Setting]:
    """Returns what one threshold alone can give, the cheapest for each number of losses up to `most`."""
    found = set()
    for k in range(len(self.signals)):
      order, cost, losses = self._if_stopped(k)
      by_losses = np.lexsort((cost, losses))
      first = np.unique(losses[by_losses], return_index=True)[1]
      for i in by_losses[first]:
        if losses[i] <= most and np.isfinite(cost[i]):
          own = (*self.thresholds[:k], self._between(k, order, int(i)), *self.thresholds[k + 1 :])
          mean = float(cost[i]) / self.lost.shape[1]
          found.add(_Setting(self.chosen, own, int(losses[i]), mean))
    return found

  def _if_stopped(
    self, k: int
  ) -> tuple[Int[np.ndarray, "reached"], Float[np.ndarray, "some"], Int[np.ndarray, "some"]]:
    """Returns the images that can stop at stage k, the surest first, and for 0, 1, ... of them that do cost and losses.

    Of all images, in sums. The cost is inf where no threshold divides the images so.
    """
    n = self.lost.shape[1]
    ways = np.cumsum(self.costs)
    stages = _stages(self.signals[:k], self.thresholds[:k], n)
    later = k + 1 + _stages(self.signals[k + 1 :], self.thresholds[k + 1 :], n)
    ends = np.where(stages < k, stages, later)
    order = self.orders[k]
    order = order[(stages[order] == k) & np.isfinite(self.signals[k][order])]
    lost_later, lost_here = self.lost[ends, np.arange(n)], self.lost[k]
    sums = lambda start, steps: np.concatenate([[start], start + np.cumsum(steps)])  # noqa: E731
    losses = sums(lost_later.sum(), (lost_here - lost_later)[order])
    cost = sums(ways[ends].sum(), (ways[k] - ways[ends])[order])
    falling = self.signals[k][order]
    cost[1:-1][falling[:-1] == falling[1:]] = math.inf
    return order, cost, losses

  def _between(self, k: int, order: Int[np.ndarray, "reached"], stopped: int) -> float:
    """The threshold at which the first images of an order stop."""
    if not stopped:
      return math.inf
    falling = self.signals[k][order]
    least = float(falling[stopped - 1])
    if stopped == len(order):
      return least
    middle = (least + float(falling[stopped])) / 2
    return middle if middle > falling[stopped] else least


def _settings(
  chosen: tuple[int, ...],
  costs: Sequence[float],
  lost: Int[np.ndarray, "sizes n"],
  probabilities: Sequence[Scores],
  signal: str,
  most: int,
) -> set[_Setting]:
  """Returns settings of these stages that minimise the cost plus a weight times the losses, for many weights."""
  own = np.array([costs[k] for k in chosen], float)
  signals = _signals(probabilities, chosen, signal)
  stages = _Stages(chosen, own, lost[list(chosen)], signals)
  found = set()
  for weight in costs[-1] * _WEIGHTS:
    for _ in range(_SWEEPS):
      if not stages.improve(weight):
        break
    found |= stages.around(most)
  return found


def _check(
  sizes: Sequence[SeqHw],
  costs: Sequence[float],
  scores: Sequence[Float[np.ndarray, "_ _"]],
  labels: Int[np.ndarray, "_"],
  alpha: float,
  delta: float,
  signal: str,
  unit: str,
  risk: str,
) -> None:
  if signal not in SIGNALS:
    raise errors.unknown("signal", signal, SIGNALS)
  if risk not in RISKS:
    raise errors.unknown("risk", risk, RISKS)
  if unit not in UNITS:
    raise errors.unknown("unit of the costs", unit, UNITS)
  for name, value in {"alpha": alpha, "delta": delta}.items():
    if not 0 < value < 1:
      raise errors.UserError(f"{name}={value:g}; expected a share between 0 and 1, e.g. 0.01.")
  if not len(sizes) == len(set(sizes)) == len(costs) == len(scores) or len(sizes) < 2:
    shown = ",".join(str(size_text(size)) for size in sizes)
    raise errors.UserError(
      f"Got the sizes {shown or 'none'}, {len(costs)} costs, scores at {len(scores)} sizes; a cascade takes two"
      " different sizes or more, with a cost and scores at each."
    )
  if not all(math.isfinite(cost) and cost > 0 for cost in costs):
    raise errors.UserError(f"Got the costs {list(costs)}; expected numbers above 0.")
  shapes = {each.shape for each in scores}
  if shapes != {(len(labels), scores[0].shape[1])}:
    raise errors.UserError(
      f"Scores of {sorted(shapes)} images and classes, {len(labels)} labels; expected the same of all."
    )
  if not all(np.isfinite(each).all() for each in scores):
    raise errors.UserError("Some scores are not finite; are the weights whole?")
  if len(labels) < needed(alpha, delta):
    raise errors.UserError(
      f"Too few images for the guarantee: alpha={alpha:g} with delta={delta:g} takes {needed(alpha, delta)} or more,"
      f" the calibration has {len(labels)}. Take more images, or a larger alpha or delta."
    )
  classes = scores[0].shape[1]
  if len(labels) and not 0 <= labels.min() <= labels.max() < classes:
    raise errors.UserError(
      f"The calibration's labels are {labels.min()} to {labels.max()}, the scores are of {classes} classes; calibrate"
      " on data of the model's classes."
    )
