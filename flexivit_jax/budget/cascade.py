"""A cascade: every image at a coarse size, those that it leaves unsure at finer ones; thresholds with a guarantee.

The guarantee is on the share of images that the cascade gets wrong and the finest size alone gets right ("lost"), or on
this less the share of the reverse, by which its accuracy is below that of the finest size ("drop"). The thresholds are
chosen by `budget.fitting`.

Scores are logits, or what differs from them by one number an image, such as the logarithms of probabilities. No JAX.
"""

import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from flexivit_jax import errors, files
from flexivit_jax.budget import calibration, sealed
from flexivit_jax.sizes import SeqHw, from_text, size_text

FORMAT = "flexivit cascade 1"
UNITS = ("ms", "gflops")
RISKS = ("lost", "drop")

Json = dict[str, Any]
Scores = Float[np.ndarray, "n k"]


class Cascade(NamedTuple):
  """Stages from coarse to fine, and when an image stops at one.

  Attributes:
    sizes: of the stages; each computes from the image. The last one is the finest size of the calibration.
    thresholds: of each stage but the last: the least signal that stops there; inf: none does.
    temperatures: of the stages: scores are divided by them.
    signal: a name in `SIGNALS`.
    alpha, delta: the risk is at most `alpha` with a probability of at least 1 - `delta`.
    costs: of one image at each stage.
    unit: of the costs, "ms" or "gflops".
    expected_cost: of one image, all stages that it reaches.
    shares: of the images that each stage answers.
    lost: the share of images that the cascade got wrong and the finest size right.
    value, finest_value: top-1 of the cascade, and of the finest size alone.
    n: images of the certifying part, on which the shares and values were measured.
    seed: of the split of the calibration images.
    classes: number of classes.
    weights: sha256 of the parameters, `trees.digest`; "": of none.
    metric: of the values, as `Metric.stated`.
    data: what it was calibrated on.
    names: the classes, where they are texts; with `templates`, see `inference.texts`.
    risk: what is at most alpha, of `RISKS`: the share of lost images, or the loss of accuracy.
  """

  sizes: tuple[SeqHw, ...]
  thresholds: tuple[float, ...]
  temperatures: tuple[float, ...]
  signal: str
  alpha: float
  delta: float
  costs: tuple[float, ...]
  unit: str
  expected_cost: float
  shares: tuple[float, ...]
  lost: float
  value: float
  finest_value: float
  n: int
  seed: int
  classes: int
  weights: str = ""
  metric: Mapping[str, Any] = {}
  data: Mapping[str, Any] = {}
  names: tuple[str, ...] = ()
  templates: str = ""
  risk: str = "lost"

  @property
  def name(self) -> str:
    """The stages in a few characters, "4>8"."""
    return ">".join(str(size_text(size)) for size in self.sizes)

  def stop(self, stage: int, scores: Scores, before: Scores | None = None) -> Bool[np.ndarray, "n"]:
    """Tells which images a stage answers; the others go to the next one. Each row depends on itself alone.

    Args:
      stage: from 0.
      scores: of the images at this stage.
      before: of the same images at the stage before; None at the first one.
    """
    if stage == len(self.sizes) - 1:
      return np.ones(len(scores), bool)
    scaled = calibrated(scores, self.temperatures[stage])
    previous = None if before is None else calibrated(before, self.temperatures[stage - 1])
    return SIGNALS[self.signal](scaled, previous) >= self.thresholds[stage]

  def stages(self, scores: Sequence[Scores]) -> Int[np.ndarray, "n"]:
    """Returns the stage that answers each image, from the scores of all of them at all stages."""
    found = np.full(len(scores[0]), len(self.sizes) - 1)
    for stage in reversed(range(len(self.sizes) - 1)):
      stops = self.stop(stage, scores[stage], scores[stage - 1] if stage else None)
      found[stops] = stage
    return found

  def answers(self, scores: Sequence[Scores]) -> Int[np.ndarray, "n"]:
    """Returns the class that the cascade says of each image; `scores` as of `stages`."""
    predicted = np.stack([each.argmax(axis=1) for each in scores])
    return predicted[self.stages(scores), np.arange(predicted.shape[1])]

  def cost(self, shares: Sequence[float]) -> float:
    """Returns the mean cost of an image, where the stages answer these shares of the images."""
    return mean_cost(self.costs, shares)

  def at(self, stages: Sequence[SeqHw]) -> Sequence[int]:
    """Returns where the cascade's sizes are in a list of sizes.

    Raises:
      UserError: one is missing.
    """
    for size in self.sizes:
      if size not in stages:
        raise errors.unknown(
          "size of the cascade", size_text(size), [str(size_text(s)) for s in stages]
        )
    return [list(stages).index(size) for size in self.sizes]


