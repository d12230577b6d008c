"""Patch sizes: their types, the grammar of `--seqhw`, and how they are named. Imports no JAX."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from flexivit_jax import errors

Size = tuple[int, int]  # (height, width) of anything: pixels, a patch, a grid of tokens
SeqHw = int | Size  # tokens per side, or (per column, per row)
SizeArgs = dict[str, Any]  # the model's static arguments: {"seqhw": 8, "depth": 6}, {"stride": 3}
Named = Mapping[str, Any]  # static arguments, or a row or record that holds them


class Patch(NamedTuple):
  """A size that is said in pixels of a patch, where a `SeqHw` says tokens: `size_args` and `size_text` know it."""

  height: int
  width: int


SizeKey = tuple[tuple[str, Any], ...]  # a hashable SizeArgs, see `size_key`


# --- text -> sizes ---


def parse(
  text: str, every: Iterable[SeqHw] = (), lacking: str = "it names no sizes here"
) -> tuple[SeqHw, ...]:
  """Parses "5,8,4x6" as (5, 8, (4, 6)): tokens per side, or (rows, columns) of tokens; "all" is `every`.

  Args:
    text: what stands after `--seqhw`.
    every: the sizes that "all" stands for; none where it stands for nothing.
    lacking: why there are none, for the error.

  Raises:
    UserError: if an entry is neither a positive integer nor a pair of them; "all" where `every` is empty.
  """
  if text != "all":
    return tuple(_parse_entry(entry) for entry in text.split(","))
  if not (sizes := tuple(every)):
    raise errors.UserError(f"--seqhw=all: {lacking}; give them, e.g. --seqhw=5,8.")
  return sizes


def parse_one(text: str, why: str) -> SeqHw:
  """As `parse`, for exactly one size; `why` says why there is only one.

  Raises:
    UserError: several sizes, "all", or what `parse` refuses.
  """
  sizes = () if text == "all" else parse(text)
  if len(sizes) != 1:
    raise errors.UserError(f"--seqhw={text}: {why}; give one size, e.g. --seqhw=8 or 4x6.")
  return sizes[0]


def parse_patches(text: str) -> tuple[Patch, ...]:
  """Parses "16,8x10", pixels a side of a patch, or (height, width).

  Raises:
    UserError: an entry is neither a positive integer nor a pair of them.
  """
  given = (_parse_entry(entry, "--patch", "8,16 or 8x10") for entry in text.split(","))
  return tuple(Patch(p, p) if isinstance(p, int) else Patch(*p) for p in given)


def from_text(size: int | str) -> SeqHw:
  """The inverse of `size_text`: 8 as it is, "4x6" as (4, 6)."""
  return _parse_entry(str(size))


def _parse_entry(
  entry: str, option: str = "--seqhw", expected: str = "'all', or e.g. 5,8,15 or 4x6"
) -> SeqHw:
  numbers = [number.strip() for number in entry.split("x")]
  if len(numbers) > 2 or not all(n.isascii() and n.isdigit() and int(n) for n in numbers):
    raise errors.UserError(f"{option}: {entry!r} is no size; expected {expected}.")
  return int(numbers[0]) if len(numbers) == 1 else (int(numbers[0]), int(numbers[1]))


def trained(record: Named) -> tuple[SeqHw, ...]:
  """The sizes at which a model was trained, as the record of its weights says; () where it does not."""
  drawn = record.get("trained", {})
  sizes = drawn.get("seqhw") or drawn.get("grid_hw") or ()
  return tuple((s[0], s[1]) if isinstance(s, (list, tuple)) else int(s) for s in sizes)


# --- sizes -> arguments of the model ---


def size_args(size: SeqHw | Patch) -> SizeArgs:
  """The model's static argument for a size: {"seqhw": 8}, {"grid_hw": (4, 6)} or {"patch_hw": (16, 16)}."""
  if isinstance(size, Patch):
    return {"patch_hw": tuple(size)}
  return {"grid_hw": tuple(size)} if isinstance(size, (tuple, list)) else {"seqhw": int(size)}


def size_key(size: Named) -> SizeKey:
  """A hashable, ordered form of static arguments."""
  return tuple(sorted(size.items()))


# --- sizes -> text ---


def size_name(size: Named) -> str:
  """Static arguments as text: "seqhw=8", "depth=6 grid_hw=4x8", or "default size" without any."""
  text = lambda v: "x".join(map(str, v)) if isinstance(v, tuple) else str(v)  # noqa: E731
  return " ".join(f"{k}={text(v)}" for k, v in sorted(size.items())) or "default size"


def size_text(size: SeqHw | Patch) -> int | str:
  """An integer as it is, a pair as "HxW"; a patch as "p16" or "p16x12"."""
  if isinstance(size, Patch):
    return f"p{size.height}" if size.height == size.width else f"p{size.height}x{size.width}"
  return f"{size[0]}x{size[1]}" if isinstance(size, (tuple, list)) else int(size)


def size_label(row: Named) -> str:
  """The size of an evaluation's row in a few characters: "8", "8x6", "8 depth=3"."""
  return " ".join([str(row["seqhw"]), *(f"{k}={row[k]}" for k in ("stride", "depth") if k in row)])
