"""Checksums of the files in a folder and of the arrays in them, which detect damage before anything is used.

Orbax and safetensors do not notice a flipped bit or a missing file. XXH3 checksums of 64 bits do: of each file when a
folder is opened, of each array when it is in memory. They are as fast as reading memory. The manifest is one line of
JSON that starts with its own checksum.
"""

import json
import mmap
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np
import xxhash

from flexivit_jax import errors, trees
from flexivit_jax.trees import Tree

FOLDER = "manifest"
NAME = "manifest.json"
_PART = "part."


class Damaged(errors.UserError):
  """Files differ from what was written."""


class Manifest(NamedTuple):
  """`files`: relative path -> (bytes, checksum). `arrays`: item -> name -> checksum of the values in C order.

  An array that is sharded over devices has one checksum for each piece, whose name ends with its region:
  "kernel[0:64,128:256]".
  """

  files: dict[str, tuple[int, int]]
  arrays: dict[str, dict[str, int]]


def pieces(tree: Tree) -> dict[str, np.ndarray]:
  """Returns the arrays of a tree by name, in host memory; of sharded arrays the pieces that this process has.

  A replicated piece is returned once, by the process with the first copy. On a CPU these are views.
  """
  return {
    name + where: piece
    for name, leaf in trees.flatten(tree).items()
    for where, piece in _pieces_of(leaf)
  }


def pieces_of(host: Tree, like: Tree) -> dict[str, np.ndarray]:
  """Returns what `pieces` returns on all processes together, as views of whole arrays.

  Args:
    host: whole arrays, in the memory of this process.
    like: the same arrays as they are divided over devices.
  """
  arrays, leaves = trees.flatten(host), trees.flatten(like)
  return {
    name + where: arrays[name][index]
    for name, leaf in leaves.items()
    for where, index in _regions(leaf).items()
  }


def array_sums(arrays: Mapping[str, np.ndarray]) -> dict[str, int]:
  """Returns the checksum of each array."""
  return {name: _sum(array) for name, array in arrays.items()}


def file_sums(folder: pathlib.Path, skip: Sequence[str] = ()) -> dict[str, tuple[int, int]]:
  """Returns {relative path: (bytes, checksum)} of the files below a folder, except paths that start with a `skip`."""
  sums = {}
  for path in sorted(p for p in folder.rglob("*") if p.is_file()):
    name = path.relative_to(folder).as_posix()
    if not name.startswith(tuple(skip)):
      sums[name] = _file_sum(path)
  return sums


def write(folder: pathlib.Path, manifest: Manifest, name: str = NAME) -> None:
  """Writes a manifest into a folder."""
  _write(folder / name, manifest)


def write_part(folder: pathlib.Path, part: int, arrays: dict[str, dict[str, int]]) -> None:
  """Writes the checksums of the arrays or pieces that one of several processes saves; `seal` merges them."""
  _write(folder / f"{_PART}{part}", Manifest({}, arrays))


def seal(folder: pathlib.Path, files: dict[str, tuple[int, int]]) -> None:
  """Writes the manifest of these files and of the arrays in all parts, and deletes the parts."""
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
    Damaged: it is missing, or differs from what was written.
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
  content = json.loads(body)
  return Manifest({k: (v[0], v[1]) for k, v in content["files"].items()}, content["arrays"])


def check_files(
  folder: pathlib.Path, manifest: Manifest, skip: Sequence[str] = (), *, more: bool = False
) -> None:
  """Compares the files below a folder with a manifest.

  Args:
    folder: the folder.
    manifest: the manifest of what was written.
    skip: prefixes of relative paths to leave out.
    more: accepts files that the manifest does not list.

  Raises:
    Damaged: files differ, are missing, or are not in the manifest; names them.
  """
  wanted = manifest.files
  present = {}
  for path in (p for p in folder.rglob("*") if p.is_file()):
    name = path.relative_to(folder).as_posix()
    if name in wanted:
      present[name] = _file_sum(path)
    elif not more and not name.startswith(tuple(skip)):
      present[name] = (-1, 0)
  wrong = []
  for name in sorted({*wanted, *present}):
    if name not in present:
      wrong.append(f"{name} is missing")
    elif name not in wanted:
      wrong.append(f"{name} was not there when it was written")
    elif present[name][0] != wanted[name][0]:
      wrong.append(f"{name} has {present[name][0]} bytes, written were {wanted[name][0]}")
    elif present[name] != wanted[name]:
      wrong.append(f"{name} has other bytes than were written")
  if wrong:
    raise Damaged(f"{folder} is damaged: {'; '.join(wrong[:5])}{' ...' if len(wrong) > 5 else ''}.")


