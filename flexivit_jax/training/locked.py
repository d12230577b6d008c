"""The locked image tower's part of each step: embeddings that a program of their own makes, or that are cached on disk.

A tower that does not move gives an example the same vector at a size in every epoch and every run, so the cache is one
file for each size with a row for each example. Each row has a checksum: one that is missing, torn or damaged is made
again.
"""

import functools
import hashlib
import json
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import final

import jax
import numpy as np
import xxhash
from jax.sharding import Mesh
from jaxtyping import Float, Integer

from flexivit_jax import files
from flexivit_jax.devices import compilation, sharding
from flexivit_jax.sizes import SizeArgs, SizeKey, size_key, size_name
from flexivit_jax.trees import Params

Rows = Float[np.ndarray, "n e"]
_SUM = 8  # bytes of a checksum


@final
class EmbeddingCache:
  """Vectors of examples by number and size, below a folder of their own for everything that they depend on.

  Args:
    folder: holds one folder for each identity.
    identity: JSON-able; everything that the vectors depend on but the size and the example.
    examples: their number.
    length: of a vector.
  """

  def __init__(
    self, folder: str | pathlib.Path, identity: Mapping[str, object], examples: int, length: int
  ):
    about = json.dumps(dict(identity), default=str, sort_keys=True, indent=1)
    name = hashlib.sha256(about.encode()).hexdigest()[:16]
    self.folder = pathlib.Path(folder) / name
    self._about, self._shape = about, (examples, 4 * length + _SUM)
    self._files: dict[SizeKey, np.memmap] = {}

  def read(self, size: SizeArgs, ids: Integer[np.ndarray, "n"]) -> Rows | None:
    """Returns the vectors of examples; None where one of them is not there, or is damaged."""
    rows = np.ascontiguousarray(self._file(size)[ids])
    content, sums = rows[:, :-_SUM], rows[:, -_SUM:]
    if any(
      _sum(row, i) != s.tobytes() for row, i, s in zip(content, ids.tolist(), sums, strict=True)
    ):
      return None
    return np.ascontiguousarray(content).view(np.float32)

  def write(self, size: SizeArgs, ids: Integer[np.ndarray, "n"], vectors: Rows) -> None:
    """Adds the vectors of examples. A row that a kill tears has another checksum, and is not there."""
    content = np.ascontiguousarray(vectors, np.float32).view(np.uint8)
    sums = [_sum(row, i) for row, i in zip(content, ids.tolist(), strict=True)]
    joined = np.frombuffer(b"".join(sums), np.uint8).reshape(len(sums), _SUM)
    self._file(size)[ids] = np.concatenate([content, joined], axis=1)

  def _file(self, size: SizeArgs) -> np.memmap:
    key = size_key(size)
    if key not in self._files:
      path = self.folder / f"{size_name(size).replace(' ', '_')}.rows"
      if not path.exists():
        self.folder.mkdir(parents=True, exist_ok=True)
        files.write_atomically(self.folder / "identity.json", self._about, unique=True)
        with path.open("ab") as file:  # zeros, of which no row has its checksum; sparse on disk
          file.truncate(self._shape[0] * self._shape[1])
      self._files[key] = np.memmap(path, np.uint8, "r+", shape=self._shape)
    return self._files[key]


def _sum(row: np.ndarray, example: int) -> bytes:
  """The checksum of a row: zeros have one that is not 0, a row in the place of another a wrong one."""
  return xxhash.xxh64_digest(row.tobytes(), seed=example + 1)


@final
class LockedTower:
  """Unit vectors of a batch's images at a size, batch["embedded"].

  Args:
    embed: `(params, images, **size) -> vectors [n, e]`, pure.
    params: of the tower, or their shapes.
    specs: shape, dtype and sharding of a batch's images.
    sizes: at which it runs.
    mesh: where it runs.
    cache: read where it has all examples of a batch, written where not.
    report: called with each compiled program.
  """

  def __init__(
    self,
    embed: Callable[..., jax.Array],
    params: Params,
    specs: jax.ShapeDtypeStruct,
    sizes: Iterable[SizeArgs],
    mesh: Mesh,
    *,
    cache: EmbeddingCache,
    report: Callable[[dict, compilation.Program], None] = lambda size, program: None,
  ):
    self._mesh, self._cache = mesh, cache
    split = sharding.batch_split(mesh)
    self._programs = {}
    for size in sizes:
      made = functools.partial(embed, **size)
      name = f"the locked tower at {size_name(size)}"
      program = compilation.compile_one(made, (params, specs), name, out_shardings=split)
      report(dict(size), program)
      self._programs[size_key(size)] = program
    shape = jax.eval_shape(made, params, specs)
    self.specs = jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=split)

  def __call__(self, size: SizeArgs, params: Params, batch: Mapping[str, np.ndarray]) -> jax.Array:
    """Returns the vectors of a batch [n, e] on the devices; `params` are those of the tower, which do not move."""
    ids = batch["_id"]
    rows = self._cache.read(size, ids)
    if rows is not None:
      return sharding.put_batch({"embedded": rows}, self._mesh)["embedded"]
    images = sharding.put_batch({"image": batch["image"]}, self._mesh)["image"]
    made = self._programs[size_key(size)].run(params, images)
    self._cache.write(size, ids, np.asarray(made))
    return made
