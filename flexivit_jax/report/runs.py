"""Read and check the eval.json files of runs."""

import functools
import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, get_args

import numpy as np
from jaxtyping import Int

from flexivit_jax import errors
from flexivit_jax.errors import UserError
from flexivit_jax.evaluators import intervals
from flexivit_jax.evaluators.metrics import (
  CLASSIFICATION,
  LOSS,
  TEXTS,
  TOP1,
  Better,
  Interval,
  Metric,
)
from flexivit_jax.running import ledger

SizeText = int | str  # tokens or pixels of a side; "HxW" where the sides differ
Key = tuple[SizeText, SizeText, int | None]  # (patch, seqhw, depth)
Json = dict[str, Any]  # a JSON object
LARGEST = 1e100  # beyond it an axis overflows
FACTS = ("dataset", "split", "step", "params", "device", "jax", "command")


class EvalRow(NamedTuple):
  """One evaluation of the first `depth` blocks (None: all).

  `gflops` are 2 x MACs / 1e9 of one image, `ms` its median time, `n` images. `value` is that of the run's metric and
  `interval` its 95 % interval, if there is one; `measured` are (name, value) of all metrics. Of a cascade `cascade` are
  its sizes, "4→8", and `setting` signal and risk; the patch is that of its finest size, the tokens are a mean.
  """

  seqhw: SizeText
  patch: SizeText
  tokens: int
  gflops: float
  ms: float | None
  n: int
  depth: int | None
  value: float
  interval: tuple[float, float] | None
  measured: tuple[tuple[str, float], ...]
  cascade: str = ""
  setting: str = ""

  def of(self, name: str) -> float | None:
    """Returns the value of a metric, None if the row lacks it."""
    return dict(self.measured).get(name)


class ImageSample(NamedTuple):
  """An image of classification: its file, its class or None, the class that is found, and whether that is right."""

  file: Path
  label: int | None
  predicted: int
  right: bool


class ReportRun(NamedTuple):
  """One curve: `metric` at each size. `trained` holds the grids `(h, w)` of its training, None if unknown.

  `metrics` are all that its rows have. `confusions` are the counts of class and predicted class of rows that have them,
  by `key_of`; `classes` their names. Of rows that have them `ious` are the intersections over unions of the classes,
  None for one without a pixel in the masks, and `samples` the files of predicted masks; `pixels` are those of each
  class in the masks. Of detection `aps` are the average precisions of the classes, None for one without a box,
  `boxes` the number of boxes of each, `parts` the average precisions of boxes of some areas and groups by the names
  of the evaluator, and `samples` the files of pictures with boxes. `images` are samples of classification, the same in
  all rows that have them. `cascades` are measured by the metric. `file` is the eval.json, `images_sha256` the digest of
  the scores of its images, if it has some.
  """

  name: str
  metric: Metric
  metrics: tuple[Metric, ...]
  rows: tuple[EvalRow, ...]
  trained: frozenset[tuple[int, int]] | None
  facts: dict[str, str]
  classes: tuple[str, ...] = ()
  confusions: Mapping[Key, Int[np.ndarray, "k k"]] = MappingProxyType({})
  ious: Mapping[Key, tuple[float | None, ...]] = MappingProxyType({})
  pixels: tuple[int, ...] = ()
  samples: Mapping[Key, tuple[Path, ...]] = MappingProxyType({})
  aps: Mapping[Key, tuple[float | None, ...]] = MappingProxyType({})
  boxes: tuple[int, ...] = ()
  parts: Mapping[Key, Mapping[str, float]] = MappingProxyType({})
  images: Mapping[Key, tuple[ImageSample, ...]] = MappingProxyType({})
  cascades: tuple[EvalRow, ...] = ()
  file: Path | None = None
  images_sha256: str | None = None

  @property
  def points(self) -> tuple[EvalRow, ...]:
    """Its rows and its cascades."""
    return self.rows + self.cascades

  @property
  def ceiling(self) -> Metric | None:
    """The metric that the run's can hardly be larger than, if it has one."""
    return next((m for m in self.metrics if m.ceiling_of == self.metric.name), None)