def alone(size: SeqHw, classes: int, cost: float = 1.0, unit: str = "ms") -> Cascade:
  """Returns the cascade of one stage, which loses nothing."""
  return Cascade(
    (size,), (), (1.0,), "confidence", 0.0, 0.0, (cost,), unit, cost, (1.0,), 0.0, 0.0, 0.0, 0, 0, classes
  )  # fmt: skip


def mean_cost(costs: Sequence[float], shares: Sequence[float]) -> float:
  """An image that stage k answers has paid for all stages up to k."""
  return float(np.dot(np.cumsum(costs), shares))


# --- signals ---


def calibrated(scores: Scores, temperature: float) -> Float[np.ndarray, "n k"]:
  """Probabilities in float64, under a temperature."""
  return np.exp(calibration.log_softmax(scores.astype(np.float64) / temperature))


def confidence(probabilities: Scores, before: Scores | None = None) -> Float[np.ndarray, "n"]:
  """The largest probability."""
  return probabilities.max(axis=1)


def margin(probabilities: Scores, before: Scores | None = None) -> Float[np.ndarray, "n"]:
  """The largest probability minus the second one."""
  if probabilities.shape[1] < 2:
    return probabilities[:, 0]
  second, first = np.partition(probabilities, -2, axis=1)[:, -2:].T
  return first - second


def agreement(probabilities: Scores, before: Scores | None = None) -> Float[np.ndarray, "n"]:
  """The mean of the largest probabilities of two stages that say the same; -inf where they do not, or for the first."""
  if before is None:
    return np.full(len(probabilities), -np.inf)
  same = probabilities.argmax(axis=1) == before.argmax(axis=1)
  return np.where(same, (probabilities.max(axis=1) + before.max(axis=1)) / 2, -np.inf)


Signal = Callable[[Scores, Scores | None], Float[np.ndarray, "n"]]
SIGNALS: dict[str, Signal] = {
  "confidence": confidence,
  "margin": margin,
  "agreement": agreement,
}


def of_probabilities(probabilities: Shaped[np.ndarray, "n k"]) -> Float[np.ndarray, "n k"]:
  """Scores: the logarithms of probabilities, finite also where one is 0."""
  return np.log(np.maximum(probabilities.astype(np.float64), np.finfo(np.float64).tiny))


# --- the file ---


def write(path: pathlib.Path, cascade: Cascade) -> None:
  """Writes a cascade as JSON, at once or not at all.

  Raises:
    UserError: the file cannot be written.
  """
  content = cascade._asdict() | {
    "sizes": [size_text(size) for size in cascade.sizes],
    "thresholds": [None if math.isinf(t) else t for t in cascade.thresholds],
    "metric": dict(cascade.metric),
    "data": dict(cascade.data),
  }
  files.write_atomically(path, sealed.text(sealed.seal(FORMAT, "cascade", content)))


def read(path: pathlib.Path, weights: str | None = None) -> Cascade:
  """Reads a cascade.

  Args:
    path: the file.
    weights: sha256 of the parameters that it has to be of, `trees.digest`; None: of any.

  Raises:
    UserError: no such file; no cascade, a damaged one, of a newer version, or of other weights.
  """
  again = "`flexivit cascade` makes it again"
  try:
    data = path.read_bytes()
  except OSError as e:
    raise errors.UserError(f"{path} cannot be read: {e.strerror or e}; {again}.") from e
  content = sealed.opened(sealed.parse(data, path, again), FORMAT, "cascade", path, again)
  try:
    cascade = _of_json(content)
  except (KeyError, TypeError, ValueError) as e:
    raise errors.UserError(f"{path} is damaged: {e!r}; {again}.") from e
  if weights is not None and cascade.weights != weights:
    raise errors.UserError(
      f"{path} was calibrated with other weights (sha256 {cascade.weights[:12] or 'unknown'}; these are"
      f" {weights[:12]}); {again} for these."
    )
  return cascade


def _of_json(content: Json) -> Cascade:
  lists = ("temperatures", "costs", "shares", "names")
  cascade = Cascade(
    **{
      **content,
      **{name: tuple(content[name]) for name in lists},
      "sizes": tuple(from_text(size) for size in content["sizes"]),
      "thresholds": tuple(math.inf if t is None else float(t) for t in content["thresholds"]),
    }
  )
  stages = len(cascade.sizes)
  lengths = [len(getattr(cascade, name)) for name in lists[:-1]]
  if (
    lengths != [stages] * 3
    or len(cascade.thresholds) != stages - 1
    or cascade.signal not in SIGNALS
  ):
    raise ValueError(f"{stages} stages, signal {cascade.signal!r}")
  return cascade
