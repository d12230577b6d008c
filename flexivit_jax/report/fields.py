"""Values of an eval.json, each checked when it is read: the file may be anybody's."""

from pathlib import Path
from typing import Any

from flexivit_jax.errors import UserError
from flexivit_jax.report import rows

Json = dict[str, Any]  # a JSON object
LARGEST = 1e100  # beyond it an axis overflows


def get(data: Json, key: str, kind: type, file: Path, at: str = "") -> Any:
  """Returns the value of a key; `at` says in messages where the object stands in the file, such as "rows[2].".

  Raises:
    UserError: the key is missing, or its value is of another kind.
  """
  if key not in data:
    raise UserError(f"{file}: the key {at + key!r} is missing; run `flexivit eval` again.")
  if not isinstance(data[key], kind):
    raise bad(file, at + key, data[key], f"a {kind.__name__}")
  return data[key]


def number(
  data: Json,
  key: str,
  file: Path,
  at: str,
  *,
  low: float = 0.0,
  high: float = LARGEST,
) -> float:
  """Returns a finite number from `low` to `high`; see `get`."""
  value = get(data, key, object, file, at)
  if isinstance(value, bool) or not isinstance(value, int | float):
    raise bad(file, at + key, value, "a number")
  if not low <= value <= high:
    raise bad(file, at + key, value, f"a finite number from {low:g} to {high:g}")
  return float(value)


def count(data: Json, key: str, file: Path, at: str) -> int:
  """Returns a whole number from 1 up; see `get`."""
  value = get(data, key, object, file, at)
  if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= LARGEST:
    raise bad(file, at + key, value, "a whole number from 1")
  return value


def size(data: Json, key: str, file: Path, at: str) -> rows.SizeText:
  """Returns a size, 8 for "8x8"; see `get`."""
  value = get(data, key, object, file, at)
  try:
    h, w = rows.sides(value)
  except ValueError as error:
    raise bad(file, at + key, value, 'a size such as 8 or "8x6"') from error
  return h if h == w else f"{h}x{w}"


def bad(file: Path, key: str, got: object, expected: str) -> UserError:
  """Returns the error of a value: what was got, and what was expected."""
  return UserError(f"{file}: {key} is {got!r}; expected {expected}.")