def check_arrays(where: pathlib.Path, item: str, tree: Tree, manifest: Manifest) -> None:
  """Compares arrays in memory with a manifest; they may be sharded in another way than when it was written.

  Pieces on other processes, or across shard borders, are not compared; their files were.

  Raises:
    Damaged: names the arrays whose values differ from what was written.
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


def _pieces_of(leaf: Tree) -> Iterator[tuple[str, np.ndarray]]:
  if not isinstance(leaf, jax.Array) or leaf.is_fully_replicated:
    shards = getattr(leaf, "addressable_shards", None)
    if shards is None or any(shard.replica_id == 0 for shard in shards):
      yield "", np.asarray(leaf)
    return
  for shard in leaf.addressable_shards:
    if shard.replica_id == 0:
      yield _region(shard.index, leaf.shape), np.asarray(shard.data)


def _region(index: tuple[slice, ...], shape: tuple[int, ...]) -> str:
  bounds = [s.indices(n)[:2] for s, n in zip(index, shape, strict=True)]
  return "[" + ",".join(f"{a}:{b}" for a, b in bounds) + "]"


def _regions(leaf: Tree) -> dict[str, tuple[slice, ...]]:
  """Returns the regions of an array's pieces; one without a name, if it is not divided."""
  if not isinstance(leaf, jax.Array) or leaf.is_fully_replicated:
    return {"": ()}
  indices = leaf.sharding.devices_indices_map(leaf.shape).values()
  return {_region(index, leaf.shape): index for index in indices}


def _piece(leaf: Tree, region: str | None) -> np.ndarray | None:
  """Returns the values of a region, "0:64,128:256", or all; None if this process lacks some of them."""
  if region is None:
    region = ",".join(f"0:{n}" for n in np.shape(leaf))
  bounds = [(int(a), int(b)) for a, b in (part.split(":") for part in region.split(",") if part)]
  if getattr(leaf, "is_fully_addressable", True) or leaf.is_fully_replicated:
    return np.asarray(np.asarray(leaf)[tuple(slice(a, b) for a, b in bounds)])
  for shard in leaf.addressable_shards:
    shard_bounds = [s.indices(n)[:2] for s, n in zip(shard.index, leaf.shape, strict=True)]
    if all(a <= c and d <= b for (a, b), (c, d) in zip(shard_bounds, bounds, strict=True)):
      inside = [slice(c - a, d - a) for (a, _), (c, d) in zip(shard_bounds, bounds, strict=True)]
      return np.asarray(shard.data)[tuple(inside)]
  return None


def _first_word(body: str) -> str:
  return f"{xxhash.xxh3_64_intdigest(body.encode()):016x}"


def _sum(array: np.ndarray) -> int:
  if not array.size:
    return 0
  return xxhash.xxh3_64_intdigest(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def bytes_sum(content: bytes) -> tuple[int, int]:
  """Returns the size and the checksum of a file's bytes, as a manifest holds them."""
  return len(content), xxhash.xxh3_64_intdigest(content) if content else 0


def _file_sum(path: pathlib.Path) -> tuple[int, int]:
  size = path.stat().st_size
  if not size:  # an empty file cannot be mapped
    return 0, 0
  # Mapped, not copied: a copy would cost half as much again.
  with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as content:
    return size, xxhash.xxh3_64_intdigest(content)
