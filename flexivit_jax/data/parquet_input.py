"""Parquet files with images in a column, as Hugging Face's `datasets` writes them."""

import functools
import importlib
import json
import os
import pathlib
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, final

import xxhash

from flexivit_jax.data.pack_inputs import Input, Row, captions_of, classes_of, label_of, matching
from flexivit_jax.data.sources.base import Record
from flexivit_jax.errors import UserError, unknown


class _Columns(NamedTuple):
  """The columns that are read; None: there is none of this kind."""

  image: str
  label: str | None
  captions: str | None
  mask: str | None
  id: str | None


def parquet_input(
  *,
  data_dir: str | os.PathLike[str],
  split: str = "train",
  files: str = "*.parquet",
  image_key: str = "image",
  label_key: str | None = None,
  captions_key: str | None = None,
  mask_key: str | None = None,
  id_key: str | None = None,
  ignore: int = 255,
  classes: str | None = None,
  num_classes: int | None = None,
  upright: bool = True,
) -> Input:
  """Returns the rows of parquet files, in the order of the sorted names and of the rows.

  Args:
    data_dir: holds the files.
    split: the name under which they are packed.
    files: pattern of their names, e.g. train-*.parquet.
    image_key: the column with the images: bytes, or a struct with the field `bytes`.
    label_key: the column with the number of the class, or a list of numbers.
    captions_key: the column with a text or a list of texts.
    mask_key: the column with masks, as images.
    id_key: the column with ids; None: FILE#ROW.
    ignore: the value of pixels of a mask that count for no class.
    classes: a file with the class names, a line for each; or .json, .yaml. None: what Hugging Face's metadata say.
    num_classes: where there are classes and neither of these.
    upright: as `folder_source`.

  Raises:
    UserError: no file, one that cannot be read, or without such a column; pyarrow is not installed.
  """
  paths, columns = (
    matching(data_dir, files),
    _Columns(image_key, label_key, captions_key, mask_key, id_key),
  )
  size = 0
  notes: dict[str, None] = {}
  for path in paths:
    with _open(path) as file:
      _check_columns(path, file, columns)
      size += file.metadata.num_rows
      if others := [name for name in file.schema_arrow.names if name not in columns]:
        notes[f"columns that are left out: {', '.join(others)}"] = None
  names, number = classes_of(data_dir, classes, num_classes)
  if label_key and not number:
    names = _stated_names(paths[0], label_key)
    number = len(names)
  about = {"name": "parquet", "split": split, "files": files}
  about |= {f"{kind}_key": name for kind, name in columns._asdict().items()} | {"ignore": ignore}
  return Input(
    about, number, names, upright, size, lambda: _rows(paths, columns, ignore), tuple(notes)
  )


def _parquet() -> Any:
  """Imports pyarrow, which is no dependency of ours."""
  try:
    return importlib.import_module("pyarrow.parquet")
  except ModuleNotFoundError as e:
    raise UserError(
      f"Reading parquet needs pyarrow, which is not installed: `{sys.executable} -m pip install pyarrow`."
    ) from e


def _open(path: pathlib.Path) -> Any:
  parquet = _parquet()
  try:
    return parquet.ParquetFile(path)
  except (OSError, ValueError) as e:  # pyarrow's ArrowInvalid is a ValueError
    raise UserError(f"{path} cannot be read as parquet: {e}") from e


def _check_columns(path: pathlib.Path, file: Any, columns: _Columns) -> None:
  for kind, name in columns._asdict().items():
    if name is not None and name not in file.schema_arrow.names:
      raise unknown(f"column of {path} ({kind}_key=)", name, file.schema_arrow.names)


def _stated_names(path: pathlib.Path, label_key: str) -> tuple[str, ...]:
  """Returns the class names in the metadata that Hugging Face writes."""
  with _open(path) as file:
    metadata = file.schema_arrow.metadata or {}
  try:
    feature = json.loads(metadata[b"huggingface"])["info"]["features"][label_key]
    return tuple(feature["names"] if "names" in feature else feature["feature"]["names"])
  except (KeyError, TypeError, ValueError) as e:
    raise UserError(
      f"The metadata name no classes of the column {label_key!r}; give classes=FILE or num_classes=NUMBER."
    ) from e


def _rows(paths: Sequence[pathlib.Path], columns: _Columns, ignore: int) -> Iterator[Row]:
  for path in paths:
    number, footer, file = 0, _footer(path), _open(path)
    for group in range(file.metadata.num_row_groups):
      table = _Group(file, group, columns)
      for row in range(file.metadata.row_group(group).num_rows):
        name = f"{path.stem}#{number}"
        state = f"{footer} {number}".encode()
        yield Row(name, state, functools.partial(_record, table, row, name, columns, ignore))
        number += 1


def _footer(path: pathlib.Path) -> str:
  """Returns the checksum of the end of a file, which states sizes and places of all columns, and their extremes."""
  with path.open("rb") as file:
    file.seek(-8, os.SEEK_END)
    length = int.from_bytes(file.read(4), "little")
    file.seek(-8 - length, os.SEEK_END)
    return f"{path.name} {xxhash.xxh3_64_hexdigest(file.read())}"


@final
class _Group:
  """The rows that are stored together; read when the first of them is."""

  def __init__(self, file: Any, number: int, columns: _Columns):
    self._file, self._number = file, number
    self._columns = [name for name in dict.fromkeys(columns) if name is not None]
    self._lock = threading.Lock()
    self._table: Any = None

  def row(self, number: int) -> dict[str, Any]:
    """Returns the values of a row by column."""
    with self._lock:
      if self._table is None:
        self._table = self._file.read_row_group(self._number, self._columns)
      return {name: self._table.column(name)[number].as_py() for name in self._columns}


def _record(group: _Group, number: int, name: str, columns: _Columns, ignore: int) -> Record:
  row = group.row(number)
  record: Record = {"image": _bytes(row[columns.image], "image"), "id": name}
  if columns.id:
    record["id"] = str(row[columns.id])
  if columns.label:
    record["label"] = label_of(row[columns.label])
  if columns.captions:
    record["captions"] = captions_of(row[columns.captions])
  if columns.mask:
    record |= {"mask": _bytes(row[columns.mask], "mask"), "mask_ignore": ignore}
  return record


def _bytes(value: Any, what: str) -> bytes:
  data = value.get("bytes") if isinstance(value, dict) else value
  if isinstance(data, bytes) and data:
    return data
  path = value.get("path") if isinstance(value, dict) else None
  raise UserError(
    f"the row has no bytes of the {what}" + (f", only the path {path!r}" if path else "")
  )
