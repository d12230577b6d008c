"""Images with captions in metadata.jsonl or metadata.csv, the convention of Hugging Face's ImageFolder."""

import csv
import io
import json
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from flexivit_jax.data.sources import class_files
from flexivit_jax.data.sources.annotated import (
  BadRowError,
  Files,
  Findings,
  Row,
  annotated_source,
  caption,
  check_on_bad,
  data_root,
  warn,
)
from flexivit_jax.data.sources.base import Source
from flexivit_jax.data.sources.folder import subfolders
from flexivit_jax.data.splits import split_names
from flexivit_jax.data.walking import Tree
from flexivit_jax.errors import UserError, unknown

_FILES = ("metadata.jsonl", "metadata.csv")
_NAME = "file_name"


def captions_source(
  *,
  split: str,
  data_dir: str | os.PathLike[str],
  captions_key: str = "text",
  on_bad: str = "raise",
  upright: bool = True,
) -> Source:
  """Images with captions: SPLIT/metadata.jsonl or SPLIT/metadata.csv has rows of file_name and text.

  Several rows of one file are several captions, and so is a list of texts. There are no classes. See
  docs/annotated_data.md.

  Args:
    split: a folder of data_dir; `all`: data_dir itself, where it has metadata.
    data_dir: holds a folder for each split; file names start from the folder of the metadata.
    captions_key: the column of the captions.
    on_bad: "raise" where a row is bad; "skip" leaves it out.
    upright: turn images as their EXIF data say.

  Raises:
    UserError: no metadata, no such column, bad rows.
  """
  check_on_bad(on_bad)
  root = data_root(data_dir)
  files, stored = Files(root), {}
  left_out: list[str] = []
  for part in split_names(split):
    path = _find(root, part)
    findings = Findings(str(path))
    stored[part] = _rows(path, root, captions_key, files, findings)
    left_out += findings.judge(on_bad)
  return annotated_source(
    "captions", split, root, stored, None, 0, upright=upright, left_out=left_out
  )


def _find(root: pathlib.Path, split: str) -> pathlib.Path:
  folders = subfolders(root)
  in_root = [name for name in _FILES if (root / name).is_file()]
  if split not in folders and not (split == "all" and in_root):
    raise unknown(f"split folder in {root}", split, [*folders, *(["all"] if in_root else [])])
  folder = root if split not in folders else root / split
  paths = [folder / name for name in _FILES if (folder / name).is_file()]
  if len(paths) == 1:
    return paths[0]
  has = "both are there" if paths else "neither is there"
  raise UserError(f"{folder}: expected {' or '.join(_FILES)}; {has}.")


def _rows(
  path: pathlib.Path, root: pathlib.Path, captions_key: str, files: Files, findings: Findings
) -> list[Row]:
  folder = path.parent.relative_to(root)
  captions: dict[str, list[str]] = {}
  lines = _csv_lines if path.suffix == ".csv" else _json_lines
  for line, row in lines(path, captions_key):
    try:
      name, texts = _fields(row, captions_key)
      image = files.find(name, "" if folder == pathlib.Path() else str(folder))
      captions.setdefault(image, []).extend(map(caption, texts))
    except BadRowError as error:
      findings.bad.append(f"line {line}: {error}")
  _say_unnamed(path.parent, root, captions)
  return [(image, {"captions": tuple(texts)}) for image, texts in captions.items() if texts]


# A row as it was read: a dict of fields, or the reason why there is none.
_Read = dict[str, Any] | BadRowError


def _fields(row: _Read, captions_key: str) -> tuple[object, Sequence[object]]:
  """Returns the file name and the captions of a row, unchecked."""
  if isinstance(row, BadRowError):
    raise row
  for key in (_NAME, captions_key):
    if key not in row:
      raise BadRowError(f"no {key!r}; it has {', '.join(map(str, row)) or 'nothing'}")
  value = row[captions_key]
  if isinstance(value, list):
    if not value:
      raise BadRowError("the list of captions is empty")
    return row[_NAME], value
  return row[_NAME], [value]


def _json_lines(path: pathlib.Path, captions_key: str) -> Iterator[tuple[int, _Read]]:
  # Not `splitlines`: a caption may hold one of Unicode's other line separators.
  for line, text in enumerate(class_files.read_text(path).split("\n"), 1):
    if not text.strip():
      continue
    try:
      value = json.loads(text)
    except (ValueError, RecursionError) as error:
      yield line, BadRowError(f"not JSON: {error}")
      continue
    shown = BadRowError(f"{value!r:.80}; expected an object")
    yield line, value if isinstance(value, dict) else shown


def _csv_lines(path: pathlib.Path, captions_key: str) -> Iterator[tuple[int, _Read]]:
  reader = csv.reader(io.StringIO(class_files.read_text(path), newline=""), strict=True)
  try:
    header = next(reader, [])
    for key in (_NAME, captions_key):
      if header.count(key) != 1:
        raise UserError(
          f"{path} has the columns {', '.join(map(repr, header)) or 'none'}; expected one {key!r}"
          f" (captions_key={captions_key!r} is the column of the captions)."
        )
    for row in reader:
      wrong = BadRowError(f"{len(row)} fields; expected {len(header)}")
      if row:
        same = len(row) == len(header)
        yield reader.line_num, dict(zip(header, row, strict=True)) if same else wrong
  except csv.Error as error:
    raise UserError(f"{path} line {reader.line_num}: {error}.") from None


def _say_unnamed(folder: pathlib.Path, root: pathlib.Path, named: Mapping[str, object]) -> None:
  """Warns of images without a row, which are no examples."""
  tree = Tree(folder)
  paths = (os.path.relpath(tree.at(path), root) for path in tree.images)
  number = sum(path not in named for path in paths)
  if number:
    warn(f"{folder}: {number:,} images have no caption and are left out")