def key_of(row: EvalRow) -> Key:
  """Returns the key that identifies a row in its run."""
  return row.patch, row.seqhw, row.depth


def sides(size: object) -> tuple[int, int]:
  """Returns `(h, w)` of 8 or "8x6"; ValueError on anything else."""
  if isinstance(size, int) and not isinstance(size, bool) and size > 0:
    return size, size
  match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", size) if isinstance(size, str) else None
  if not match:
    raise ValueError(size)
  return int(match[1]), int(match[2])


def order(size: SizeText) -> tuple[int, int]:
  """Sorts sizes by area, then by height."""
  h, w = sides(size)
  return h * w, h


def is_trained(run: ReportRun, row: EvalRow) -> bool | None:
  """Whether the run was trained at the size of the row; None if the run does not say."""
  return None if run.trained is None else sides(row.seqhw) in run.trained


def load(paths: Sequence[Path], metric: str | None = None) -> list[ReportRun]:
  """Returns the runs in the given order, each with a name of its own; one for each depth that was evaluated.

  Args:
    paths: as of `read`.
    metric: name of the one to draw; default: the headline of the runs.

  Raises:
    UserError: no run, the same run twice, an eval.json that `read` refuses, or runs with different headlines.
  """
  if not paths:
    raise UserError("No run given; expected one or more run folders with an eval.json.")
  files = [(path if path.is_file() else path / "eval.json").resolve() for path in paths]
  twice = [str(path) for path, file in zip(paths, files, strict=True) if files.count(file) > 1]
  if twice:
    raise UserError(f"The same run was given more than once: {', '.join(twice)}; give it once.")
  loaded = [
    (run, file.parent)
    for path, file in zip(paths, files, strict=True)
    for run in by_depth(read(path, metric))
  ]
  _check_metric([run for run, _ in loaded])
  names = _distinct([run.name for run, _ in loaded], [folder for _, folder in loaded])
  return [run._replace(name=name) for (run, _), name in zip(loaded, names, strict=True)]


def by_depth(run: ReportRun) -> list[ReportRun]:
  """Returns the run as one curve for each depth, which its name then says; as it is where all blocks ran."""
  depths = dict.fromkeys(row.depth for row in run.rows)
  return [
    run._replace(
      name=run.name if depth is None else f"{run.name} depth={depth}",
      rows=tuple(row for row in run.rows if row.depth == depth),
      cascades=run.cascades if depth is None else (),
    )
    for depth in sorted(depths, key=lambda depth: depth or 0)
  ]


def _check_metric(runs: Sequence[ReportRun]) -> None:
  """Raises a UserError unless all runs are drawn by the same metric: others could not share an axis, or a winner."""
  kinds = {(run.metric.name, run.metric.better, run.metric.unit): run for run in reversed(runs)}
  if len(kinds) == 1:
    return
  shown = "; ".join(f"{run.name}: {_described(run.metric)}" for run in reversed(kinds.values()))
  if len({name for name, _, _ in kinds}) == 1:
    raise UserError(f"These are different metrics of one name: {shown}. Make a report of each.")
  shared = set.intersection(*({metric.name for metric in run.metrics} for run in runs))
  names = ", ".join(metric.name for metric in runs[0].metrics if metric.name in shared)
  advice = f"give --metric with one that all of them have: {names}"
  raise UserError(
    f"The runs have different headline metrics, which one page does not mix: {shown}."
    f" Make a report of each{f', or {advice}' if names else ''}."
  )


def _described(metric: Metric) -> str:
  unit = f" in {metric.unit}" if metric.unit else ""
  return f"{metric.name}{unit} ({'higher' if metric.better == 'max' else 'lower'} is better)"


