"""Split strings such as `train[:99%]`, in the syntax and with the rounding of TFDS."""

import re
from collections.abc import Mapping
from typing import NamedTuple

from flexivit_jax.errors import UserError, unknown

_PART = re.compile(r"(?P<name>[\w-]+)(\[(?P<start>[^\[\]:]*):(?P<stop>[^\[\]:]*)\])?")
_BOUND = re.compile(r"(?P<value>-?\d+)|(?P<percent>-?\d+(\.\d+)?)%")
_SYNTAX = "expected e.g. 'train', 'train[:99%]', 'train[10%:20%]', 'train[:-100]', 'train+test'"


class Part(NamedTuple):
  """A run of examples `start <= i < stop` of the stored split `name`."""

  name: str
  start: int
  stop: int


def parse_split(split: str, sizes: Mapping[str, int]) -> tuple[Part, ...]:
  """Resolves a split string into runs of examples, in the order written.

  A percentage `p` of `n` examples is `round(p * n / 100)` (Python's rounding, half to even), as
  TFDS's "closest"; so `train[:a%]` and `train[a%:]` always divide the split.

  Args:
    split: one or more of `name`, `name[start:stop]`, joined by `+`; bounds are counts or percent.
    sizes: number of examples of each stored split.

  Raises:
    UserError: unknown split, syntax, a bound outside the split, or no example left.
  """
  parts = tuple(_parse_part(spec.strip(), split, sizes) for spec in split.split("+"))
  if not sum(p.stop - p.start for p in parts):
    raise UserError(f"Split {split!r} is empty; it selects no example of {dict(sizes)}.")
  return parts


def split_names(split: str) -> list[str]:
  """Names of the stored splits that a split string reads, without resolving it."""
  return [spec.partition("[")[0].strip() for spec in split.split("+")]


def _parse_part(spec: str, split: str, sizes: Mapping[str, int]) -> Part:
  match = _PART.fullmatch(spec)
  if match is None:
    raise UserError(f"Cannot read {spec!r} in split {split!r}; {_SYNTAX}.")
  name = match["name"]
  if name not in sizes:
    raise unknown("split", name, sizes)
  size = sizes[name]
  start = _bound(match["start"], 0, size, split)
  stop = _bound(match["stop"], size, size, split)
  return Part(name, start, max(start, stop))


def _bound(text: str | None, default: int, size: int, split: str) -> int:
  if not text:
    return default
  match = _BOUND.fullmatch(text)
  if match is None:
    raise UserError(f"Cannot read bound {text!r} in split {split!r}; {_SYNTAX}.")
  value = int(match["value"]) if match["value"] else round(float(match["percent"]) * size / 100)
  if abs(value) > size:
    raise UserError(f"Bound {text!r} in split {split!r} is outside its {size} examples.")
  return value + size if value < 0 else value
