"""Checksums of a folder's files and of the arrays in them, so that damage is found before anything is used.

What Orbax and safetensors do not notice, a flipped bit or a missing file, is found by CRC-32: each file's when a folder
is opened, each array's when it is in memory. The manifest is one line of JSON that starts with its own checksum.
"""

import json
import pathlib
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from flexivit_jax import errors, trees

FOLDER = "manifest"
NAME = "manifest.json"
_CHUNK = 2**22


class Damaged(errors.UserError):
  """Files are not what they were when they were written."""


class Manifest(NamedTuple):
  """`files`: relative path -> (bytes, CRC-32). `arrays`: item -> name -> CRC-32 of the values in C order."""

  files: dict[str, tuple[int, int]]
  arrays: dict[str, dict[str, int]]


def array_sums(tree: Any) -> dict[str, int]:
  """CRC-32 of each array, by its name."""
  return {name: _crc(np.asarray(leaf)) for name, leaf in trees.flatten(tree).items()}


def file_sums(folder: pathlib.Path, skip: Sequence[str] = ()) -> dict[str, tuple[int, int]]:
  """Bytes and CRC-32 of each file below a folder, but of those whose relative path starts with one of `skip`."""
  found = {}
  for path in sorted(p for p in folder.rglob("*") if p.is_file()):
    name = path.relative_to(folder).as_posix()
    if not name.startswith(tuple(skip)):
      found[name] = _file_crc(path)
  return found


def write(folder: pathlib.Path, manifest: Manifest) -> None:
  """Writes a manifest into a folder."""
  body = _body(manifest)
  (folder / NAME).write_text(f"{zlib.crc32(body.encode()):08x} {body}\n")


def read(folder: pathlib.Path) -> Manifest:
  """Reads the manifest of a folder.

  Raises:
    Damaged: there is none, or it is not what was written.
  """
  file = folder / NAME
  try:
    text = file.read_text()
  except (OSError, UnicodeDecodeError) as e:
    raise Damaged(
      f"{file} cannot be read ({type(e).__name__}): what lies beside it cannot be checked."
    ) from e
  body = text[9:-1]
  if text != f"{zlib.crc32(body.encode()):08x} {body}\n":
    raise Damaged(f"{file} is damaged: its first word is not the checksum of the rest.")
  found = json.loads(body)
  return Manifest({k: (v[0], v[1]) for k, v in found["files"].items()}, found["arrays"])


def check_files(folder: pathlib.Path, manifest: Manifest, skip: Sequence[str] = ()) -> None:
  """Compares the files below a folder with those of a manifest.

  Raises:
    Damaged: files that differ, are missing, or were not there; all of them are named.
  """
  wanted = manifest.files
  found = {}
  for path in (p for p in folder.rglob("*") if p.is_file()):
    name = path.relative_to(folder).as_posix()
    if name in wanted:
      found[name] = _file_crc(path)
    elif not name.startswith(tuple(skip)):
      found[name] = (-1, 0)
  wrong = []
  for name in sorted({*wanted, *found}):
    if name not in found:
      wrong.append(f"{name} is missing")
    elif name not in wanted:
      wrong.append(f"{name} was not there when it was written")
    elif found[name][0] != wanted[name][0]:
      wrong.append(f"{name} has {found[name][0]} bytes, written were {wanted[name][0]}")
    elif found[name] != wanted[name]:
      wrong.append(f"{name} has other bytes than were written")
  if wrong:
    raise Damaged(f"{folder} is damaged: {'; '.join(wrong[:5])}{' ...' if len(wrong) > 5 else ''}.")


def check_arrays(where: pathlib.Path, item: str, tree: Any, manifest: Manifest) -> None:
  """Compares arrays in memory with those of a manifest.

  Raises:
    Damaged: arrays whose values differ from those that were written, by name.
  """
  wanted: Mapping[str, int] = manifest.arrays[item]
  found = array_sums(tree)
  wrong = [name for name in {*wanted, *found} if wanted.get(name) != found.get(name)]
  if wrong:
    raise Damaged(
      f"{where}: {item} {', '.join(sorted(wrong)[:5])} ({len(wrong)}) are not what was written."
    )


def _body(manifest: Manifest) -> str:
  return json.dumps(manifest._asdict(), sort_keys=True, separators=(",", ":"))


def _crc(array: np.ndarray) -> int:
  if not array.size:
    return 0
  return zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def _file_crc(path: pathlib.Path) -> tuple[int, int]:
  size = crc = 0
  with path.open("rb") as file:
    while chunk := file.read(_CHUNK):
      size, crc = size + len(chunk), zlib.crc32(chunk, crc)
  return size, crc
