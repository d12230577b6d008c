"""Checksums of a folder's files and of the arrays in them, so that damage is found before anything is used.

What Orbax and safetensors do not notice, a flipped bit or a missing file, is found by XXH3 checksums of 64 bits: each
file's when a folder is opened, each array's when it is in memory. They run as fast as memory is read. The manifest is
one line of JSON that starts with its own checksum.
"""

import json
import mmap
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import xxhash

from flexivit_jax import errors, trees

FOLDER = "manifest"
NAME = "manifest.json"
_PART = "part."


class Damaged(errors.UserError):
  """Files are not what they were when they were written."""


class Manifest(NamedTuple):
  """`files`: relative path -> (bytes, checksum). `arrays`: item -> name -> checksum of the values in C order.

  Of an array that is divided over devices each piece has its own, under a name that ends with where it lies in the
  whole: "kernel[0:64,128:256]".
  """

  files: dict[str, tuple[int, int]]
  arrays: dict[str, dict[str, int]]


def pieces(tree: Any) -> dict[str, np.ndarray]:
  """The arrays of a tree by name on the host; of those that are divided over devices the pieces that this process has.

  A piece of which there are several copies is given once, by the process that has the first. On a CPU these are views.
  """
  return {
    name + where: piece
    for name, leaf in trees.flatten(tree).items()
    for where, piece in _pieces_of(leaf)
  }


def array_sums(arrays: Mapping[str, np.ndarray]) -> dict[str, int]:
  """The checksum of each array."""
  return {name: _sum(array) for name, array in arrays.items()}


def file_sums(folder: pathlib.Path, skip: Sequence[str] = ()) -> dict[str, tuple[int, int]]:
  """Bytes and checksum of each file below a folder, but of those whose relative path starts with one of `skip`."""
  found = {}
  for path in sorted(p for p in folder.rglob("*") if p.is_file()):
    name = path.relative_to(folder).as_posix()
    if not name.startswith(tuple(skip)):
      found[name] = _file_sum(path)
  return found


def write(folder: pathlib.Path, manifest: Manifest, name: str = NAME) -> None:
  """Writes a manifest into a folder."""
  _write(folder / name, manifest)


def write_part(folder: pathlib.Path, part: int, arrays: dict[str, dict[str, int]]) -> None:
  """Writes the checksums of the arrays, or pieces, that one of several processes saves, for `seal`."""
  _write(folder / f"{_PART}{part}", Manifest({}, arrays))


def seal(folder: pathlib.Path, files: dict[str, tuple[int, int]]) -> None:
  """Writes the manifest of these files and of what all parts in the folder say, in whose place it comes."""
  arrays: dict[str, dict[str, int]] = {}
  parts = list(folder.glob(f"{_PART}*"))
  for part in parts:
    for item, sums in _read(part).arrays.items():
      arrays.setdefault(item, {}).update(sums)
  write(folder, Manifest(files, arrays))
  for part in parts:
    part.unlink()


def read(folder: pathlib.Path, name: str = NAME) -> Manifest:
  """Reads the manifest of a folder.

  Raises:
    Damaged: there is none, or it is not what was written.
  """
  return _read(folder / name)


def _write(file: pathlib.Path, manifest: Manifest) -> None:
  body = json.dumps(manifest._asdict(), sort_keys=True, separators=(",", ":"))
  file.write_text(f"{_first_word(body)} {body}\n")


def _read(file: pathlib.Path) -> Manifest:
  try:
    text = file.read_text()
  except (OSError, UnicodeDecodeError) as e:
    raise Damaged(
      f"{file} cannot be read ({type(e).__name__}): what lies beside it cannot be checked."
    ) from e
  body = text[17:-1]
  if text != f"{_first_word(body)} {body}\n":
    raise Damaged(f"{file} is damaged: its first word is not the checksum of the rest.")
  found = json.loads(body)
  return Manifest({k: (v[0], v[1]) for k, v in found["files"].items()}, found["arrays"])


