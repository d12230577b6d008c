"""Cascades on labelled data: what `budget.fitting.fit` takes, and what a cascade gives and costs, measured."""

import functools
import pathlib
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from flexivit_jax import errors
from flexivit_jax.budget import cascade as rules, fitting
from flexivit_jax.budget.cascade import Cascade
from flexivit_jax.evaluators import metrics
from flexivit_jax.evaluators.base import Batches
from flexivit_jax.experiment import Evaluation
from flexivit_jax.inference import cascades, predictor, programs, texts
from flexivit_jax.sizes import SeqHw, size_args, size_text
from flexivit_jax.tables import aligned

ROUNDS = 7  # passes of a batch through each size, in turns, of which the median counts
Tell = Callable[[str], None]


class Asked(NamedTuple):
  """What is run: the model, and the classes, where these are texts."""

  loaded: predictor.Loaded
  among: texts.Names | None = None

  @property
  def classes(self) -> int:
    """How many there are."""
    return len(self.among.names) if self.among else self.loaded.model.num_classes

  @property
  def fn(self) -> programs.Fn:
    """What is wanted of the model's result."""
    return texts.embedding if self.among else programs.probabilities

  @property
  def scores(self) -> cascades.Scores:
    """What makes scores of it."""
    if self.among is None:
      return cascades.of_probabilities
    return functools.partial(cascades.of_embeddings, self.among)


class Scored(NamedTuple):
  """Labelled images at several sizes: scores [n, k] at each, labels, and per image ms and GFLOPs at each.

  `image` is height, width and channels of an image, `batch` how many were timed at once.
  """

  sizes: tuple[SeqHw, ...]
  scores: tuple[Float[np.ndarray, "n k"], ...]
  labels: Int[np.ndarray, "n"]
  ms: tuple[float, ...]
  gflops: tuple[float, ...]
  image: tuple[int, int, int]
  batch: int


def scored(
  asked: Asked, batches: Batches, sizes: Sequence[SeqHw], tell: Tell = lambda text: None
) -> Scored:
  """Runs the model over labelled images at each size, and times it.

  Args:
    asked: the model.
    batches: of "image", "labels" (one-hot) and "_mask".
    sizes: in any order; the result has them from coarse to fine.
    tell: called with what is done.

  Raises:
    UserError: labels of other classes, or of several at once; a size that does not divide the images.
  """
  first = next(iter(batches))
  batch, *shape = first["image"].shape
  image = (shape[0], shape[1], shape[2])
  _check_labels(asked, first)
  sizes = tuple(sorted(dict.fromkeys(sizes), key=lambda size: gflops_of_image(asked, size, image)))
  tell(f"compiles {len(sizes)} sizes")
  runs = runs_of(asked, sizes, batch, image)
  ms = timed(runs, np.asarray(first["image"], np.float32))
  tell("scores the images")
  parts: list[list[np.ndarray]] = [[] for _ in sizes]
  labels: list[np.ndarray] = []
  for each in batches:
    kept = each["_mask"] > 0
    labels.append(label_of(each["labels"][kept]))
    for part, run in zip(parts, runs, strict=True):
      part.append(np.asarray(run(each["image"]))[kept])
  scores = tuple(asked.scores(np.concatenate(part)) for part in parts)
  gflops = tuple(gflops_of_image(asked, size, image) for size in sizes)
  return Scored(sizes, scores, np.concatenate(labels), ms, gflops, image, batch)


def label_of(labels: Float[np.ndarray, "n k"]) -> Int[np.ndarray, "n"]:
  """Returns the class of each image; raises a UserError where there is none, or several."""
  if not ((labels > 0).sum(axis=1) == 1).all():
    raise errors.UserError("Some images have several classes or none; a cascade takes one of each.")
  return labels.argmax(axis=1)


def _check_labels(asked: Asked, batch: Mapping[str, np.ndarray]) -> None:
  if "labels" not in batch:
    raise errors.UserError("The images have no labels; a cascade is calibrated on labelled ones.")
  if (labels := batch["labels"].shape[-1]) != asked.classes:
    what = "names are" if asked.among else "model's classes are"
    raise errors.UserError(
      f"The labels have {labels} classes, the {what} {asked.classes}; take data of these classes."
    )


