"""Measures a profile: what each size of a model gives on labelled data, and what it costs here (`budget.profile`)."""

import importlib.metadata
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int

from flexivit_jax import errors, weights
from flexivit_jax.budget import calibration
from flexivit_jax.budget.profile import Profile, Row
from flexivit_jax.devices import sharding
from flexivit_jax.evaluators import intervals, metrics
from flexivit_jax.evaluators.classification import restricted
from flexivit_jax.experiment import Evaluation
from flexivit_jax.inference import budgets, predictor, programs
from flexivit_jax.sizes import SeqHw, size_args, size_text

ROUNDS, LONGEST_S = 30, 5.0  # of one row; a slow one is timed less often, at least 10 times
_PACKAGES = ("flexivit_jax", "jax", "jaxlib", "numpy", "onnxruntime")


class Value(NamedTuple):
  """What a size gives: the metric, its 95 % interval, and of classes the likelihood; see `budget.profile.Row`."""

  value: float
  low: float
  high: float
  n: int
  nll: float | None = None
  temperature: float | None = None


class Asked(NamedTuple):
  """What to measure.

  Attributes:
    seqhw: tokens per side, or (per column, per row).
    batches: images at a time.
    ways: how the model is run; in each of them all sizes and batches.
    metric: its name; "": the headline of the evaluation.
  """

  seqhw: Sequence[SeqHw]
  batches: Sequence[int]
  ways: Sequence[programs.Way] = (programs.PLAIN,)
  metric: str = ""


def measure(
  loaded: predictor.Loaded,
  evaluation: Evaluation,
  asked: Asked,
  tell: Callable[[str], None] = lambda text: None,
) -> Profile:
  """Measures a profile on this device.

  Args:
    loaded: the model as `predict` runs it; of a detector of texts with its names, see `queries.closed`.
    evaluation: the data and the metrics, at the sizes of `asked`.
    asked: what to measure.
    tell: called with what is done.

  Raises:
    UserError: a metric that the evaluation does not have; another way than XLA in float32 for a model or an evaluation
      that has none; see `programs.compiled`.
  """
  metric = _metric(evaluation, asked.metric)
  values, shape = _values(loaded, evaluation, metric, asked, tell)
  source = evaluation.source
  data = {"name": source.name, "split": source.split, "n": next(iter(values.values())).n}
  return timed(loaded, metric, values, asked, shape, data, tell)


def timed(
  loaded: predictor.Loaded,
  metric: metrics.Metric,
  values: Mapping[tuple[SeqHw, programs.Way], Value],
  asked: Asked,
  shape: tuple[int, int, int],
  data: Mapping[str, Any],
  tell: Callable[[str], None] = lambda text: None,
) -> Profile:
  """Measures what each size costs here, and puts it beside what it gives.

  Args:
    loaded: the model.
    metric: of the values.
    values: of each size in each way.
    asked: what to measure.
    shape: of an image: height, width, channels.
    data: what the values were measured on: "name", "split", "n".
    tell: called with what is done.
  """
  costs = _costs(loaded, asked, shape, tell)
  rows = []
  for (size, batch, way), (times, memory) in costs.items():
    given = values[size, way]._asdict()
    ms, p90 = statistics.median(times) * 1e3, float(np.quantile(times, 0.9)) * 1e3
    gflops = _gflops(loaded.model, size, shape)
    rows.append(
      Row(
        size,
        batch,
        ms,
        p90,
        gflops,
        **given,
        memory_mb=memory,
        runtime=way.runtime,
        dtype=way.dtype,
      )
    )
  return Profile(
    weights.towers.digest(loaded.model, loaded.params),
    programs.device_name(),
    metric.stated(),
    data,
    shape,
    dict(_versions()),
    budgets.peak_gflops(),
    tuple(rows),
  )


def _metric(evaluation: Evaluation, name: str) -> metrics.Metric:
  declared = {metric.name: metric for metric in evaluation.metrics}
  if not name:
    return next(iter(declared.values()))
  if name not in declared:
    raise errors.unknown("metric", name, declared)
  return declared[name]


# --- what a size gives ---