def read(path: Path, metric: str | None = None) -> ReportRun:
  """Reads one run.

  Args:
    path: the run folder, or its eval.json: `{"name": str, "rows": [Row, ...]}` and, if known,
      "trained_seqhw", "metrics" (`Metric.stated`) and the FACTS; "ms" may be null, "ms", "depth" and "intervals" may be
      absent. Without "metrics" the rows have "top1" and "loss", and may have others of `CLASSIFICATION`.
    metric: name of the one to draw; default: the first.

  Raises:
    UserError: the file is missing, is not strict JSON, lacks a key or the metric, or has an impossible value.
  """
  file = path if path.is_file() else path / "eval.json"
  data = _parse(file)
  name = " ".join(_get(data, "name", str, file).split())
  if not name:
    raise _bad(file, "name", "", "some text")
  items = _get(data, "rows", list, file)
  if not items:
    raise _bad(file, "rows", items, "one row a patch size at least; run `flexivit eval` again")
  metrics, needed = _metrics(data, items, file)
  names = [one.name for one in metrics]
  if metric is not None and metric not in names:
    raise errors.unknown(f"metric of {file}", metric, names)
  drawn = metrics[0 if metric is None else names.index(metric)]
  read_row = functools.partial(_row, file=file, metrics=metrics, needed={*needed, drawn.name})
  rows = [read_row(item, where=f"rows[{i}]", drawn=drawn) for i, item in enumerate(items)]
  classes, confusions = tables_of(data, rows, file)
  ious, pixels, samples = segments_of(data, rows, file)
  aps, boxes = of_classes(data, rows, file, "class_ap", "class_boxes")
  parts = {key_of(row): _parts(data["rows"][i], file, f"rows[{i}].") for i, row in enumerate(rows)}
  samples |= samples_of(data, rows, file, "class_ap", "jpg")
  looked_at = {} if ious or aps else images_of(data, rows, file)
  rows.sort(key=_row_order)
  again = [k for k, count in Counter(map(key_of, rows)).items() if count > 1]
  if again:
    patch, seqhw, depth = again[0]
    only = "" if depth is None else f" and depth {depth}"
    raise UserError(f"{file}: patch {patch} at seqhw {seqhw}{only} has more than one row.")
  facts = {key: str(data[key]) for key in FACTS if data.get(key) is not None}
  if spent := ledger.shares(file.parent / "ledger.json"):
    facts["time"] = ledger.text(spent)
  if ious or aps:
    classes = _names(data, len(pixels or boxes), file)
  elif looked_at and not confusions and data.get("classes"):
    classes = _names(data, len(_get(data, "classes", list, file)), file)
  trained = _trained(data, file)
  return ReportRun(
    name,
    drawn,
    metrics,
    tuple(rows),
    trained,
    facts,
    classes,
    confusions,
    ious,
    pixels,
    samples,
    aps,
    boxes,
    parts if aps else {},
    looked_at,
    _cascades(data, rows, file, drawn),
    file,
    _get(data, "images_sha256", str, file) if "images_sha256" in data else None,
  )


def to_json(run: ReportRun) -> Json:
  """Returns `{"name", "metric", "rows"}`; "depth" only where it was given, "cascades" where there are some."""
  contents = {
    "name": run.name,
    "metric": run.metric.stated(),
    "rows": [*map(_to_json, run.rows)],
  }
  if run.cascades:
    contents["cascades"] = [
      {"cascade": row.cascade, "setting": row.setting, **_to_json(row)} for row in run.cascades
    ]
  return contents


def _to_json(row: EvalRow) -> Json:
  sizes = {k: getattr(row, k) for k in ("seqhw", "patch", "tokens", "gflops", "ms")}
  depth = {} if row.depth is None else {"depth": row.depth}
  return {**sizes, **dict(row.measured), "n": row.n, **depth}


def _parse(file: Path) -> Json:
  def refuse(constant: str) -> None:
    raise UserError(f"{file}: holds {constant}; expected finite numbers. Did the run diverge?")

  if not file.is_file():
    what = f"{file} is missing" if file.parent.is_dir() else f"The run {file.parent} does not exist"
    raise UserError(f"{what}; run `flexivit eval` first, it writes eval.json into the run folder.")
  try:
    data = json.loads(file.read_text(encoding="utf-8"), parse_constant=refuse)
  except (json.JSONDecodeError, UnicodeDecodeError) as error:
    raise UserError(f"{file}: not JSON ({error}); run `flexivit eval` again.") from error
  if not isinstance(data, dict):
    raise UserError(f"{file}: got a {type(data).__name__}; expected an object with name and rows.")
  return data


