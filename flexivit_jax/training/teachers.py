"""The teachers' part of each step: logits that one program computes, or that a cache on disk holds.

A step's batch and its mixup are a function of (seed, step), so the cache is one file for each step. Runs with the same
draws and teachers share it: other students, other patch sizes. Files are .npz, whose checksums are compared on reading.
"""

import concurrent.futures
import functools
import io
import json
import math
import os
import pathlib
import zipfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any, final

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from flexivit_jax import errors, files, storage
from flexivit_jax.devices import compilation, sharding
from flexivit_jax.objectives.base import Teaching
from flexivit_jax.training import steps
from flexivit_jax.trees import Tree

_PENDING = 4  # steps whose arrays may wait for the disk
_AHEAD = 4  # steps that are fetched at once from a bucket
# What zipfile and NumPy raise over files of which any byte is another; RuntimeError: "is encrypted", "version 17.3".
_DAMAGED = (OSError, ValueError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile)


@final
class TeacherCache:
  """A folder of targets: trees of arrays [n, ...], this process's part of the batch.

  Args:
    folder: made when the first step is written; or s3://BUCKET/FOLDER, gs://BUCKET/FOLDER.
    identity: JSON-able; everything that targets depend on. A folder of another is refused.
    process: (index, count) of this process. Each count has its own files: another one makes them again.

  Raises:
    UserError: the folder is of other draws or other teachers, or cannot be read.
  """

  def __init__(
    self, folder: str | os.PathLike[str], identity: Mapping[str, object], process: tuple[int, int]
  ):
    self.folder, url = pathlib.Path(folder), storage.address(folder)
    self._bucket = storage.Bucket(url) if url else None
    self._about = self.folder / "cache.json"
    self._mine = self.folder / f"process_{process[0]}_of_{process[1]}"
    self._there = set(self._bucket.entries(self._mine.name)) if self._bucket else set()
    self._ahead: dict[int, concurrent.futures.Future[bytes | None]] = {}
    self._identity = json.loads(json.dumps(dict(identity), default=str))
    self._check()
    self._writer = concurrent.futures.ThreadPoolExecutor(1)
    self._reader = concurrent.futures.ThreadPoolExecutor(_AHEAD)
    self._writes: list[concurrent.futures.Future] = []

  def has(self, step: int) -> bool:
    """Whether the targets of a step are there."""
    file = self._file(step)
    return file.exists() if self._bucket is None else self._name(file) in self._there

  def read(self, step: int, like: Tree) -> Tree:
    """Returns the targets of a step as NumPy arrays, in a tree like `like`.

    Raises:
      UserError: the file is damaged, or holds other arrays than `like`.
    """
    file, leaves = self._file(step), jax.tree.leaves(like)
    try:
      # Through memory: NumPy leaves a file open that it finds damaged.
      with np.load(io.BytesIO(self._content(step)), allow_pickle=False) as arrays:
        found = [arrays[str(i)] for i in range(len(leaves))]
    except _DAMAGED as e:
      shown = self._bucket.of(self._name(file)) if self._bucket else file
      raise errors.UserError(f"{shown} is damaged ({e}); delete it, and it is made again.") from e
    for got, want in zip(found, leaves, strict=True):
      if (got.shape[1:], got.dtype) != (want.shape[1:], want.dtype):
        raise errors.UserError(
          f"{file} holds {got.dtype}{list(got.shape)}, expected {want.dtype}{list(want.shape)}."
        )
    return jax.tree.unflatten(jax.tree.structure(like), found)

  def write(self, step: int, targets: Tree) -> None:
    """Writes the targets of a step in the background: whole, or not at all.

    Raises:
      OSError: of an earlier write.
    """
    while len(self._writes) >= _PENDING:
      self._writes.pop(0).result()
    self._writes.append(self._writer.submit(self._write, step, jax.tree.leaves(targets)))

  def close(self) -> None:
    """Waits until everything is on disk; raises what went wrong there."""
    self._reader.shutdown(cancel_futures=True)
    self._writer.shutdown(wait=True)
    while self._writes:
      self._writes.pop(0).result()

  def _write(self, step: int, leaves: list[jax.Array | np.ndarray]) -> None:
    # Unique names: other processes, and other runs that fill the same cache, may write the same file.
    file, about = self._file(step), json.dumps(self._identity, indent=1)
    if self._bucket is not None:
      self._bucket.create(self._about.name, about.encode())
    else:
      file.parent.mkdir(parents=True, exist_ok=True)
      if not self._about.exists():
        files.write_atomically(self._about, about, unique=True)
    arrays: dict[str, Any] = {str(i): _local(leaf) for i, leaf in enumerate(leaves)}
    content = io.BytesIO()
    np.savez(content, **arrays)
    if self._bucket is not None:
      self._bucket.write(self._name(file), content.getvalue())
    else:
      files.write_atomically(file, content.getvalue(), unique=True)

  def _content(self, step: int) -> bytes:
    """Returns the bytes of a step's file; those of the next steps are fetched from a bucket meanwhile."""
    if self._bucket is None:
      return self._file(step).read_bytes()
    for number in range(step, step + _AHEAD):
      name = self._name(self._file(number))
      if number not in self._ahead and name in self._there:
        self._ahead[number] = self._reader.submit(self._bucket.read, name)
    content = self._ahead.pop(step).result()
    if content is None:
      raise FileNotFoundError("it is gone")
    return content

  def _name(self, file: pathlib.Path) -> str:
    """The name of an object in the bucket."""
    return file.relative_to(self.folder).as_posix()

  def _file(self, step: int) -> pathlib.Path:
    return self._mine / f"{step // 1000:06d}" / f"{step:09d}.npz"

  def _check(self) -> None:
    if self._bucket is not None:
      about = self._bucket.read(self._about.name)
    else:
      about = self._about.read_bytes() if self._about.exists() else None
    if about is None:
      return
    try:
      stored = dict(json.loads(about))
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


