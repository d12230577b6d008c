"""What the sources of annotated images share: rows, bad rows, boxes, and files found by name."""

import copy
import dataclasses
import functools
import logging
import math
import os
import pathlib
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, final

import numpy as np
from jaxtyping import Int64, Shaped

from flexivit_jax.data import images
from flexivit_jax.data.sources.base import Record, Source, select
from flexivit_jax.data.sources.folder import mixed, say_left_out
from flexivit_jax.data.walking import Tree
from flexivit_jax.errors import UserError, unknown

_LOG = logging.getLogger(__name__)
_SHOWN = 5  # bad rows of a long list
SLACK = 1.0  # pixels by which rounding may move an edge of a box outside the image

Corners = tuple[float, float, float, float]  # x0, y0, x1, y1
HW = tuple[int, int]
# (path below data_dir, the other keys of the record); boxes may still be relative, see `read_rows`.
Row = tuple[str, dict[str, Any]]


class BadRowError(ValueError):
  """A row of annotations that cannot be used; the message says why."""


@final
@dataclasses.dataclass
class Findings:
  """What was found in the rows of one split.

  Attributes:
    where: the file or folder with the rows, for messages.
    bad: "ROW: REASON" for each bad row.
    clipped: number of boxes that rounding had moved outside their image.
  """

  where: str
  bad: list[str] = dataclasses.field(default_factory=list)
  clipped: int = 0

  def judge(self, on_bad: str) -> list[str]:
    """Raises a UserError that lists the bad rows, or warns of them and returns them.

    Args:
      on_bad: "raise", or "skip" where the rows have been left out.
    """
    if self.clipped:
      warn(
        f"{self.where}: {self.clipped:,} boxes reach outside their image by no more than rounding does; clipped"
      )
    if not self.bad:
      return []
    number = f"{len(self.bad):,} bad row{'s' if len(self.bad) > 1 else ''}"
    shown = "; ".join(map(_one_line, self.bad[:_SHOWN]))
    more = f"; and {len(self.bad) - _SHOWN:,} more" if len(self.bad) > _SHOWN else ""
    if on_bad == "skip":
      warn(f"{self.where}: skipped {number}: {shown}{more}")
      return self.bad
    raise UserError(
      f"{self.where}: {number}: {shown}{more}. Repair what is bad, or leave it out: on_bad='skip' of the data"
      " (--config.input.data.on_bad=skip, or --config.evals.NAME.data.on_bad=skip)."
    )


def _one_line(text: str) -> str:
  """Returns the text with escapes for what cannot be printed: names of files may hold anything."""
  return text if text.isprintable() else repr(text)[1:-1]


def check_on_bad(on_bad: str) -> None:
  """Raises a UserError if `on_bad` is neither "raise" nor "skip"."""
  if on_bad not in ("raise", "skip"):
    raise unknown("on_bad", on_bad, ("raise", "skip"))


@functools.cache
def warn(message: str) -> None:
  """Warns once: a command opens the same data several times."""
  _LOG.warning("%s", message)


# --- files ---


@final
class Files:
  """The files below a folder by name; each folder is listed once.

  Names match in any form of Unicode. A backslash may stand for a slash, as in what Windows writes.
  """

  def __init__(self, root: str | os.PathLike[str]):
    self.root = os.fspath(root)
    self._listed: dict[str, dict[str, str]] = {}

  def find(self, name: object, below: str = "") -> str:
    """Returns the path, below the root, of the file that is called `name` in the folder `below`.

    Raises:
      BadRowError: there is no such file, or the name leads out of the folder.
    """
    if not isinstance(name, str) or not name.strip():
      raise BadRowError(f"the file name is {name!r}; expected text")
    found = self._at(name, below) or self._at(name.replace("\\", "/"), below)
    if found is None:
      raise BadRowError(f"no file {name!r}{self._hint(name.replace(chr(92), '/'), below)}")
    return found

  def _at(self, name: str, below: str) -> str | None:
    if name.startswith("/") or ".." in name.split("/"):
      raise BadRowError(f"the file {name!r} is not below the folder of the images")
    folder, base = os.path.split(os.path.normpath(os.path.join(below, name)))
    listed = self._list(folder)
    stored = listed.get(base) or listed.get(_plain(base))
    return None if stored is None else os.path.join(folder, stored)

  def _hint(self, name: str, below: str) -> str:
    folder, base = os.path.split(os.path.normpath(os.path.join(below, name)))
    other = [
      stored for plain, stored in self._list(folder).items() if plain.lower() == base.lower()
    ]
    return f"; there is {other[0]!r}" if other else ""

  def _list(self, folder: str) -> dict[str, str]:
    """Returns the names of the files in a folder, by themselves and by their normal form."""
    if folder not in self._listed:
      try:
        with os.scandir(os.path.join(self.root, folder)) as entries:
          names = sorted(entry.name for entry in entries if entry.is_file())
      except (OSError, ValueError):  # A name with a zero byte is a ValueError.
        names = []
      self._listed[folder] = {_plain(name): name for name in names} | {name: name for name in names}
    return self._listed[folder]