def _metrics(
  data: Json, items: Sequence[object], file: Path
) -> tuple[tuple[Metric, ...], Sequence[str]]:
  """Returns the metrics of a file, the headline first, and the names of those that every row must have."""
  if data.get("metrics") is None:
    known = {
      key for item in items if isinstance(item, dict) for key in item if item[key] is not None
    }
    needed = (TOP1.name, LOSS.name)
    return tuple(m for m in CLASSIFICATION if m.name in known or m.name in needed), needed
  stated = _get(data, "metrics", list, file)
  metrics = tuple(_metric(item, f"metrics[{i}]", file) for i, item in enumerate(stated))
  names = [metric.name for metric in metrics]
  if not metrics or len(set(names)) < len(names):
    raise _bad(file, "metrics", names, "one metric or more, each with a name of its own")
  return metrics, names


def _metric(item: object, where: str, file: Path) -> Metric:
  if not isinstance(item, dict):
    raise _bad(file, where, item, "an object")
  texts = {key: item.get(key, "") for key in ("name", *TEXTS)}
  for key, text in texts.items():
    if not isinstance(text, str) or (key == "name" and not text):
      raise _bad(file, f"{where}.{key}", text, "a text")
  better, interval = item.get("better"), item.get("interval")
  if better not in get_args(Better):
    raise _bad(file, f"{where}.better", better, "'max' or 'min'")
  if interval not in (None, *get_args(Interval)):
    raise _bad(file, f"{where}.interval", interval, "'binomial', 'bootstrap' or null")
  if interval == "binomial" and texts["unit"] != "%":
    raise _bad(file, f"{where}.unit", texts["unit"], "'%': a binomial interval is of a fraction")
  return Metric(better=better, interval=interval, **texts)


def _row(
  item: object,
  where: str,
  file: Path,
  metrics: Sequence[Metric],
  needed: Set[str],
  drawn: Metric,
) -> EvalRow:
  if not isinstance(item, dict):
    raise _bad(file, where, item, "an object")
  at = where + "."
  values = {
    metric.name: _value(item, metric, file, at)
    for metric in metrics
    if metric.name in needed or item.get(metric.name) is not None
  }
  n = _count(item, "n", file, at)
  return EvalRow(
    seqhw=_size(item, "seqhw", file, at),
    patch=_size(item, "patch", file, at),
    tokens=_count(item, "tokens", file, at),
    gflops=_number(item, "gflops", file, at, low=1e-12),
    ms=None if item.get("ms") is None else _number(item, "ms", file, at),
    n=n,
    depth=None if item.get("depth") is None else _count(item, "depth", file, at),
    value=values[drawn.name],
    interval=_interval(item, drawn, values[drawn.name], n, file, at),
    measured=tuple(values.items()),
  )


def _cascades(
  data: Json, rows: Sequence[EvalRow], file: Path, drawn: Metric
) -> tuple[EvalRow, ...]:
  """Returns what `flexivit eval --cascade` measured, by GFLOPs; nothing where another metric is drawn."""
  items = _get(data, "cascades", list, file) if "cascades" in data else []
  if drawn.name != TOP1.name:
    return ()
  found = (_cascade(item, rows, file, f"cascades[{i}].", drawn) for i, item in enumerate(items))
  return tuple(sorted(found, key=lambda row: row.gflops))


