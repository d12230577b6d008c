"""Patch sizes: their types, the grammar of `--seqhw`, and how they are named. Imports no JAX."""

from collections.abc import Mapping
from typing import Any

from flexivit_jax import errors

Size = tuple[int, int]  # (height, width) of anything: pixels, a patch, a grid of tokens
SeqHw = int | Size  # tokens per side, or (per column, per row)
SizeArgs = dict[str, Any]  # the model's static arguments: {"seqhw": 8, "depth": 6}, {"stride": 3}
SizeKey = tuple[tuple[str, Any], ...]  # a hashable SizeArgs, see `size_key`


# --- text -> sizes ---


def parse(text: str) -> tuple[SeqHw, ...]:
  """Parses "5,8,4x6" as (5, 8, (4, 6)): tokens per side, or (rows, columns) of tokens.

  Raises:
    UserError: if an entry is neither a positive integer nor a pair of them.
  """
  return tuple(_parse_one(entry) for entry in text.split(","))


def _parse_one(entry: str) -> SeqHw:
  numbers = entry.split("x")
  if len(numbers) > 2 or not all(n.isascii() and n.isdigit() and int(n) for n in numbers):
    raise errors.UserError(f"--seqhw: {entry!r} is no size; expected 'all', or e.g. 5,8,15 or 4x6.")
  return int(entry) if len(numbers) == 1 else (int(numbers[0]), int(numbers[1]))


# --- sizes -> arguments of the model ---


def size_args(size: SeqHw) -> SizeArgs:
  """The model's static argument for a size: {"seqhw": 8}, or {"grid_hw": (4, 6)}."""
  return {"grid_hw": tuple(size)} if isinstance(size, (tuple, list)) else {"seqhw": int(size)}


def size_key(size: Mapping[str, Any]) -> SizeKey:
  """A hashable, ordered form of static arguments."""
  return tuple(sorted(size.items()))


# --- sizes -> text ---


def size_name(size: Mapping[str, Any]) -> str:
  """Static arguments as text: "seqhw=8", "depth=6 grid_hw=4x8", or "default size" without any."""
  text = lambda v: "x".join(map(str, v)) if isinstance(v, tuple) else str(v)  # noqa: E731
  return " ".join(f"{k}={text(v)}" for k, v in sorted(size.items())) or "default size"


def size_text(size: SeqHw) -> int | str:
  """An integer as it is, a pair as "HxW"."""
  return f"{size[0]}x{size[1]}" if isinstance(size, (tuple, list)) else int(size)


def size_label(row: Mapping[str, Any]) -> str:
  """The size of an evaluation's row in a few characters: "8", "8x6", "8 depth=3"."""
  return " ".join([str(row["seqhw"]), *(f"{k}={row[k]}" for k in ("stride", "depth") if k in row)])
