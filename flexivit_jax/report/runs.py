"""Read and check the eval.json files of runs."""

import functools
import itertools
import json
import math
from collections import Counter
from collections.abc import Sequence, Set
from pathlib import Path
from typing import get_args

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
from flexivit_jax.report import contents, fields
from flexivit_jax.report.fields import Json
from flexivit_jax.report.rows import EvalRow, ReportRun, key_of, order, sides
from flexivit_jax.running import ledger

FACTS = ("dataset", "split", "step", "params", "device", "jax", "command")


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
  name = " ".join(fields.get(data, "name", str, file).split())
  if not name:
    raise fields.bad(file, "name", "", "some text")
  items = fields.get(data, "rows", list, file)
  if not items:
    raise fields.bad(
      file, "rows", items, "one row a patch size at least; run `flexivit eval` again"
    )
  metrics, needed = _metrics(data, items, file)
  names = [one.name for one in metrics]
  if metric is not None and metric not in names:
    raise errors.unknown(f"metric of {file}", metric, names)
  drawn = metrics[0 if metric is None else names.index(metric)]
  read_row = functools.partial(_row, file=file, metrics=metrics, needed={*needed, drawn.name})
  rows = [read_row(item, where=f"rows[{i}]", drawn=drawn) for i, item in enumerate(items)]
  classes, confusions = contents.tables_of(data, rows, file)
  ious, pixels, samples = contents.segments_of(data, rows, file)
  aps, boxes = contents.of_classes(data, rows, file, "class_ap", "class_boxes")
  parts = {
    key_of(row): contents.parts_of(data["rows"][i], file, f"rows[{i}].")
    for i, row in enumerate(rows)
  }
  samples |= contents.samples_of(data, rows, file, "class_ap", "jpg")
  looked_at = {} if ious or aps else contents.images_of(data, rows, file)
  rows.sort(key=_row_order)
  _check_sizes(rows, file)
  facts = {key: str(data[key]) for key in FACTS if data.get(key) is not None}
  if spent := ledger.shares(file.parent / "ledger.json"):
    facts["time"] = ledger.text(spent)
  if ious or aps:
    classes = contents.names_of(data, len(pixels or boxes), file)
  elif looked_at and not confusions and data.get("classes"):
    classes = contents.names_of(data, len(fields.get(data, "classes", list, file)), file)
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
    fields.get(data, "images_sha256", str, file) if "images_sha256" in data else None,
  )


def _check_sizes(rows: Sequence[EvalRow], file: Path) -> None:
  """Raises a UserError unless each size has one row."""
  again = [k for k, count in Counter(map(key_of, rows)).items() if count > 1]
  if again:
    patch, seqhw, depth = again[0]
    only = "" if depth is None else f" and depth {depth}"
    raise UserError(f"{file}: patch {patch} at seqhw {seqhw}{only} has more than one row.")


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
  stated = fields.get(data, "metrics", list, file)
  metrics = tuple(_metric(item, f"metrics[{i}]", file) for i, item in enumerate(stated))
  names = [metric.name for metric in metrics]
  if not metrics or len(set(names)) < len(names):
    raise fields.bad(file, "metrics", names, "one metric or more, each with a name of its own")
  return metrics, names


def _metric(item: object, where: str, file: Path) -> Metric:
  if not isinstance(item, dict):
    raise fields.bad(file, where, item, "an object")
  texts = {key: item.get(key, "") for key in ("name", *TEXTS)}
  for key, text in texts.items():
    if not isinstance(text, str) or (key == "name" and not text):
      raise fields.bad(file, f"{where}.{key}", text, "a text")
  better, interval = item.get("better"), item.get("interval")
  if better not in get_args(Better):
    raise fields.bad(file, f"{where}.better", better, "'max' or 'min'")
  if interval not in (None, *get_args(Interval)):
    raise fields.bad(file, f"{where}.interval", interval, "'binomial', 'bootstrap' or null")
  if interval == "binomial" and texts["unit"] != "%":
    raise fields.bad(
      file, f"{where}.unit", texts["unit"], "'%': a binomial interval is of a fraction"
    )
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
    raise fields.bad(file, where, item, "an object")
  at = where + "."
  values = {
    metric.name: _value(item, metric, file, at)
    for metric in metrics
    if metric.name in needed or item.get(metric.name) is not None
  }
  n = fields.count(item, "n", file, at)
  return EvalRow(
    seqhw=fields.size(item, "seqhw", file, at),
    patch=fields.size(item, "patch", file, at),
    tokens=fields.count(item, "tokens", file, at),
    gflops=fields.number(item, "gflops", file, at, low=1e-12),
    ms=None if item.get("ms") is None else fields.number(item, "ms", file, at),
    n=n,
    depth=None if item.get("depth") is None else fields.count(item, "depth", file, at),
    value=values[drawn.name],
    interval=_interval(item, drawn, values[drawn.name], n, file, at),
    measured=tuple(values.items()),
  )


