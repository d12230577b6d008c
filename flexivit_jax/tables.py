"""Tables as plain text, the columns aligned."""

import itertools
from collections.abc import Sequence


def aligned(
  rows: Sequence[Sequence[str]],
  sides: str = ">",
  *,
  gap: str = "  ",
  least: Sequence[int] = (),
) -> list[str]:
  """Returns a line for each row, every column as wide as its widest cell.

  Args:
    rows: cells, equally many in each row; a heading is a row like the others.
    sides: "<" or ">" for each column, the side on which its cells stand; the last one also for those that follow.
    gap: what stands between two columns.
    least: widths that columns have at least.
  """
  lengths = (max(map(len, column)) for column in zip(*rows, strict=True))
  widths = [max(pair) for pair in itertools.zip_longest(lengths, least, fillvalue=0)]
  sides = sides.ljust(len(widths), sides[-1])[: len(widths)]
  places = [f"{side}{width}" for side, width in zip(sides, widths, strict=True)]
  return [
    gap.join(f"{cell:{place}}" for cell, place in zip(row, places, strict=True)).rstrip()
    for row in rows
  ]