def check_files(
  folder: pathlib.Path, manifest: Manifest, skip: Sequence[str] = (), *, more: bool = False
) -> None:
  """Compares the files below a folder with those of a manifest.

  Args:
    folder: where they lie.
    manifest: what was written.
    skip: beginnings of relative paths that are not looked at.
    more: files that were not there are let pass.

  Raises:
    Damaged: files that differ, are missing, or were not there; all of them are named.
  """
  wanted = manifest.files
  found = {}
  for path in (p for p in folder.rglob("*") if p.is_file()):
    name = path.relative_to(folder).as_posix()
    if name in wanted:
      found[name] = _file_sum(path)
    elif not more and not name.startswith(tuple(skip)):
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
  """Compares arrays in memory with those of a manifest, however they are divided here and were when it was written.

  Pieces that lie on other processes, or across their borders, are not compared: their files were.

  Raises:
    Damaged: arrays whose values differ from those that were written, by name.
  """
  leaves = trees.flatten(tree)
  seen = set()
  wrong = set()
  for key, wanted in manifest.arrays[item].items():
    name, bracket, region = key.partition("[")
    seen.add(name)
    piece = _piece(leaves[name], region[:-1] if bracket else None) if name in leaves else None
    if name not in leaves or (piece is not None and _sum(piece) != wanted):
      wrong.add(name)
  wrong |= leaves.keys() - seen
  if wrong:
    raise Damaged(
      f"{where}: {item} {', '.join(sorted(wrong)[:5])} ({len(wrong)}) are not what was written."
    )


def _pieces_of(leaf: Any) -> Iterator[tuple[str, np.ndarray]]:
  if not isinstance(leaf, jax.Array) or leaf.is_fully_replicated:
    shards = getattr(leaf, "addressable_shards", None)
    if shards is None or any(shard.replica_id == 0 for shard in shards):
      yield "", np.asarray(leaf)
    return
  for shard in leaf.addressable_shards:
    if shard.replica_id == 0:
      bounds = [s.indices(n)[:2] for s, n in zip(shard.index, leaf.shape, strict=True)]
      yield "[" + ",".join(f"{a}:{b}" for a, b in bounds) + "]", np.asarray(shard.data)


def _piece(leaf: Any, region: str | None) -> np.ndarray | None:
  """The values of a region, "0:64,128:256", or of all; None where this process lacks some of them."""
  if region is None:
    region = ",".join(f"0:{n}" for n in np.shape(leaf))
  bounds = [(int(a), int(b)) for a, b in (part.split(":") for part in region.split(",") if part)]
  if getattr(leaf, "is_fully_addressable", True) or leaf.is_fully_replicated:
    return np.asarray(np.asarray(leaf)[tuple(slice(a, b) for a, b in bounds)])
  for shard in leaf.addressable_shards:
    own = [s.indices(n)[:2] for s, n in zip(shard.index, leaf.shape, strict=True)]
    if all(a <= c and d <= b for (a, b), (c, d) in zip(own, bounds, strict=True)):
      inside = [slice(c - a, d - a) for (a, _), (c, d) in zip(own, bounds, strict=True)]
      return np.asarray(shard.data)[tuple(inside)]
  return None


def _first_word(body: str) -> str:
  return f"{xxhash.xxh3_64_intdigest(body.encode()):016x}"


def _sum(array: np.ndarray) -> int:
  if not array.size:
    return 0
  return xxhash.xxh3_64_intdigest(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def bytes_sum(content: bytes) -> tuple[int, int]:
  """The size and the checksum of a file's bytes, as a manifest has them."""
  return len(content), xxhash.xxh3_64_intdigest(content) if content else 0


def _file_sum(path: pathlib.Path) -> tuple[int, int]:
  size = path.stat().st_size
  if not size:  # which cannot be mapped
    return 0, 0
  # Read where the system has it: a copy would cost half as much again.
  with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as content:
    return size, xxhash.xxh3_64_intdigest(content)
