"""Checkpoints of several processes that share no file system: process 0 writes, and has the others' arrays sent.

An array that is divided over the processes is gathered on their devices, one array at a time, and copied to the host of
process 0. On disk is what one process would have written. A copy of the state, and Orbax's copy of that, are in
the memory of that host until it is written; the other hosts hold none.
"""

import functools
import pathlib
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flexivit_jax.running import manifest
from flexivit_jax.running.checkpoint import Checkpoints
from flexivit_jax.trees import Json, Params, Tree


class Gathered:
  """As `Checkpoints`, of processes of which the first alone has the folder; all must call each method.

  What cannot be written is an error on process 0 only.

  Args:
    folder: of process 0.
    keep, name: see `Checkpoints`.
  """

  def __init__(self, folder: pathlib.Path, *, keep: int | None = 1, name: str | None = None):
    self.folder = pathlib.Path(folder).absolute()
    first = jax.process_index() == 0
    self._own = Checkpoints(folder, keep=keep, name=name, own=True) if first else None

  def save(self, step: int, params: Params, state: Tree, record: Json) -> None:
    """Gathers the arrays and returns; process 0 writes them in the background."""
    divided = {"params": params, "state": state}
    host = jax.tree.map(whole, divided)
    if self._own is not None:
      pieces = {item: manifest.pieces_of(host[item], divided[item]) for item in host}
      self._own.save(step, host["params"], host["state"], record, pieces=pieces)

  def check(self) -> None:
    """See `Checkpoints.check`."""
    if self._own is not None:
      self._own.check()

  def wait(self) -> None:
    """See `Checkpoints.wait`; the other processes do not wait."""
    if self._own is not None:
      self._own.wait()

  def latest_step(self) -> int | None:
    """Returns the step of the newest complete checkpoint, or None; None on the other processes."""
    return None if self._own is None else self._own.latest_step()

  def verify(self, step: int) -> manifest.Manifest:
    """See `Checkpoints.verify`; on process 0 only."""
    return self._first().verify(step)

  def record(self, step: int) -> Json:
    """See `Checkpoints.record`; on process 0 only."""
    return self._first().record(step)

  def delete_from(self, step: int) -> None:
    """Deletes the checkpoints of this step and later ones."""
    if self._own is not None:
      self._own.delete_from(step)

  def close(self) -> None:
    """See `Checkpoints.close`."""
    if self._own is not None:
      self._own.close()

  def _first(self) -> Checkpoints:
    assert self._own is not None, "only process 0 has the folder"
    return self._own


def whole(leaf: jax.Array | np.ndarray) -> np.ndarray | None:
  """Returns an array in the host memory of process 0, None on the others; all must call it.

  Nothing is sent where process 0 has all pieces: where they are copies, or divided over its own devices.
  """
  first = jax.process_index() == 0
  if not isinstance(leaf, jax.Array) or leaf.is_fully_replicated:
    return np.asarray(leaf) if first else None
  if _is_on_first(leaf):
    return _joined(leaf) if first else None
  # A device has room for its share of one array, hardly for all: they come one after the other.
  if jax.process_count() * leaf.addressable_shards[0].data.size < leaf.size:
    return _gathered_by_place(leaf)
  assert isinstance(leaf.sharding, NamedSharding), leaf.sharding
  gathered = jax.block_until_ready(_resharded(leaf.sharding.mesh, PartitionSpec())(leaf))
  return np.asarray(gathered) if first else None


def _gathered_by_place(leaf: jax.Array) -> np.ndarray | None:
  """As `whole`: the n-th device of each process has the pieces of all n-th devices sent, not the whole array."""
  places = np.array([jax.local_devices(process_index=i) for i in range(jax.process_count())])
  mesh = Mesh(places, ("process", "place"))
  shards = [shard.data[None, None] for shard in leaf.addressable_shards]
  of_all = jax.make_array_from_single_device_arrays(
    (*places.shape, *shards[0].shape[2:]),
    NamedSharding(mesh, PartitionSpec("process", "place")),
    shards,
  )
  gathered = jax.block_until_ready(_resharded(mesh, PartitionSpec(None, "place"))(of_all))
  if jax.process_index() != 0:
    return None
  indices = leaf.sharding.devices_indices_map(leaf.shape)
  array = np.empty(leaf.shape, leaf.dtype)
  for shard in gathered.addressable_shards:
    for process, pieces in enumerate(np.asarray(shard.data)):
      array[indices[places[process, shard.index[1].start]]] = pieces[0]
  return array


def _is_on_first(leaf: jax.Array) -> bool:
  """Whether the devices of process 0 hold all pieces."""
  indices = leaf.sharding.devices_indices_map(leaf.shape)
  first = set(jax.local_devices(process_index=0))
  on_first = {str(index) for device, index in indices.items() if device in first}
  return on_first == {str(index) for index in indices.values()}


def _joined(leaf: jax.Array) -> np.ndarray:
  array = np.empty(leaf.shape, leaf.dtype)
  for shard in leaf.addressable_shards:
    array[shard.index] = np.asarray(shard.data)
  return array


@functools.cache
def _resharded(mesh: Mesh, spec: PartitionSpec) -> Callable[[jax.Array], jax.Array]:
  return jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, spec))