def runs_of(
  asked: Asked, sizes: Sequence[SeqHw], batch: int, image: tuple[int, int, int]
) -> list[cascades.Run]:
  """Returns what runs a batch at each size, compiled."""
  return [
    programs.compiled(asked.loaded, asked.fn, size, batch=batch, shape=image).run for size in sizes
  ]


def gflops_of_image(asked: Asked, size: SeqHw, image: tuple[int, int, int]) -> float:
  """Returns 10^9 operations of an image, two for a multiply-add."""
  model = asked.loaded.model
  tower = getattr(model, "parts", {}).get("image", model)  # of two, that of images
  return 2 * float(tower.gmacs({"image": image}, **size_args(size)))


def timed(runs: Sequence[cascades.Run], images: np.ndarray) -> tuple[float, ...]:
  """Returns the median ms of one image of a batch; the runs take turns, so that a busy machine slows all alike."""
  seconds: list[list[float]] = [[] for _ in runs]
  for _ in range(ROUNDS):
    for taken, run in zip(seconds, runs, strict=True):
      begin = time.perf_counter()
      run(images)
      taken.append(time.perf_counter() - begin)
  return tuple(statistics.median(taken) * 1e3 / len(images) for taken in seconds)


def fit(found: Scored, *, unit: str = "ms", **settings: Any) -> Cascade:
  """Returns `budget.fitting.fit` of scored images; `unit` chooses the costs."""
  costs = found.ms if unit == "ms" else found.gflops
  return fitting.fit(
    found.sizes,
    costs,
    found.scores,
    found.labels,
    unit=unit,
    metric=metrics.TOP1.stated(),
    **settings,
  )


def text(made: Cascade) -> list[str]:
  """Lines that say what a cascade does, gives and costs, on the certifying half of its calibration."""
  lines = [
    f"{made.name} by {made.signal}, {made.risk} at most alpha={made.alpha:g}, delta={made.delta:g}, {made.n} images"
    " certify it:",
    f"  cost {made.expected_cost:.4g} {made.unit} of {made.costs[-1]:.4g} ({made.expected_cost / made.costs[-1]:.0%}),"
    f" top-1 {made.value:.1%}, of the finest size {made.finest_value:.1%}; lost {made.lost:.2%}",
  ]
  stops = [f" where the signal is {t:.4g} or more" for t in made.thresholds] + [""]
  for size, share, stop in zip(made.sizes, made.shares, stops, strict=True):
    lines.append(f"  seqhw={size_text(size)} answers {share:.1%}{stop}")
  return lines


# --- measuring ---


class Ran(NamedTuple):
  """What a cascade did: the stage that answered each image, whether it was right, and ms of an image."""

  stages: Int[np.ndarray, "n"]
  right: Bool[np.ndarray, "n"]
  ms: float


def walk(asked: Asked, batches: Batches, ways: Sequence[Cascade]) -> list[Ran]:
  """Runs cascades over labelled images, side by side, and times each; what reads the images is not timed.

  Args:
    asked: the model.
    batches: as of `scored`; a stage runs batches of their size.
    ways: the cascades; one of a single stage is that size alone (`budget.cascade.alone`).
  """
  first = next(iter(batches))
  batch, *shape = first["image"].shape
  _check_labels(asked, first)
  sizes = list(dict.fromkeys(size for way in ways for size in way.sizes))
  made = dict(zip(sizes, runs_of(asked, sizes, batch, tuple(shape)), strict=True))
  flows = [
    cascades.Flow(way, [made[size] for size in way.sizes], asked.scores, batch) for way in ways
  ]
  seconds = [0.0] * len(ways)
  answers: list[dict[Any, cascades.Answer]] = [{} for _ in ways]

  def take(i: int, some: Iterable[cascades.Answered]) -> None:
    begin = time.perf_counter()
    for each in some:
      answers[i].update(each)
    seconds[i] += time.perf_counter() - begin

  labels: list[np.ndarray] = []
  n = 0
  for each in batches:
    kept = each["_mask"] > 0
    labels.append(label_of(each["labels"][kept]))
    images = list(np.asarray(each["image"], np.float32)[kept])
    for i, flow in enumerate(flows):
      take(i, (flow.put(n + j, image) for j, image in enumerate(images)))
    n += len(images)
  for i, flow in enumerate(flows):
    take(i, [flow.flush()])
  every = np.concatenate(labels)
  return [
    _ran(asked, found, every, taken * 1e3 / n)
    for found, taken in zip(answers, seconds, strict=True)
  ]


