"""What the numbers and colours in the file of a mask stand for: classes, or no class."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32, Int64, Integer

from flexivit_jax.errors import UserError, unknown
from flexivit_jax.specs import NO_CLASS

# The 19 classes of Cityscapes that are evaluated, by training id, with their label ids in *_labelIds.png.
# Source: Cityscapes' definition of its labels, helpers/labels.py of mcordts/cityscapesScripts.
CITYSCAPES = {
  "road": 7, "sidewalk": 8, "building": 11, "wall": 12, "fence": 13, "pole": 17, "traffic light": 19,
  "traffic sign": 20, "vegetation": 21, "terrain": 22, "sky": 23, "person": 24, "rider": 25, "car": 26, "truck": 27,
  "bus": 28, "train": 31, "motorcycle": 32, "bicycle": 33,
}  # fmt: skip
_LABEL_IDS = 34  # 0 to 33
_SHOWN = 12  # colours in a message


class Convention(NamedTuple):
  """What the numbers of masks stand for.

  Attributes:
    table: number in the file -> class, or NO_CLASS; a number beyond it is an error. None: each is one too high, and 0
      is no class.
    names: of the classes; None: those of the data.
  """

  table: tuple[int, ...] | None
  names: tuple[str, ...] | None


def _train_ids() -> tuple[int, ...]:
  ids = list(CITYSCAPES.values())
  return tuple(ids.index(n) if n in ids else NO_CLASS for n in range(_LABEL_IDS))


LABELS = {
  "zero_is_ignore": Convention(None, None),
  "train_ids": Convention(_train_ids(), tuple(CITYSCAPES)),
}


def convention(labels: str) -> Convention:
  """Returns a convention by its name; a UserError for an unknown one."""
  if labels not in LABELS:
    raise unknown("labels", labels, LABELS)
  return LABELS[labels]


def from_numbers(
  numbers: Int32[np.ndarray, "h w"], ignore: int, labels: str | None = None
) -> Int32[np.ndarray, "h w"]:
  """Returns the classes of a mask, and NO_CLASS.

  Args:
    numbers: as they are in the file.
    ignore: the number of no class.
    labels: a name in `LABELS`; None: numbers are classes.

  Raises:
    UserError: an unknown name; a number that the convention does not have.
  """
  none = numbers == ignore
  if labels is None:
    return np.where(none, NO_CLASS, numbers)
  table = convention(labels).table
  if table is None:
    return np.where(none | (numbers == 0), NO_CLASS, numbers - 1)
  bad = numbers[~none & ((numbers < 0) | (numbers >= len(table)))]
  if bad.size:
    raise UserError(
      f"the mask has the number {bad[0]}; labels={labels!r} expects 0..{len(table) - 1}, or {ignore} for no class"
    )
  return np.where(none, NO_CLASS, np.asarray(table, np.int32)[np.where(none, 0, numbers)])


def from_colors(
  colors: Int32[np.ndarray, "h w"], table: Integer[np.ndarray, "m 2"]
) -> Int32[np.ndarray, "h w"]:
  """Returns the classes of a mask by its colours.

  Args:
    colors: 0xRRGGBB.
    table: rows of a colour, ascending, and its class or NO_CLASS.

  Raises:
    UserError: a colour that the table does not have; shows all that the mask has.
  """
  known, classes = table[:, 0], table[:, 1].astype(np.int32)
  place = np.minimum(np.searchsorted(known, colors), len(known) - 1)
  bad = known[place] != colors
  if bad.any():
    raise UserError(
      f"{bad.mean():.2%} of the mask's pixels have colours that colors= does not name: {shown(colors[bad])}; name them,"
      " with the names of classes, or of what is no class"
    )
  return classes[place]


def shown(colors: Integer[np.ndarray, "..."]) -> str:
  """Returns the colours 0xRRGGBB as text, the most frequent first, with their shares."""
  values, counts = np.unique(colors, return_counts=True)
  order = np.argsort(-counts, kind="stable")
  texts = [f"{rgb(int(values[i]))} {counts[i] / counts.sum():.1%}" for i in order[:_SHOWN]]
  more = f" and {len(values) - _SHOWN:,} more" if len(values) > _SHOWN else ""
  return ", ".join(texts) + more


def rgb(color: int) -> tuple[int, int, int]:
  """Returns red, green and blue of 0xRRGGBB."""
  return color >> 16, color >> 8 & 255, color & 255


def color_table(
  colors: Mapping[str, Sequence[tuple[int, int, int]]], names: Sequence[str]
) -> Int64[np.ndarray, "m 2"]:
  """Returns the table that `from_colors` takes.

  Args:
    colors: name -> colours.
    names: of the classes; a colour of another name counts for no class.

  Raises:
    UserError: a colour of two names, a class without a colour.
  """
  classes = {name: k for k, name in enumerate(names)}
  owner: dict[int, str] = {}
  for name, values in colors.items():
    for red, green, blue in values:
      color = red << 16 | green << 8 | blue
      if owner.setdefault(color, name) != name:
        raise UserError(
          f"colors: {rgb(color)} is both {owner[color]!r} and {name!r}; expected one name for each colour."
        )
  missing = [name for name in names if name not in colors]
  if missing:
    raise UserError(
      f"colors name no colour of the class{'es' * (len(missing) > 1)} {', '.join(missing)}; they name"
      f" {', '.join(colors)}."
    )
  rows = sorted((color, classes.get(name, NO_CLASS)) for color, name in owner.items())
  return np.array(rows, np.int64).reshape(-1, 2)
