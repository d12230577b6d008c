"""What teachers said, kept on disk step by step, for runs whose draws are the same: other students, other patch sizes.

A step's batch and its mixup are a function of (seed, step), so a file for each step is all there is to a cache. Files
are .npz: their checksums are compared when they are read.
"""

import concurrent.futures
import io
import json
import os
import pathlib
import zipfile
from collections.abc import Mapping
from typing import Any, final

import jax
import numpy as np

from flexivit_jax import errors, files

_PENDING = 4  # steps whose arrays may wait for the disk
# What zipfile and NumPy raise over files of which any byte is another; RuntimeError: "is encrypted", "version 17.3".
_DAMAGED = (OSError, ValueError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile)


@final
class TeacherCache:
  """A folder of targets: trees of arrays [n, ...], this process's part of the batch.

  Args:
    folder: made when the first step is written.
    identity: JSON-able; everything that targets depend on. A folder of another is refused.
    process: (index, count) of this process. Each count has its own files: another one makes them again.

  Raises:
    UserError: the folder is of other draws or other teachers, or cannot be read.
  """

  def __init__(
    self, folder: str | os.PathLike[str], identity: Mapping[str, Any], process: tuple[int, int]
  ):
    self.folder = pathlib.Path(folder)
    self._about = self.folder / "cache.json"
    self._mine = self.folder / f"process_{process[0]}_of_{process[1]}"
    self._identity = json.loads(json.dumps(dict(identity), default=str))
    self._check()
    self._writer = concurrent.futures.ThreadPoolExecutor(1)
    self._writes: list[concurrent.futures.Future] = []

  def has(self, step: int) -> bool:
    """Whether the targets of a step are there."""
    return self._file(step).exists()

  def read(self, step: int, like: Any) -> Any:
    """Returns the targets of a step as NumPy arrays, in a tree like `like`.

    Raises:
      UserError: the file is damaged, or holds other arrays than `like`.
    """
    file, leaves = self._file(step), jax.tree.leaves(like)
    try:
      # Through memory: NumPy leaves a file open that it finds damaged.
      with np.load(io.BytesIO(file.read_bytes()), allow_pickle=False) as arrays:
        found = [arrays[str(i)] for i in range(len(leaves))]
    except _DAMAGED as e:
      raise errors.UserError(f"{file} is damaged ({e}); delete it, and it is made again.") from e
    for got, want in zip(found, leaves, strict=True):
      if (got.shape[1:], got.dtype) != (want.shape[1:], want.dtype):
        raise errors.UserError(
          f"{file} holds {got.dtype}{list(got.shape)}, expected {want.dtype}{list(want.shape)}."
        )
    return jax.tree.unflatten(jax.tree.structure(like), found)

  def write(self, step: int, targets: Any) -> None:
    """Writes the targets of a step in the background: whole, or not at all.

    Raises:
      OSError: of an earlier write.
    """
    while len(self._writes) >= _PENDING:
      self._writes.pop(0).result()
    self._writes.append(self._writer.submit(self._write, step, jax.tree.leaves(targets)))

  def close(self) -> None:
    """Waits until everything is on disk; raises what went wrong there."""
    self._writer.shutdown(wait=True)
    while self._writes:
      self._writes.pop(0).result()

  def _write(self, step: int, leaves: list[Any]) -> None:
    # Unique names: other processes, and other runs that fill the same cache, may write the same file.
    file = self._file(step)
    file.parent.mkdir(parents=True, exist_ok=True)
    if not self._about.exists():
      about = json.dumps(self._identity, indent=1)
      files.write_atomically(self._about, about, unique=True)
    arrays: dict[str, Any] = {str(i): _local(leaf) for i, leaf in enumerate(leaves)}
    content = io.BytesIO()
    np.savez(content, **arrays)
    files.write_atomically(file, content.getvalue(), unique=True)

  def _file(self, step: int) -> pathlib.Path:
    return self._mine / f"{step // 1000:06d}" / f"{step:09d}.npz"

  def _check(self) -> None:
    if not self._about.exists():
      return
    try:
      stored = dict(json.loads(self._about.read_text()))
    except (ValueError, TypeError) as e:
      raise errors.UserError(f"{self._about} is damaged ({e}); give another folder.") from e
    keys = sorted(stored.keys() | self._identity.keys())
    lines = [
      f"{k}: {stored.get(k)!r} there, {self._identity.get(k)!r} here"
      for k in keys
      if stored.get(k) != self._identity.get(k)
    ]
    if lines:
      raise errors.UserError(
        f"{self.folder} was made for other targets; give another folder:\n  " + "\n  ".join(lines)
      )


def _local(array: Any) -> np.ndarray:
  """This process's part of an array that is split over its first axis."""
  if not isinstance(array, jax.Array):
    return np.asarray(array)
  shards = {shard.index[0].start or 0: shard.data for shard in array.addressable_shards}
  return np.concatenate([np.asarray(shards[start]) for start in sorted(shards)])