def _cascade(item: object, rows: Sequence[EvalRow], file: Path, at: str, drawn: Metric) -> EvalRow:
  if not isinstance(item, dict):
    raise _bad(file, at[:-1], item, "an object")
  stages = [
    _size({"sizes": size}, "sizes", file, at) for size in _get(item, "sizes", list, file, at)
  ]
  shares = _get(item, "shares", list, file, at)
  if not stages or len(shares) != len(stages):
    raise _bad(file, at + "shares", shares, f"a share for each of the sizes {stages}")
  parts = [_number({"shares": s}, "shares", file, at, high=1.0) for s in shares]
  tokens = itertools.accumulate(math.prod(sides(size)) for size in stages)
  value, n = _value(item, drawn, file, at), _count(item, "n", file, at)
  patches = {row.seqhw: row.patch for row in rows}
  return EvalRow(
    seqhw=stages[-1],
    patch=patches.get(stages[-1], stages[-1]),
    tokens=round(sum(t * s for t, s in zip(tokens, parts, strict=True))),
    gflops=_number(item, "gflops", file, at, low=1e-12),
    ms=_number(item, "ms", file, at),
    n=n,
    depth=None,
    value=value,
    interval=intervals.binomial(value, n),
    measured=((drawn.name, value),),
    cascade="→".join(map(str, stages)),
    setting=_setting(item, file, at),
  )


def _setting(item: Json, file: Path, at: str) -> str:
  """What a cascade goes by: "margin, lost 0.02"."""
  signal, risk = (_get(item, key, str, file, at) for key in ("signal", "risk"))
  return f"{signal}, {risk} {_number(item, 'alpha', file, at, high=1.0):g}"


def _value(item: Json, metric: Metric, file: Path, at: str) -> float:
  low, high = (0.0, 1.0) if metric.unit == "%" else (-LARGEST, LARGEST)
  return _number(item, metric.name, file, at, low=low, high=high)


def _interval(
  item: Json, metric: Metric, value: float, n: int, file: Path, at: str
) -> tuple[float, float] | None:
  """The interval that the row has, or that of a rate, whose n is all it takes."""
  stored = _get(item, "intervals", dict, file, at) if item.get("intervals") is not None else {}
  if metric.name not in stored:
    return intervals.binomial(value, n) if metric.interval == "binomial" else None
  ends, where = stored[metric.name], f"{at}intervals."
  if not isinstance(ends, list) or len(ends) != 2:
    raise _bad(file, where + metric.name, ends, "two numbers, the low end and the high one")
  low, high = (_number({metric.name: end}, metric.name, file, where, low=-LARGEST) for end in ends)
  if low > high:
    raise _bad(file, where + metric.name, ends, "the low end first")
  return low, high


def tables_of(
  data: Json, rows: Sequence[EvalRow], file: Path
) -> tuple[tuple[str, ...], dict[Key, Int[np.ndarray, "k k"]]]:
  """Returns the names of the classes and the tables "confusion" of the rows that have one.

  Args:
    data: of the file.
    rows: read from it, in its order.
    file: for errors.

  Raises:
    UserError: a table that is no square of counts, whose counts are not those of the row, or of other classes.
  """
  confusions: dict[Key, np.ndarray] = {}
  for i, item in enumerate(data["rows"]):
    if item.get("confusion") is None:
      continue
    at, row = f"rows[{i}].", rows[i]
    counts = np.array(_get(item, "confusion", list, file, at), object)
    square = counts.ndim == 2 and counts.shape[0] == counts.shape[1]
    if not square or not all(type(n) is int and n >= 0 for n in counts.flat):
      raise _bad(file, f"{at}confusion", "no table", "k lists of k counts")
    counts = counts.astype(np.int64)
    rest = item.get("unlabelled", 0)
    if counts.sum() + rest != row.n:
      raise _bad(file, f"{at}confusion", f"a table of {counts.sum()}", f"counts of {row.n} images")
    confusions[key_of(row)] = counts
  sizes = {len(counts) for counts in confusions.values()}
  if not sizes:
    return (), {}
  if len(sizes) > 1:
    raise _bad(file, "classes", f"of {sorted(sizes)} rows", "one name for each row of each table")
  return _names(data, max(sizes), file), confusions


def _names(data: Json, k: int, file: Path) -> tuple[str, ...]:
  """The names of k classes; their numbers where the file has none."""
  classes = data.get("classes") or [str(number) for number in range(k)]
  named = isinstance(classes, list) and all(isinstance(name, str) for name in classes)
  if not named or len(classes) != k:
    raise _bad(file, "classes", f"of {k} rows", "one name for each row of each table")
  return tuple(classes)