def _ran(
  asked: Asked, answers: Mapping[int, cascades.Answer], labels: Int[np.ndarray, "n"], ms: float
) -> Ran:
  order = range(len(labels))
  scores = asked.scores(np.stack([answers[i].output for i in order]))
  stages = np.array([answers[i].stage for i in order])
  return Ran(stages, scores.argmax(axis=1) == labels, ms)


def measured(
  loaded: predictor.Loaded,
  evaluation: Evaluation,
  files: Sequence[pathlib.Path],
  note: Tell = lambda text: None,
) -> list[dict[str, Any]]:
  """Returns the rows of cascades on an evaluation, see `row`; all and their finest sizes run side by side.

  Args:
    loaded: the model.
    evaluation: labelled images of the cascades' classes.
    files: of the cascades, of the same classes.
    note: called where they were calibrated on these images.

  Raises:
    UserError: see `budget.cascade.read`, `cascades.check` and `walk`; cascades of different names.
  """
  ways = [rules.read(file) for file in files]
  if len({(way.names, way.templates) for way in ways}) > 1:
    raise errors.UserError("The cascades are of different names; measure them one by one.")
  names, templates = ways[0].names, ways[0].templates
  among = texts.of_names(loaded, names, templates) if names else None
  for way in ways:
    cascades.check(way, loaded, among, templates)
  source = evaluation.source
  if any((w.data.get("name"), w.data.get("split")) == (source.name, source.split) for w in ways):
    note("the cascade was calibrated on these images, so its figures are too good; take others")
  asked = Asked(loaded, among)
  finest = list(dict.fromkeys(way.sizes[-1] for way in ways))
  singles = [rules.alone(size, asked.classes) for size in finest]
  batches = evaluation.batches()
  _, h, w, c = next(iter(batches))["image"].shape
  every = walk(asked, batches, [*ways, *singles])
  alone = dict(zip(finest, every[len(ways) :], strict=True))
  gflops = {size: gflops_of_image(asked, size, (h, w, c)) for way in ways for size in way.sizes}
  return [
    row(way, ran, alone[way.sizes[-1]], gflops, file=file.name)
    for way, ran, file in zip(ways, every, files, strict=False)
  ]


def table(rows: Sequence[Mapping[str, Any]]) -> str:
  """Returns the rows of cascades as text, each beside its finest size."""
  head = [
    "cascade",
    "signal",
    "risk",
    "alpha",
    "GFLOPs",
    "ms",
    "finest ms",
    "top-1",
    "finest",
    "lost",
  ]
  cells = [
    [
      row["cascade"],
      row["signal"],
      row["risk"],
      f"{row['alpha']:g}",
      f"{row['gflops']:.4g}",
      f"{row['ms']:.4g}",
      f"{row['finest']['ms']:.4g}",
      f"{row['top1']:.2%}",
      f"{row['finest']['top1']:.2%}",
      f"{row['lost']:.2%}",
      " ".join(f"{share:.1%}" for share in row["shares"]),
    ]
    for row in rows
  ]
  return "\n".join(aligned([[*head, "share of each stage"], *cells]))


def row(
  way: Cascade, ran: Ran, finest: Ran, gflops: Mapping[SeqHw, float], **about: Any
) -> dict[str, Any]:
  """Returns what an eval.json holds of a cascade, read by `report.runs`.

  Args:
    way: the cascade.
    ran: what it did.
    finest: what its finest size did alone, on the same images in the same run.
    gflops: of an image at each size.
    **about: further keys.
  """
  shares = np.bincount(ran.stages, minlength=len(way.sizes)) / len(ran.stages)
  each = np.cumsum([gflops[size] for size in way.sizes])
  return {
    "cascade": way.name,
    "sizes": [size_text(size) for size in way.sizes],
    "signal": way.signal,
    "risk": way.risk,
    "alpha": way.alpha,
    "delta": way.delta,
    "shares": shares.tolist(),
    "gflops": float(each @ shares),
    "ms": ran.ms,
    "top1": float(ran.right.mean()),
    "lost": float((finest.right & ~ran.right).mean()),
    "finest": {
      "gflops": gflops[way.sizes[-1]],
      "ms": finest.ms,
      "top1": float(finest.right.mean()),
    },
    "n": len(ran.right),
    **about,
  }