def by_stem(
  folder: pathlib.Path, suffixes: Iterable[str] | None = None, *, say: bool = False
) -> dict[str, list[str]]:
  """Returns path without suffix -> paths, of the visible files below a folder.

  Args:
    folder: the top.
    suffixes: of the files, in lower case; None: those of images.
    say: warn of what is left out.
  """
  tree = Tree(folder, None if suffixes is None else frozenset(suffixes))
  if say:
    say_left_out(tree, folder)
  found: dict[str, list[str]] = {}
  for path in sorted(tree.images):
    found.setdefault(_plain(os.path.splitext(path)[0]), []).append(path)
  return found


def only(paths: Sequence[str], what: str) -> str:
  """Returns the path if it is one; a BadRowError otherwise."""
  if len(paths) == 1:
    return paths[0]
  shown = f": {' and '.join(map(repr, paths[:2]))}" if paths else ""
  raise BadRowError(f"{len(paths) or 'no'} {what}{shown}")


def _plain(name: str) -> str:
  return unicodedata.normalize("NFC", name)


def filled(pattern: str, split: str) -> str:
  """Returns a path in which `{split}` is replaced by the name of the split."""
  return pattern.replace("{split}", split)


def data_root(data_dir: str | os.PathLike[str]) -> pathlib.Path:
  """Returns the folder; a UserError if there is none."""
  root = pathlib.Path(data_dir).expanduser()
  if not root.is_dir():
    raise UserError(f"{root} is no folder; data_dir= is the folder that holds the data set.")
  return root


# --- boxes ---


def fitted(corners: Corners, hw: tuple[float, float], slack: float = SLACK) -> Corners:
  """Returns the corners of a box, clipped to the image.

  Raises:
    BadRowError: not finite, no area, or outside the image by more than `slack`.
  """
  x0, y0, x1, y1 = corners
  h, w = hw
  shown = f"({x0:g}, {y0:g}, {x1:g}, {y1:g})"
  if not all(map(math.isfinite, corners)):
    raise BadRowError(f"the box {shown} is not finite")
  if x1 <= x0 or y1 <= y0:
    raise BadRowError(f"the box {shown} has no area")
  if min(x0, y0) < -slack or x1 > w + slack or y1 > h + slack:
    raise BadRowError(f"the box {shown} is outside the image, which is {w:g} wide and {h:g} high")
  x0, y0, x1, y1 = max(x0, 0.0), max(y0, 0.0), min(x1, w), min(y1, h)
  if np.float32(x1) <= np.float32(x0) or np.float32(y1) <= np.float32(y0):
    raise BadRowError(f"the box {shown} has no area inside the image")
  return x0, y0, x1, y1


def number(value: object, what: str) -> float:
  """Returns a JSON number as a float; a BadRowError for anything else."""
  if isinstance(value, bool) or not isinstance(value, int | float):
    raise BadRowError(f"{what} is {value!r}; expected a number")
  try:
    return float(value)
  except OverflowError:
    raise BadRowError(f"{what} is too large") from None


def whole(value: object, what: str) -> int:
  """Returns a whole number of 64 bits; a BadRowError for anything else."""
  if isinstance(value, float) and value.is_integer():
    value = int(value)
  if isinstance(value, bool) or not isinstance(value, int) or abs(value) >= 2**63:
    raise BadRowError(f"{what} is {value!r}; expected a whole number")
  return value


def caption(value: object) -> str:
  """Returns a caption without white space around it; a BadRowError if it is empty or no text."""
  if not isinstance(value, str):
    raise BadRowError(f"the caption is {value!r:.80}; expected text")
  if not value.strip():
    raise BadRowError("the caption is empty")
  try:
    value.encode()
  except UnicodeEncodeError:
    raise BadRowError(f"the caption {value!r:.80} is no Unicode text: half of a pair") from None
  return value.strip()


def stated_hw(height: object, width: object) -> HW | None:
  """Returns the size of an image as its annotations state it; None where they say nothing, or 0 x 0."""
  if not height and not width:
    return None
  hw = whole(height, "height"), whole(width, "width")
  if min(hw) < 1:
    raise BadRowError(f"the image is {hw[1]} wide and {hw[0]} high")
  return hw


def file_hw(path: pathlib.Path, upright: bool) -> HW:
  """Returns the size by a file's header; a BadRowError for a damaged one."""
  try:
    return images.header_hw(path.read_bytes(), exif=upright)
  except (OSError, SyntaxError, ValueError) as error:
    raise BadRowError(f"the header of {path.name!r} cannot be read: {error}") from None


