"""The files of a packed data set, which `packing` writes and `sources.packed` reads; docs/packing.md describes them.

    manifest.json               of each split: settings, class names, the shards with sizes and checksums, skipped rows
    train-00000.array_record    a shard: records as `record_bytes` encodes them
    train-00000.json            its index: rows of the input, labels, skipped rows, checksums
    train.begun.json            settings of a split that is not complete; deleted at the end

Each .json holds the checksum of its content (XXH3, 64 bits). No file holds a time or an absolute path: the same input
gives the same bytes.
"""

import json
import os
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import xxhash

from flexivit_jax import files
from flexivit_jax.errors import UserError, unknown

VERSION = 1
MANIFEST = "manifest.json"
Content = dict[str, Any]
_FORMAT = "flexivit_jax packed"
_CHUNK = 2**20
SPLIT = re.compile(r"[\w-]+")  # as in split strings
_OURS = re.compile(r"[\w-]+(\.begun\.json|-\d{5}\.(json|array_record))(\.tmp)?")
_LOCK = (".lock", "holder.json")


class DamagedError(UserError):
  """A file of a packed data set differs from what was written."""


class Shard(NamedTuple):
  """A shard as the manifest lists it.

  Attributes:
    file, index_file: names of the shard and of its index.
    examples: number of records.
    bytes, xxh3: size and checksum of the shard.
    index_xxh3: checksum of the index.
  """

  file: str
  index_file: str
  examples: int
  bytes: int
  xxh3: str
  index_xxh3: str


def shard_name(split: str, number: int) -> str:
  """The file name of a shard without its suffix."""
  return f"{split}-{number:05}"


def is_packed(folder: pathlib.Path) -> bool:
  """Whether a folder holds a packed data set, complete or not."""
  manifest = folder / MANIFEST
  return (manifest.is_file() and _says_packed(manifest)) or bool(begun(folder))


def begun(folder: pathlib.Path) -> list[str]:
  """The splits in a folder that are not complete."""
  return sorted(path.name.removesuffix(".begun.json") for path in folder.glob("*.begun.json"))


def foreign(folder: pathlib.Path) -> list[str]:
  """Names in a folder that are not of a packed data set."""
  names = sorted(os.listdir(folder)) if folder.is_dir() else []
  return [n for n in names if n not in (*_LOCK, MANIFEST) and not _OURS.fullmatch(n)]


def write_json(path: pathlib.Path, content: Content) -> str:
  """Writes a file with its checksum, waits until it is on the disk, and returns the checksum."""
  xxh3 = digest_of(content)
  text = json.dumps({"format": _FORMAT, "version": VERSION, "xxh3": xxh3, "content": content})
  files.write_atomically(path, text + "\n", durable=True)
  return xxh3


def read_json(path: pathlib.Path, xxh3: str | None = None) -> Content:
  """Reads such a file.

  Args:
    path: the file.
    xxh3: the checksum that it must have; None: the one in the file.

  Raises:
    DamagedError: it is missing or differs from what was written.
    UserError: it is of a newer version.
  """
  try:
    stored = json.loads(path.read_bytes())
    content, wanted, version = stored["content"], stored["xxh3"], stored["version"]
  except FileNotFoundError:
    raise DamagedError(f"{path} is missing.") from None
  except (OSError, ValueError, KeyError, TypeError) as e:
    raise DamagedError(f"{path} is damaged: {type(e).__name__}: {e}.") from e
  if version != VERSION:
    raise UserError(f"{path} has version {version!r} of the format; this code reads {VERSION}.")
  if digest_of(content) != wanted or xxh3 not in (None, wanted):
    raise DamagedError(
      f"{path} is damaged: its content does not have the checksum that was written."
    )
  return content


def splits_of(folder: pathlib.Path) -> dict[str, Content]:
  """Returns the complete splits of a folder by name; {} where there is no manifest.

  Raises:
    DamagedError: the manifest differs from what was written.
  """
  path = folder / MANIFEST
  return read_json(path)["splits"] if path.exists() else {}


