"""What `flexivit pack` reads: rows in a fixed order, each with what tells whether it is still the same."""

import functools
import glob
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from flexivit_jax.data import images, record_bytes
from flexivit_jax.data.sources import class_files
from flexivit_jax.data.sources.base import Label, Record, Source
from flexivit_jax.errors import UserError


class Row(NamedTuple):
  """A row of an input.

  Attributes:
    name: its id, as far as it is known without reading it.
    state: bytes that change if the row does: annotations, sizes of files. It costs no reading.
    read: returns the record; may be called from any thread; raises where the row is bad.
  """

  name: str
  state: bytes
  read: Callable[[], Record]


class Input(NamedTuple):
  """An input.

  Attributes:
    about: what was asked for, as JSON, without paths: they may differ between machines.
    num_classes, class_names, upright, class_groups: as those of a `Source`.
    size: number of rows; None: known only at the end.
    rows: starts at row 0.
    notes: lines for the user.
    left_out: as of a `Source`.
  """

  about: dict[str, Any]
  num_classes: int
  class_names: tuple[str, ...] | None
  upright: bool
  size: int | None
  rows: Callable[[], Iterator[Row]]
  notes: tuple[str, ...] = ()
  left_out: tuple[str, ...] = ()
  class_groups: Mapping[str, tuple[int, ...]] | None = None


def of_source(source: Source, about: dict[str, Any]) -> Input:
  """Returns the examples of a source, in its order."""
  return Input(
    about,
    source.num_classes,
    source.class_names,
    source.upright,
    len(source),
    lambda: _rows(source),
    left_out=source.left_out,
    class_groups=source.class_groups,
  )


def _rows(source: Source) -> Iterator[Row]:
  listing = iter(source.listing()) if source.listing else None
  for index in range(len(source)):
    known = next(listing) if listing else {}
    name = str(known.get("id", ""))
    size = _size(os.path.join(source.where, name)) if source.where and name else b""
    yield Row(name, record_bytes.encode(known) + size, functools.partial(source.__getitem__, index))


def _size(path: str) -> bytes:
  try:
    return str(os.stat(path).st_size).encode()
  except OSError:
    return b"none"


def matching(data_dir: str | os.PathLike[str], files: str) -> list[pathlib.Path]:
  """Returns the sorted paths of the files in a folder that match a pattern; a UserError if there is none."""
  folder = pathlib.Path(data_dir).expanduser()
  names = sorted(glob.glob(files, root_dir=folder, recursive=True))
  paths = [folder / name for name in names if (folder / name).is_file()]
  if not paths:
    raise UserError(f"No {files} in {folder}; data_dir= is the folder, files= the pattern.")
  return paths


def classes_of(
  data_dir: str | os.PathLike[str], classes: str | None, num_classes: int | None
) -> tuple[tuple[str, ...] | None, int]:
  """Returns the class names in a file, and their number; (None, `num_classes` or 0) without a file.

  Args:
    data_dir: the folder below which the file is, unless its path is a full one.
    classes: the file; see `class_files`.
    num_classes: as the user gives it.

  Raises:
    UserError: the file cannot be read, or `num_classes` is another number.
  """
  if classes is None:
    return None, num_classes or 0
  path = class_files.find(pathlib.Path(data_dir).expanduser(), classes, ())
  names = class_files.read(path)
  if num_classes not in (None, len(names)):
    raise UserError(f"num_classes={num_classes}, but {path} has {len(names)} names.")
  return names, len(names)


def captions_of(value: Any) -> tuple[str, ...]:
  """Returns a text or a list of texts as captions, without white space around them."""
  texts = value if isinstance(value, list) else [] if value is None else [value]
  if not all(isinstance(text, str) for text in texts):
    raise UserError(f"captions are {value!r:.80}; expected a text or a list of texts")
  return tuple(text.strip() for text in texts)


def label_of(value: Any) -> Label:
  """Returns a number or a list of numbers as a label."""
  numbers = value if isinstance(value, list) else [value]
  if not all(type(number) is int for number in numbers):
    raise UserError(f"label is {value!r:.80}; expected a number or a list of numbers")
  return tuple(numbers) if isinstance(value, list) else numbers[0]


def problem(record: Record, *, num_classes: int, upright: bool) -> str | None:
  """Returns why a record cannot be packed, None where it can.

  Images and masks are not decoded, only their headers are read.
  """
  try:
    hw = _image_hw(record.get("image"), upright)
  except (ValueError, OSError, SyntaxError) as e:
    return f"image: {e}"
  if (annotated := record.get("annotated_hw")) not in (None, hw):
    return f"the image has {hw[0]} x {hw[1]} pixels (h x w), its annotation says {annotated}"
  return (
    _label_problem(record, num_classes) or _caption_problem(record) or _box_problem(record)
  ) or _mask_problem(record, hw)


def _image_hw(image: Any, upright: bool) -> tuple[int, int]:
  if isinstance(image, np.ndarray):
    if image.dtype != np.uint8 or image.ndim != 3 or not image.size:
      raise ValueError(f"{image.dtype} {list(image.shape)}; expected uint8 [h, w, c]")
    return image.shape[0], image.shape[1]
  if not image:
    raise ValueError("there is none" if image is None else "an empty file")
  return images.header_hw(image, exif=upright)


def _label_problem(record: Record, num_classes: int) -> str | None:
  for key in ("label", "box_labels"):
    labels = np.atleast_1d(np.asarray(record.get(key, ())))
    if labels.size and not 0 <= labels.min() <= labels.max() < num_classes:
      return f"{key} is {record[key]}; expected 0..{num_classes - 1}"
  return None


def _caption_problem(record: Record) -> str | None:
  if "captions" not in record:
    return None
  captions = record["captions"]
  empty = [k for k, text in enumerate(captions, 1) if not text.strip()]
  if empty:
    return f"caption {empty[0]} of {len(captions)} is empty"
  return None if captions else "there is no caption"


def _box_problem(record: Record) -> str | None:
  boxes = record.get("boxes")
  if boxes is None:
    return None
  if boxes.ndim != 2 or boxes.shape[1] != 4 or not np.isfinite(boxes).all():
    return f"boxes are {list(boxes.shape)}; expected finite numbers [m, 4]"
  for key, value in record.items():
    if key.startswith("box_") and len(value) != len(boxes):
      return f"{key} has {len(value)} rows for {len(boxes)} boxes"
  return None


def _mask_problem(record: Record, hw: tuple[int, int]) -> str | None:
  if "mask" not in record:
    return None
  mask = record["mask"]
  try:
    size = mask.shape if isinstance(mask, np.ndarray) else images.header_hw(mask)
  except (ValueError, OSError, SyntaxError) as e:
    return f"mask: {e}"
  return None if size == hw else f"the image is {list(hw)} (h, w), its mask {list(size)}"
