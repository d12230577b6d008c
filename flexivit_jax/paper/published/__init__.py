"""The paper's published numbers, and what others measured on its checkpoints, each with its source.

One CSV beside this file for each figure or table. The paper's own tables are in an appendix that was not to be had:
what is known of them is printed in figures ("printed"), read off them ("digitised", with its error), or quoted or
measured by others ("third party").
"""

import csv
import io
from importlib import resources
from typing import NamedTuple

from flexivit_jax import errors

KINDS = ("printed", "digitised", "third party")


class Value(NamedTuple):
  """A number.

  `patch` is in pixels of a square patch; None: of a model without patches, or of several sizes. `error`, in the unit,
  is what a digitised number may be off by, or half the range that a third party gives.
  """

  model: str
  setting: str
  dataset: str
  metric: str
  patch: int | None
  value: float
  unit: str
  error: float | None
  kind: str
  source: str
  note: str


COLUMNS = Value._fields


def names() -> list[str]:
  """The figures and tables there are."""
  files = resources.files(__name__).iterdir()
  return sorted(f.name.removesuffix(".csv") for f in files if f.name.endswith(".csv"))


def read(name: str) -> list[Value]:
  """Returns the numbers of one of `names()`.

  Raises:
    UserError: another name; a row that lacks a value, a unit, a source or a kind; that is digitised without an error,
      or printed with one.
  """
  if name not in names():
    raise errors.unknown("published item", name, names())
  text = (resources.files(__name__) / f"{name}.csv").read_text()
  rows = csv.DictReader(io.StringIO(text))
  if tuple(rows.fieldnames or ()) != COLUMNS:
    raise errors.UserError(f"{name}.csv has columns {rows.fieldnames}; expected {COLUMNS}.")
  return [_value(f"{name}.csv:{line}", row) for line, row in enumerate(rows, start=2)]


def _value(where: str, row: dict[str, str]) -> Value:
  empty = [key for key in COLUMNS if key not in ("patch", "error", "note") and not row[key]]
  if empty:
    raise errors.UserError(f"{where} lacks {', '.join(empty)}.")
  if row["kind"] not in KINDS:
    raise errors.unknown(f"{where}: kind", row["kind"], KINDS)
  if row["kind"] == ("printed" if row["error"] else "digitised"):
    raise errors.UserError(f"{where}: digitised numbers have an error, printed ones have none.")
  try:
    numbers = {
      "patch": int(row["patch"]) if row["patch"] else None,
      "value": float(row["value"]),
      "error": float(row["error"]) if row["error"] else None,
    }
  except ValueError as e:
    raise errors.UserError(f"{where}: {e}.") from e
  return Value(**{**row, **numbers})  # type: ignore[arg-type]