def _local(array: jax.Array | np.ndarray) -> np.ndarray:
  """This process's part of an array that is split over its first axis."""
  if not isinstance(array, jax.Array):
    return np.asarray(array)
  shards = {shard.index[0].start or 0: shard.data for shard in array.addressable_shards}
  return np.concatenate([np.asarray(shards[start]) for start in sorted(shards)])


@final
class TeacherLogits:
  """The teachers' logits of each step, batch["targets"]: computed by one program for all sizes, or read from a cache.

  Args:
    teaching: the objective's.
    specs: shapes, dtypes and shardings of the inputs on the device, by name.
    mesh: where it runs.
    seed: as in `steps.step`.
    microbatches, memory: as in `step_programs.compile_steps`.
    cache: read where every process has a step, written where not; None: no cache.
    todo: the steps that are left; if the cache has them all, no teacher is compiled or put on a device.
    divide: whether the teachers' parameters are divided along "fsdp", as the student's are; else they are copies.
    report: called with the teachers' program when it is compiled.

  Attributes:
    specs: shapes, dtypes and shardings of the logits of a step.
    complete: whether the cache has all steps that are left.

  Raises:
    OutOfMemory: the teachers do not fit.
  """

  def __init__(
    self,
    teaching: Teaching,
    specs: dict[str, jax.ShapeDtypeStruct],
    mesh: Mesh,
    *,
    seed: int,
    microbatches: Sequence[int] = (1,),
    memory: float = math.inf,
    cache: TeacherCache | None,
    todo: range,
    divide: bool = True,
    report: Callable[[compilation.Program], None] = lambda program: None,
  ):
    self._teaching, self._mesh, self._cache = teaching, mesh, cache
    self._seed = jax.device_put(np.uint32(seed), sharding.replicated(mesh))
    split = sharding.batch_split(mesh)

    def fn(
      step: jax.Array, batch: Tree, frozen: Tree, seed: jax.Array, accumulate: int = 1
    ) -> Tree:
      return steps.targets(step, batch, frozen, teaching=teaching, seed=seed, accumulate=accumulate)

    args = (jax.ShapeDtypeStruct((), jnp.int32, sharding=sharding.replicated(mesh)), specs)
    made = jax.eval_shape(fn, *args, teaching.frozen, self._seed)
    self.specs = jax.tree.map(
      lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=split), made
    )
    # Decided once, and alike on all processes: they run the teachers' program together or not at all.
    self._cached = frozenset() if cache is None else _cached_everywhere(cache, todo)
    self.complete = len(self._cached) == len(todo)
    self.bytes = 0  # of the teachers' parameters on each device
    if not self.complete:
      where = sharding.divided(teaching.frozen, mesh) if divide else sharding.replicated(mesh)
      self._frozen = jax.device_put(teaching.frozen, where)
      self.bytes = sharding.bytes_each(self._frozen)

      def make(accumulate: int) -> compilation.Program:
        parted = functools.partial(fn, accumulate=accumulate)
        given = (*args, self._frozen, self._seed)
        return compilation.compile_one(parted, given, "the teachers", out_shardings=split)

      _, self._program = compilation.fewest_microbatches(make, microbatches, memory, "the teachers")
      report(self._program)

  def __call__(self, step: int, batch: dict[str, np.ndarray], done: jax.Array) -> Tree:
    """Returns the logits of a step on the device.

    Args:
      step: counted from 0.
      batch: this process's part, from the data.
      done: the same number as `step`, on the device.
    """
    if self._cache is not None and step in self._cached:
      return sharding.put_batch(self._cache.read(step, self.specs), self._mesh)
    inputs = sharding.put_batch({k: batch[k] for k in self._teaching.inputs}, self._mesh)
    logits = self._program.run(done, inputs, self._frozen, self._seed)
    if self._cache is not None:
      self._cache.write(step, logits)
    return logits


def _cached_everywhere(cache: TeacherCache, todo: range) -> frozenset[int]:
  """Steps whose logits are cached on every process."""
  cached = np.array([cache.has(step) for step in todo], bool)
  if jax.process_count() > 1:
    cached = multihost_utils.process_allgather(cached).all(axis=0)
  return frozenset(np.array(todo)[cached].tolist())