def _cascades(
  data: Json, rows: Sequence[EvalRow], file: Path, drawn: Metric
) -> tuple[EvalRow, ...]:
  """Returns what `flexivit eval --cascade` measured, by GFLOPs; nothing where another metric is drawn."""
  items = fields.get(data, "cascades", list, file) if "cascades" in data else []
  if drawn.name != TOP1.name:
    return ()
  found = (_cascade(item, rows, file, f"cascades[{i}].", drawn) for i, item in enumerate(items))
  return tuple(sorted(found, key=lambda row: row.gflops))


def _cascade(item: object, rows: Sequence[EvalRow], file: Path, at: str, drawn: Metric) -> EvalRow:
  if not isinstance(item, dict):
    raise fields.bad(file, at[:-1], item, "an object")
  stages = [
    fields.size({"sizes": size}, "sizes", file, at)
    for size in fields.get(item, "sizes", list, file, at)
  ]
  shares = fields.get(item, "shares", list, file, at)
  if not stages or len(shares) != len(stages):
    raise fields.bad(file, at + "shares", shares, f"a share for each of the sizes {stages}")
  parts = [fields.number({"shares": s}, "shares", file, at, high=1.0) for s in shares]
  tokens = itertools.accumulate(math.prod(sides(size)) for size in stages)
  value, n = _value(item, drawn, file, at), fields.count(item, "n", file, at)
  patches = {row.seqhw: row.patch for row in rows}
  return EvalRow(
    seqhw=stages[-1],
    patch=patches.get(stages[-1], stages[-1]),
    tokens=round(sum(t * s for t, s in zip(tokens, parts, strict=True))),
    gflops=fields.number(item, "gflops", file, at, low=1e-12),
    ms=fields.number(item, "ms", file, at),
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
  signal, risk = (fields.get(item, key, str, file, at) for key in ("signal", "risk"))
  return f"{signal}, {risk} {fields.number(item, 'alpha', file, at, high=1.0):g}"


def _value(item: Json, metric: Metric, file: Path, at: str) -> float:
  low, high = (0.0, 1.0) if metric.unit == "%" else (-fields.LARGEST, fields.LARGEST)
  return fields.number(item, metric.name, file, at, low=low, high=high)


def _interval(
  item: Json, metric: Metric, value: float, n: int, file: Path, at: str
) -> tuple[float, float] | None:
  """The interval that the row has, or that of a rate, whose n is all it takes."""
  stored = (
    fields.get(item, "intervals", dict, file, at) if item.get("intervals") is not None else {}
  )
  if metric.name not in stored:
    return intervals.binomial(value, n) if metric.interval == "binomial" else None
  ends, where = stored[metric.name], f"{at}intervals."
  if not isinstance(ends, list) or len(ends) != 2:
    raise fields.bad(file, where + metric.name, ends, "two numbers, the low end and the high one")
  low, high = (
    fields.number({metric.name: end}, metric.name, file, where, low=-fields.LARGEST) for end in ends
  )
  if low > high:
    raise fields.bad(file, where + metric.name, ends, "the low end first")
  return low, high


def _row_order(row: EvalRow) -> tuple[tuple[int, int], tuple[int, int]]:
  return order(row.patch), order(row.seqhw)


def _trained(data: Json, file: Path) -> frozenset[tuple[int, int]] | None:
  if data.get("trained_seqhw") is None:
    return None
  try:
    return frozenset(sides(size) for size in fields.get(data, "trained_seqhw", list, file))
  except ValueError as error:
    if isinstance(error, UserError):
      raise
    raise fields.bad(
      file, "trained_seqhw", data["trained_seqhw"], 'sizes such as 8 or "8x6"'
    ) from error


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