def split_of(folder: pathlib.Path, split: str) -> Content:
  """Returns a complete split.

  Raises:
    UserError: there is none of this name.
  """
  splits = splits_of(folder)
  if split in splits:
    return splits[split]
  if split in begun(folder):
    raise UserError(
      f"Split {split!r} in {folder} is not complete; the `flexivit pack` command that began it goes on."
    )
  if not splits:
    raise UserError(
      f"{folder} has no {MANIFEST}, so it is no packed data set; `flexivit pack` makes one."
    )
  raise unknown(f"split in {folder}", split, splits)


def shards_of(content: Content) -> list[Shard]:
  """The shards of a split; a UserError if one is not in the folder itself."""
  shards = [Shard(**shard) for shard in content["shards"]]
  for name in (name for shard in shards for name in (shard.file, shard.index_file)):
    if not _OURS.fullmatch(name):
      raise UserError(f"The manifest lists {name!r}, which is no name of a shard.")
  return shards


def is_about(name: str) -> bool:
  """Whether a file describes a packed data set, and holds no records."""
  return name == MANIFEST or (name.endswith(".json") and bool(_OURS.fullmatch(name)))


def check_present(
  folder: pathlib.Path, shard: Shard, size_of: Callable[[str], int | None] | None = None
) -> None:
  """Raises DamagedError if a shard or its index is missing, or the shard has another size.

  Args:
    folder: of the data set.
    shard: as the manifest lists it.
    size_of: name -> bytes of a file, or None where it is missing; by default those of the folder.
  """
  path = folder / shard.file
  if not (folder / shard.index_file).is_file():
    raise DamagedError(f"{folder / shard.index_file} is missing. {_REPAIR}")
  size = size_of(shard.file) if size_of else path.stat().st_size if path.is_file() else None
  if size != shard.bytes:
    state = "is missing" if size is None else f"has {size:,} bytes, written were {shard.bytes:,}"
    raise DamagedError(f"{path} {state}. {_REPAIR}")


def damaged(path: str | os.PathLike[str], error: object) -> DamagedError:
  """Returns (does not raise) the error for a shard that cannot be read."""
  return DamagedError(f"{path} is damaged: {error}. {_REPAIR}")


_REPAIR = "Delete the shard; the `flexivit pack` command that wrote it writes it again."


def verify(folder: pathlib.Path) -> Iterator[tuple[str, Exception | None]]:
  """Yields (file, what is wrong with it or None) for each shard, read in full, and for each split that is not complete.

  Raises:
    DamagedError: the manifest is.
  """
  for content in splits_of(folder).values():
    for shard in shards_of(content):
      try:
        check_present(folder, shard)
        read_json(folder / shard.index_file, shard.index_xxh3)
        if xxh3_of(folder / shard.file) != shard.xxh3:
          raise damaged(folder / shard.file, "it has other bytes than were written")
      except (UserError, OSError) as e:
        yield str(folder / shard.file), e
      else:
        yield str(folder / shard.file), None
  for split in begun(folder):
    yield str(folder / split), UserError("not complete; the command that began it goes on")


def xxh3_of(path: pathlib.Path) -> str:
  """Returns the checksum of a file."""
  digest = xxhash.xxh3_64()
  with path.open("rb") as file:
    while chunk := file.read(_CHUNK):
      digest.update(chunk)
  return digest.hexdigest()


def digest_of(content: Content) -> str:
  """Returns the checksum of the content of a .json."""
  text = json.dumps(content, sort_keys=True, separators=(",", ":"))
  return xxhash.xxh3_64_hexdigest(text.encode())


def _says_packed(path: pathlib.Path) -> bool:
  with path.open("rb") as file:
    return _FORMAT.encode() in file.read(100)
