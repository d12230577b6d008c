"""Tar shards as webdataset and img2dataset write them: KEY.jpg, KEY.txt, KEY.json, ... one after the other."""

import functools
import io
import itertools
import json
import os
import pathlib
import tarfile
from collections.abc import Iterator
from typing import NamedTuple

from flexivit_jax.data import images
from flexivit_jax.data.pack_inputs import Input, Row, captions_of, classes_of, label_of, matching
from flexivit_jax.data.sources.base import Record
from flexivit_jax.errors import UserError

_TEXTS = ("txt", "cls", "json")


class _Member(NamedTuple):
  """A file in a tar: its suffix, all after the first dot in lower case, and where its bytes are."""

  suffix: str
  offset: int
  size: int


class _Keys(NamedTuple):
  """Which file or key of the .json holds what."""

  caption: str | None
  label: str | None
  mask: str | None
  ignore: int
  labelled: bool


def tar_input(
  *,
  data_dir: str | os.PathLike[str],
  split: str = "train",
  files: str = "*.tar",
  captions_key: str | None = None,
  label_key: str | None = None,
  masks: str | None = None,
  ignore: int = 255,
  classes: str | None = None,
  num_classes: int | None = None,
  upright: bool = True,
) -> Input:
  """Returns the examples in tar files, in the order of the sorted names and of the members.

  Files next to each other that have the same name up to the first dot are one example: an image; `.txt`, a caption;
  `.cls`, the number of its class, if `classes` or `num_classes` is given and there are no masks; `.json`, of which
  the keys below are used. Its id is TAR/NAME.

  Args:
    data_dir: holds the tars.
    split: the name under which they are packed.
    files: pattern of their names.
    captions_key: of the .json, a text or a list of texts, in place of the .txt.
    label_key: of the .json, a number or a list of numbers, in place of the .cls.
    masks: what the names of masks end in after the first dot, e.g. mask.png.
    ignore: the value of pixels of a mask that count for no class.
    classes: a file with the class names, a line for each; or .json, .yaml.
    num_classes: where there are classes and no such file.
    upright: as `folder_source`.

  Raises:
    UserError: no tar; from `rows`, one that cannot be read.
  """
  tars = matching(data_dir, files)
  names, number = classes_of(data_dir, classes, num_classes)
  about = {
    "name": "tar",
    "split": split,
    "files": files,
    "captions_key": captions_key,
    "label_key": label_key,
    "masks": masks,
    "ignore": ignore,
  }
  keys = _Keys(captions_key, label_key, masks, ignore, number > 0 and masks is None)
  return Input(about, number, names, upright, None, lambda: _rows(tars, keys))


def _rows(tars: list[pathlib.Path], keys: _Keys) -> Iterator[Row]:
  for tar in tars:
    for key, group in itertools.groupby(_members(tar), lambda pair: pair[0]):
      members = [member for _, member in group]
      name = f"{tar.stem}/{key}"
      state = json.dumps([name, [(m.suffix, m.size) for m in members]]).encode()
      yield Row(name, state, functools.partial(_record, tar, name, members, keys))


def _members(tar: pathlib.Path) -> Iterator[tuple[str, _Member]]:
  """Yields (name without its suffix, file) of each file; reads headers only."""
  try:
    with tarfile.open(tar, "r:") as archive:
      while (info := archive.next()) is not None:
        archive.__dict__["members"] = []  # which would hold all headers
        folder, slash, file = info.name.rpartition("/")
        stem, _, suffix = file.partition(".")
        if info.isfile() and stem:
          key = f"{folder}{slash}{stem}".removeprefix("./")
          yield key, _Member(suffix.lower(), info.offset_data, info.size)
  except (tarfile.TarError, OSError) as e:
    raise UserError(
      f"{tar} cannot be read as a tar file ({e}); expected one that is whole and not compressed."
    ) from e


def _record(tar: pathlib.Path, name: str, members: list[_Member], keys: _Keys) -> Record:
  suffixes = [member.suffix for member in members]
  if len(set(suffixes)) < len(suffixes):
    raise UserError(f"several files with one suffix, of {', '.join(suffixes)}")
  pictures = [s for s in suffixes if f".{s}" in images.suffixes() and s != keys.mask]
  if len(pictures) != 1:
    raise UserError(f"{len(pictures)} images, of files {', '.join(suffixes)}; expected one")
  wanted = (*pictures, *_TEXTS, keys.mask)
  with tar.open("rb") as file:
    content = {m.suffix: _bytes(file, m) for m in members if m.suffix in wanted}
  record: Record = {"image": content[pictures[0]], "id": name}
  stated = _json(content) if keys.caption or keys.label else {}
  if keys.caption:
    record["captions"] = captions_of(stated.get(keys.caption))
  elif "txt" in content:
    record["captions"] = captions_of(content["txt"].decode())
  if keys.labelled:
    record["label"] = label_of(stated.get(keys.label) if keys.label else _number(content))
  if keys.mask:
    if keys.mask not in content:
      raise UserError(f"no mask, of files {', '.join(suffixes)}; expected .{keys.mask}")
    record |= {"mask": content[keys.mask], "mask_ignore": keys.ignore}
  return record


def _bytes(file: io.BufferedReader, member: _Member) -> bytes:
  file.seek(member.offset)
  data = file.read(member.size)
  if len(data) < member.size:
    raise UserError("the tar file ends within it")
  return data


def _json(content: dict[str, bytes]) -> dict[str, object]:
  stated = json.loads(content.get("json", b"{}"))
  if not isinstance(stated, dict):
    raise UserError(f"its .json holds {type(stated).__name__}; expected an object")
  return stated


def _number(content: dict[str, bytes]) -> int | None:
  return int(content["cls"]) if "cls" in content else None