def _values(
  loaded: predictor.Loaded,
  evaluation: Evaluation,
  metric: metrics.Metric,
  asked: Asked,
  tell: Callable[[str], None],
) -> tuple[dict[tuple[SeqHw, programs.Way], Value], tuple[int, int, int]]:
  """Returns what each size gives in each way, and the shape of an image."""
  mesh = sharding.make_mesh()
  section = evaluation.section
  evaluator: Any = evaluation.make(loaded.model, mesh)
  batches = evaluation.batches()
  shape = next(iter(batches))["image"].shape[1:]
  if section.get("type", "classification") == "classification" and metric.name in ("top1", "top5"):
    values = {}
    for way in asked.ways:
      tell(f"scores in {way.runtime}, {way.dtype}")
      label_map = evaluator.label_map
      for size, (logits, labels) in _scored(loaded, batches, asked.seqhw, way, label_map).items():
        values[size, way] = of_classes(logits, labels, k=1 if metric.name == "top1" else 5)
    return values, shape
  check_float32(asked.ways, f"{metric.name} of {section.get('type')}")
  tell("the evaluation")
  params = sharding.replicate(loaded.params, mesh)
  rows = {str(row["seqhw"]): row for row in evaluator.run(params)}
  plain = {size: of_row(rows[_named(size)], metric) for size in asked.seqhw}
  # The same function within rounding, which `TestOnnx` checks.
  return {(size, way): value for size, value in plain.items() for way in asked.ways}, shape


def _named(size: SeqHw) -> str:
  """What a row calls a size: a square by one number."""
  h, w = (size, size) if isinstance(size, int) else size
  return f"{h}" if h == w else f"{h}x{w}"


def check_float32(ways: Sequence[programs.Way], metric: str) -> None:
  """Raises a UserError for a way in other numbers, of a metric that is measured in float32 and in XLA alone."""
  for way in ways:
    if way.dtype != "float32":
      raise errors.UserError(f"--ways has {_text(way)}; {metric} is measured in float32 alone.")


def of_row(row: Mapping[str, Any], metric: metrics.Metric) -> Value:
  """Returns what an evaluator's row says of a metric, with its interval where the row has one."""
  value, n = float(row[metric.name]), int(row["n"])
  low, high = value, value
  if metric.interval == "binomial":
    low, high = intervals.binomial(value, n)
  elif metric.name in row.get("intervals", {}):
    low, high = row["intervals"][metric.name]
  return Value(value, min(low, value), max(high, value), n)


def _scored(
  loaded: predictor.Loaded,
  batches: Iterable[Mapping[str, np.ndarray]],
  seqhw: Sequence[SeqHw],
  way: programs.Way,
  label_map: Any,
) -> dict[SeqHw, tuple[np.ndarray, np.ndarray]]:
  """Returns logits [n, k] and labels [n, k] of the images that count, at each size."""
  calls = {size: programs.call(loaded, _logits, size, way) for size in seqhw}
  parts: dict[SeqHw, list[np.ndarray]] = {size: [] for size in seqhw}
  labels = []
  for batch in batches:
    kept = batch["_mask"] > 0
    labels.append(batch["labels"][kept])
    images = np.asarray(batch["image"], np.float32)
    results = {size: calls[size](loaded.params, images) for size in seqhw}
    for size, result in results.items():
      parts[size].append(np.asarray(result)[kept])
  every = np.concatenate(labels)
  found: dict[SeqHw, tuple[np.ndarray, np.ndarray]] = {}
  for size in seqhw:
    logits = np.concatenate(parts[size])
    if label_map:
      kept_logits, kept_labels = restricted(
        label_map, jax.numpy.asarray(logits), jax.numpy.asarray(every)
      )
      found[size] = np.asarray(kept_logits), np.asarray(kept_labels)
    else:
      found[size] = logits, every
  return found


def _logits(result: programs.Result) -> jax.Array:
  return result[0]


def of_classes(
  logits: Float[np.ndarray, "n k"], labels: Float[np.ndarray, "n k"], k: int = 1
) -> Value:
  """Returns the accuracy, its interval, and the likelihood of the labels.

  Args:
    logits: of each image.
    labels: one-hot or multi-hot: any of them is right; the likelihood is that of the largest.
    k: right if a label is among the k largest logits.
  """
  best = np.argsort(-logits, axis=1, kind="stable")[:, :k]
  right = np.max(np.take_along_axis(labels, best, axis=1), axis=1) > 0
  n = len(labels)
  true: Int[np.ndarray, n] = labels.argmax(axis=1)
  value = float(right.mean())
  low, high = intervals.binomial(value, n)
  nll, temperature = calibration.nll(logits, true), calibration.temperature(logits, true)
  return Value(value, min(low, value), max(high, value), n, nll, temperature)