def boxes_of(
  corners: Sequence[Corners], labels: Sequence[int], ids: Sequence[int], **flags: Sequence[bool]
) -> dict[str, np.ndarray]:
  """Returns the keys of a record that hold boxes, in float64 still; `flags` have names without "box_"."""
  return {
    "boxes": np.array(corners, np.float64).reshape(-1, 4),
    "box_labels": np.array(labels, np.int64),
    "box_ids": np.array(ids, np.int64),
    **{f"box_{key}": np.array(values, bool) for key, values in flags.items()},
  }


# --- records ---


class Table(NamedTuple):
  """The rows of a source in little memory: box columns stand one after the other.

  Attributes:
    paths: of each image, below data_dir.
    others: the keys of each record that hold no boxes.
    columns: key -> the values of all boxes; row i has those from `ends[i]` to `ends[i + 1]`.
  """

  paths: tuple[str, ...]
  others: tuple[dict[str, Any], ...]
  columns: dict[str, Shaped[np.ndarray, "m ..."]]
  ends: Int64[np.ndarray, "n_plus_1"]


def annotated_source(
  name: str,
  split: str,
  root: pathlib.Path,
  stored: Mapping[str, Sequence[Row]],
  class_names: tuple[str, ...] | None,
  num_classes: int,
  *,
  upright: bool,
  relative: bool = False,
  left_out: Sequence[str] = (),
) -> Source:
  """Returns a source of the rows of some splits; each split in an order that depends on its paths alone.

  Args:
    name, split, class_names, num_classes, upright, left_out: see `Source`.
    root: the paths of the rows are below it.
    stored: split -> rows.
    relative: boxes are fractions of the image's sides, and become pixels when a record is read.
  """
  for part, rows in stored.items():
    if not rows:
      raise UserError(f"{name} {part!r} in {root} has no image that can be used.")
  rows = select(split, {part: mixed(rows) for part, rows in stored.items()})
  table = _table(rows, relative)
  read = functools.partial(read_rows, root, table, upright, relative)
  listing = functools.partial(_listing, table)
  return Source(
    name,
    split,
    num_classes,
    class_names,
    len(rows),
    read,
    None,
    upright,
    str(root),
    listing,
    tuple(left_out),
  )


def _table(rows: Sequence[Row], relative: bool) -> Table:
  values = [value for _, value in rows]
  keys = [key for key in values[0] if key.startswith("box")]
  columns = {key: np.concatenate([value[key] for value in values]) for key in keys}
  if keys and not relative:
    columns["boxes"] = columns["boxes"].astype(np.float32)
  counts = [len(value["boxes"]) if keys else 0 for value in values]
  others = [{k: v for k, v in value.items() if k not in columns} for value in values]
  ends = np.cumsum([0, *counts], dtype=np.int64)
  return Table(tuple(path for path, _ in rows), tuple(others), columns, ends)


def read_rows(
  root: pathlib.Path, table: Table, upright: bool, relative: bool, indices: Sequence[int]
) -> list[Record]:
  """Returns the records of these rows, undecoded; arrays are the caller's own."""
  records = []
  for i in indices:
    low, high = table.ends[i], table.ends[i + 1]
    boxes = {key: column[low:high].copy() for key, column in table.columns.items()}
    path, other = table.paths[i], {k: copy.copy(v) for k, v in table.others[i].items()}
    if "mask" in other:
      other["mask"] = (root / other["mask"]).read_bytes()
    record = {"image": (root / path).read_bytes(), "id": path, **other, **boxes}
    records.append(in_pixels(record, upright) if relative else record)
  return records


def _listing(table: Table) -> Iterator[Record]:
  """Yields the records without images and masks; relative boxes stay relative."""
  for i, (path, other) in enumerate(zip(table.paths, table.others, strict=True)):
    low, high = table.ends[i], table.ends[i + 1]
    boxes = {key: column[low:high] for key, column in table.columns.items()}
    yield {"id": path, **{k: v for k, v in other.items() if k != "mask"}, **boxes}


def in_pixels(record: Record, upright: bool) -> Record:
  """Returns the record with its relative boxes in pixels of its image, whose header is read.

  Raises:
    UserError: the header is damaged.
  """
  try:
    h, w = images.header_hw(record["image"], exif=upright)
  except (OSError, SyntaxError, ValueError) as error:
    raise UserError(f"the header of {record['id']!r} cannot be read: {error}") from None
  boxes = np.asarray(record["boxes"], np.float64) * np.array([w, h, w, h], np.float64)
  return {**record, "boxes": boxes.astype(np.float32), "annotated_hw": (h, w)}
