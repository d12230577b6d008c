"""Read and check the eval.json files of runs."""

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from flexivit_jax.errors import UserError
from flexivit_jax.running import ledger

SizeText = int | str  # tokens or pixels of a side; "HxW" where the sides differ
Key = tuple[SizeText, SizeText, int | None]  # (patch, seqhw, depth)
Json = dict[str, Any]  # a JSON object
FACTS = ("dataset", "split", "step", "params", "device", "jax", "command")


class EvalRow(NamedTuple):
  """One evaluation of the first `depth` blocks (None: all).

  `gflops` are 2 x MACs / 1e9 of one image, `ms` its median time, `n` images.
  """

  seqhw: SizeText
  patch: SizeText
  tokens: int
  gflops: float
  ms: float | None
  top1: float
  loss: float
  n: int
  top5: float | None
  depth: int | None
  top1_macro: float | None = None


class ReportRun(NamedTuple):
  """One curve; `trained` holds the grids `(h, w)` of its training, None if unknown.

  `confusions` are the counts of class and predicted class of rows that have them, by `key_of`; `classes` their names.
  """

  name: str
  rows: tuple[EvalRow, ...]
  trained: frozenset[tuple[int, int]] | None
  facts: dict[str, str]
  classes: tuple[str, ...] = ()
  confusions: Mapping[Key, Int[np.ndarray, "k k"]] = MappingProxyType({})


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


def load(paths: Sequence[Path]) -> list[ReportRun]:
  """Returns the runs in the given order, each with a name of its own; one for each depth that was evaluated.

  Raises:
    UserError: no run, the same run twice, or an eval.json that `read` refuses.
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
    for run in by_depth(read(path))
  ]
  names = _distinct([run.name for run, _ in loaded], [folder for _, folder in loaded])
  return [run._replace(name=name) for (run, _), name in zip(loaded, names, strict=True)]


def by_depth(run: ReportRun) -> list[ReportRun]:
  """Returns the run as one curve for each depth, which its name then says; as it is where all blocks ran."""
  depths = dict.fromkeys(row.depth for row in run.rows)
  return [
    run._replace(
      name=run.name if depth is None else f"{run.name} depth={depth}",
      rows=tuple(row for row in run.rows if row.depth == depth),
    )
    for depth in sorted(depths, key=lambda depth: depth or 0)
  ]


def read(path: Path) -> ReportRun:
  """Reads one run.

  Args:
    path: the run folder, or its eval.json: `{"name": str, "rows": [Row, ...]}` and, if known,
      "trained_seqhw" and the FACTS; "ms" may be null, "ms", "top5" and "depth" may be absent.

  Raises:
    UserError: the file is missing, is not strict JSON, lacks a key or has an impossible value.
  """
  file = path if path.is_file() else path / "eval.json"
  data = _parse(file)
  name = " ".join(_get(data, "name", str, file).split())
  if not name:
    raise _bad(file, "name", "", "some text")
  items = _get(data, "rows", list, file)
  if not items:
    raise _bad(file, "rows", items, "one row a patch size at least; run `flexivit eval` again")
  rows = sorted((_row(item, f"rows[{i}]", file) for i, item in enumerate(items)), key=_row_order)
  again = [k for k, count in Counter(map(key_of, rows)).items() if count > 1]
  if again:
    patch, seqhw, depth = again[0]
    only = "" if depth is None else f" and depth {depth}"
    raise UserError(f"{file}: patch {patch} at seqhw {seqhw}{only} has more than one row.")
  facts = {key: str(data[key]) for key in FACTS if data.get(key) is not None}
  if spent := ledger.shares(file.parent / "ledger.json"):
    facts["time"] = ledger.text(spent)
  classes, confusions = tables_of(data, file)
  return ReportRun(name, tuple(rows), _trained(data, file), facts, classes, confusions)


def to_json(run: ReportRun) -> Json:
  """Returns `{"name", "rows"}`; "top5", "depth" and "top1_macro" only where they were given."""
  rows = [row._asdict() for row in run.rows]
  optional = ("top5", "depth", "top1_macro")
  return {
    "name": run.name,
    "rows": [{k: v for k, v in row.items() if k not in optional or v is not None} for row in rows],
  }


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


def _row(item: object, where: str, file: Path) -> EvalRow:
  if not isinstance(item, dict):
    raise _bad(file, where, item, "an object")
  at = where + "."
  return EvalRow(
    seqhw=_size(item, "seqhw", file, at),
    patch=_size(item, "patch", file, at),
    tokens=_count(item, "tokens", file, at),
    gflops=_number(item, "gflops", file, at, low=1e-12),
    ms=None if item.get("ms") is None else _number(item, "ms", file, at),
    top1=_number(item, "top1", file, at, high=1.0),
    loss=_number(item, "loss", file, at, low=-math.inf),
    n=_count(item, "n", file, at),
    top5=None if item.get("top5") is None else _number(item, "top5", file, at, high=1.0),
    depth=None if item.get("depth") is None else _count(item, "depth", file, at),
    top1_macro=None
    if item.get("top1_macro") is None
    else _number(item, "top1_macro", file, at, high=1.0),
  )


def tables_of(data: Json, file: Path) -> tuple[tuple[str, ...], dict[Key, Int[np.ndarray, "k k"]]]:
  """Returns the names of the classes and the tables "confusion" of the rows that have one.

  Raises:
    UserError: a table that is no square of counts, whose counts are not those of the row, or of other classes.
  """
  confusions: dict[Key, np.ndarray] = {}
  for i, item in enumerate(data["rows"]):
    if item.get("confusion") is None:
      continue
    at, row = f"rows[{i}].", _row(item, f"rows[{i}]", file)
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
  k = max(sizes)
  classes = data.get("classes") or [str(number) for number in range(k)]
  named = isinstance(classes, list) and all(isinstance(name, str) for name in classes)
  if sizes != {k} or not named or len(classes) != k:
    raise _bad(file, "classes", f"of {sorted(sizes)} rows", "one name for each row of each table")
  return tuple(classes), confusions


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
  high: float = math.inf,
) -> float:
  value = _get(data, key, object, file, at)
  if isinstance(value, bool) or not isinstance(value, int | float):
    raise _bad(file, at + key, value, "a number")
  if not math.isfinite(value) or not low <= value <= high:
    raise _bad(file, at + key, value, f"a finite number from {low:g} to {high:g}")
  return float(value)


def _count(data: Json, key: str, file: Path, at: str) -> int:
  value = _get(data, key, object, file, at)
  if isinstance(value, bool) or not isinstance(value, int) or value < 1:
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