def segments_of(
  data: Json, rows: Sequence[EvalRow], file: Path
) -> tuple[dict[Key, tuple[float | None, ...]], tuple[int, ...], dict[Key, tuple[Path, ...]]]:
  """Returns what rows of segmentation hold of classes: `ious`, `pixels` and `samples` of a `ReportRun`.

  Raises:
    UserError: see `of_classes` and `samples_of`.
  """
  ious, pixels = of_classes(data, rows, file, "class_iou", "class_pixels")
  return ious, pixels, samples_of(data, rows, file, "class_iou", "png")


def of_classes(
  data: Json, rows: Sequence[EvalRow], file: Path, key: str, counted: str
) -> tuple[dict[Key, tuple[float | None, ...]], tuple[int, ...]]:
  """Returns the values of the classes of the rows that have them, and what there is of each class.

  Args:
    data: of the file.
    rows: read from it, in its order.
    file: for errors.
    key: of the values.
    counted: of the counts.

  Raises:
    UserError: lists that are not of one length, values that cannot be.
  """
  found: dict[Key, tuple[float | None, ...]] = {}
  all_counts: tuple[int, ...] = ()
  for i, (item, row) in enumerate(zip(data["rows"], rows, strict=True)):
    if item.get(key) is None:
      continue
    at = f"rows[{i}]."
    values, counts = (_get(item, name, list, file, at) for name in (key, counted))
    if not all(v is None or ((type(v) is float or v in (0, 1)) and 0 <= v <= 1) for v in values):
      raise _bad(file, f"{at}{key}", values, "numbers from 0 to 1, or null")
    if not all(type(n) is int and n >= 0 for n in counts) or len(counts) != len(values):
      raise _bad(file, f"{at}{counted}", counts, f"as many counts as {key} has")
    if all_counts and all_counts != tuple(counts):
      raise _bad(file, f"{at}{counted}", counts, "those of the other rows")
    all_counts, found[key_of(row)] = tuple(counts), tuple(values)
  return found, all_counts


def samples_of(
  data: Json, rows: Sequence[EvalRow], file: Path, key: str, suffix: str
) -> dict[Key, tuple[Path, ...]]:
  """Returns the pictures that rows name, of those rows that have `key`.

  Raises:
    UserError: samples that are no names of pictures.
  """
  samples: dict[Key, tuple[Path, ...]] = {}
  for i, (item, row) in enumerate(zip(data["rows"], rows, strict=True)):
    if item.get(key) is None:
      continue
    names = item.get("samples") or []
    # Names come from a file that may be anybody's: they stay in the folder.
    named = isinstance(names, list) and all(isinstance(name, str) for name in names)
    if not named or not all(re.fullmatch(rf"\d+_[\w=]+\.{suffix}", name) for name in names):
      raise _bad(file, f"rows[{i}].samples", names, f"names such as 0_15x20.{suffix}")
    samples[key_of(row)] = tuple(samples_folder(file) / name for name in names)
  return samples


def images_of(
  data: Json, rows: Sequence[EvalRow], file: Path
) -> dict[Key, tuple[ImageSample, ...]]:
  """Returns the samples of rows of classification that have some.

  Raises:
    UserError: samples that are not described as `evaluators.image_samples` does, or not of the same images in all rows.
  """
  found: dict[Key, tuple[ImageSample, ...]] = {}
  for i, (item, row) in enumerate(zip(data["rows"], rows, strict=True)):
    if not item.get("samples"):
      continue
    at = f"rows[{i}].samples"
    samples = _get(item, "samples", list, file, f"rows[{i}].")
    made = tuple(_image(one, file, f"{at}[{k}]") for k, one in enumerate(samples))
    first = next(iter(found.values()), made)
    if [(one.file, one.label) for one in made] != [(one.file, one.label) for one in first]:
      raise _bad(file, at, "of other images", "the images of the other rows")
    found[key_of(row)] = made
  return found


