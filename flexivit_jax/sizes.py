"""Patch sizes as text: the grammar of `--seqhw`. Imports no JAX, so that a command line is read at once."""

from flexivit_jax import errors


def parse(text: str) -> tuple[int | tuple[int, int], ...]:
  """Parses "5,8,4x6" as (5, 8, (4, 6)): tokens per side, or (rows, columns) of tokens.

  Raises:
    UserError: if a part is neither a positive integer nor a pair of them.
  """
  return tuple(_parse_one(part) for part in text.split(","))


def _parse_one(part: str) -> int | tuple[int, int]:
  numbers = part.split("x")
  if len(numbers) > 2 or not all(n.isascii() and n.isdigit() and int(n) for n in numbers):
    raise errors.UserError(f"--seqhw: {part!r} is no size; expected 'all', or e.g. 5,8,15 or 4x6.")
  return int(part) if len(numbers) == 1 else (int(numbers[0]), int(numbers[1]))