# --- what it costs ---


def _costs(
  loaded: predictor.Loaded,
  asked: Asked,
  shape: tuple[int, int, int],
  tell: Callable[[str], None],
) -> dict[tuple[SeqHw, int, programs.Way], tuple[list[float], float | None]]:
  """Returns the seconds of each round, and the memory, of each size, batch and way.

  All programs are made first, and take turns, so that what else the machine does slows all of them alike.
  """
  made = {}
  for way in asked.ways:
    tell(f"compiles in {way.runtime}, {way.dtype}")
    for size in asked.seqhw:
      for batch in asked.batches:
        made[size, batch, way] = programs.compiled(
          loaded, budgets.output_of(loaded), size, batch=batch, shape=shape, way=way
        )
  tell("times the programs")
  times: dict[Any, list[float]] = {key: [] for key in made}
  images = {batch: _images(batch, shape) for batch in asked.batches}
  for _ in range(ROUNDS):
    for key, program in made.items():
      if len(times[key]) < 10 or sum(times[key]) < LONGEST_S:
        begin = time.perf_counter()
        program.run(images[key[1]])
        times[key].append(time.perf_counter() - begin)
  return {key: (times[key], program.memory_mb) for key, program in made.items()}


def _images(batch: int, shape: tuple[int, int, int]) -> np.ndarray:
  return np.random.default_rng(0).uniform(-1, 1, (batch, *shape)).astype(np.float32)


def _gflops(model: Any, size: SeqHw, shape: tuple[int, int, int]) -> float:
  tower = getattr(model, "parts", {}).get("image", model)  # of two, that of images
  return 2 * float(tower.gmacs({"image": shape}, **size_args(size)))


def _versions() -> Iterable[tuple[str, str]]:
  for package in _PACKAGES:
    try:
      yield package, importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
      continue


# --- text ---


def ways(text: str) -> tuple[programs.Way, ...]:
  """Parses "jax,onnx,onnx:int8,jax:bfloat16".

  Raises:
    UserError: a runtime or a dtype that there is not.
  """
  found = []
  for part in text.split(","):
    runtime, _, dtype = part.strip().partition(":")
    if runtime not in programs.RUNTIMES:
      raise errors.unknown("runtime of --ways", runtime, programs.RUNTIMES)
    way = programs.Way(runtime, dtype or "float32")
    if way.dtype not in programs.RUNTIMES[runtime]:
      raise errors.unknown(f"dtype of {runtime} in --ways", way.dtype, programs.RUNTIMES[runtime])
    found.append(way)
  return tuple(dict.fromkeys(found))


def _text(way: programs.Way) -> str:
  return f"{way.runtime}:{way.dtype}"


def table(profile: Profile) -> list[list[str]]:
  """The rows as cells of text, with a head, by way, size and batch."""
  metric = metrics.Metric(
    **{k: v for k, v in profile.metric.items() if k in metrics.Metric._fields}
  )
  head = ["seqhw", "batch", "runtime", "dtype", metric.short, "95 %", "nll", "T", "ms", "p90"]
  cells = [[*head, "images/s", "GFLOPs", "MB"]]
  tokens = lambda size: size * size if isinstance(size, int) else size[0] * size[1]  # noqa: E731
  order = lambda row: (row.runtime, row.dtype, tokens(row.size), row.batch)  # noqa: E731
  optional = lambda number, form: "" if number is None else format(number, form)  # noqa: E731
  for row in sorted(profile.rows, key=order):
    cells.append(
      [
        str(size_text(row.size)),
        str(row.batch),
        row.runtime,
        row.dtype,
        metric.text(row.value),
        f"{metric.text(row.low)} to {metric.text(row.high)}",
        optional(row.nll, ".3f"),
        optional(row.temperature, ".2f"),
        f"{row.ms:.2f}",
        f"{row.ms_p90:.2f}",
        f"{row.images_per_s:.1f}",
        f"{row.gflops:.3g}",
        optional(row.memory_mb, ".0f"),
      ]
    )
  return cells