def _image(item: object, file: Path, at: str) -> ImageSample:
  if not isinstance(item, dict):
    raise _bad(file, at, item, "an object")
  numbers = {key: _get(item, key, int, file, f"{at}.") for key in ("id", "label", "predicted")}
  for key, number in numbers.items():
    if isinstance(number, bool) or not -(key == "label") <= number <= LARGEST:
      raise _bad(file, f"{at}.{key}", number, "a number of an image or a class")
  label = None if numbers["label"] < 0 else numbers["label"]
  picture = samples_folder(file) / f"{numbers['id']}.jpg"
  return ImageSample(
    picture, label, numbers["predicted"], _get(item, "right", bool, file, f"{at}.")
  )


def _parts(item: Json, file: Path, at: str) -> dict[str, float]:
  """The average precisions of boxes of some areas and of groups of classes, "ap_small" and "ap50_rare"."""
  names = [name for name in item if re.match(r"ap(50)?_", name)]
  return {name: _number(item, name, file, at, high=1.0) for name in names}


def samples_folder(file: Path) -> Path:
  """Where the pictures are that the rows of a file name, as `evaluators.results` writes them."""
  return file.with_name(f"{file.stem}_samples")


def _row_order(row: EvalRow) -> tuple[tuple[int, int], tuple[int, int]]:
  return order(row.patch), order(row.seqhw)


def _trained(data: Json, file: Path) -> frozenset[tuple[int, int]] | None:
  if data.get("trained_seqhw") is None:
    return None
  try:
    return frozenset(sides(size) for size in _get(data, "trained_seqhw", list, file))
  except ValueError as error:
    if isinstance(error, UserError):
      raise
    raise _bad(file, "trained_seqhw", data["trained_seqhw"], 'sizes such as 8 or "8x6"') from error


def _distinct(names: Sequence[str], folders: Sequence[Path]) -> list[str]:
  """Adds to names that occur twice the shortest end of their folders that tells them apart."""
  shared = {name for name, count in Counter(names).items() if count > 1}
  for depth in range(1, max(len(folder.parts) for folder in folders) + 1):
    ends = ["/".join(folder.parts[-depth:]) for folder in folders]
    full = [f"{n} ({end})" if n in shared else n for n, end in zip(names, ends, strict=True)]
    if len(set(full)) == len(full):
      return full
  # Two eval.json files of one folder under other names: only a number is left to tell them apart.
  return [f"{name} #{i}" if name in shared else name for i, name in enumerate(names, 1)]


def _get(data: Json, key: str, kind: type, file: Path, at: str = "") -> Any:
  if key not in data:
    raise UserError(f"{file}: the key {at + key!r} is missing; run `flexivit eval` again.")
  if not isinstance(data[key], kind):
    raise _bad(file, at + key, data[key], f"a {kind.__name__}")
  return data[key]


def _number(
  data: Json,
  key: str,
  file: Path,
  at: str,
  *,
  low: float = 0.0,
  high: float = LARGEST,
) -> float:
  value = _get(data, key, object, file, at)
  if isinstance(value, bool) or not isinstance(value, int | float):
    raise _bad(file, at + key, value, "a number")
  if not low <= value <= high:
    raise _bad(file, at + key, value, f"a finite number from {low:g} to {high:g}")
  return float(value)


def _count(data: Json, key: str, file: Path, at: str) -> int:
  value = _get(data, key, object, file, at)
  if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= LARGEST:
    raise _bad(file, at + key, value, "a whole number from 1")
  return value


def _size(data: Json, key: str, file: Path, at: str) -> SizeText:
  value = _get(data, key, object, file, at)
  try:
    h, w = sides(value)
  except ValueError as error:
    raise _bad(file, at + key, value, 'a size such as 8 or "8x6"') from error
  return h if h == w else f"{h}x{w}"


def _bad(file: Path, key: str, got: object, expected: str) -> UserError:
  return UserError(f"{file}: {key} is {got!r}; expected {expected}.")
