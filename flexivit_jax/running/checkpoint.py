"""Checkpoints of a run: Orbax writes them in the background; they are listed once complete and checked before use.

A checkpoint holds the parameters, the rest of the training state, a small JSON record (the model's fields and the
position in the data), and a manifest with the checksums of all these (see `manifest`). Orbax adds two files after the
save, _CHECKPOINT_METADATA and commit_success.txt; the manifest does not cover them and we do not read them.
"""

import contextlib
import functools
import json
import pathlib
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from flexivit_jax import errors, files, trees
from flexivit_jax.running import manifest
from flexivit_jax.trees import Json, Params, Tree

_UNSEALED = (manifest.FOLDER, "_CHECKPOINT_METADATA", "commit_success.txt")
RESUME = ("latest", "latest-valid")
BEST = "best"  # the folder of a run's best checkpoint, see `following`
_OLD = "old"  # replaced checkpoints are moved here at once and deleted later
_LOOK_S = 2.0
_ITEMS = ("params", "state")
_MERGED = "manifest.ocdbt"  # Orbax merges the parts of all processes into it; nothing can be read without it


class Checkpoints:
  """The folder RUN/checkpoints: one subfolder for each saved step.

  Args:
    folder: its name may be any, see `files.Alias`; created unless `read_only`.
    keep: number of newest checkpoints to keep; None keeps all.
    name: distinguishes several such folders of one run when several processes write; None: the main folder.
    read_only: creates and deletes nothing, because a run may be writing there and an unfinished save may be its own.
      Only the process that holds the lock (`run_folder.locked`) writes, and deletes unfinished saves of earlier ones.
    own: only this one of several processes opens the folder, and waits for no other; see `gathered`.
  """

  def __init__(
    self,
    folder: pathlib.Path,
    *,
    keep: int | None = 1,
    name: str | None = None,
    read_only: bool = False,
    own: bool = False,
  ):
    # Replaced checkpoints are moved before they are deleted: an interrupted deletion must not damage a listed one.
    alone = dict(primary_host=jax.process_index(), active_processes={jax.process_index()})
    prefix = f"own {name}" if own else name
    together = ocp.options.MultiprocessingOptions(
      barrier_sync_key_prefix=prefix, **(alone if own else {})
    )
    writing = dict(
      max_to_keep=keep,
      cleanup_tmp_directories=True,
      todelete_subdir=_OLD,
      multiprocessing_options=together,
      create=not own,  # Orbax refuses to; it is created below
    )
    # Orbax's own read_only would warn each time.
    reading = dict(create=False, **(dict(multiprocessing_options=together) if own else {}))
    options = ocp.CheckpointManagerOptions(**(reading if read_only else writing))
    handlers = {
      "params": ocp.StandardCheckpointHandler(multiprocessing_options=together),
      "state": ocp.StandardCheckpointHandler(multiprocessing_options=together),
      "record": ocp.JsonCheckpointHandler(multiprocessing_options=together),
      manifest.FOLDER: _ManifestHandler(),  # the last: it seals the others
    }
    self.folder = pathlib.Path(folder).absolute()
    if not read_only:
      self.folder.mkdir(parents=True, exist_ok=True)
    self._alias = files.Alias(self.folder)
    self._manager = ocp.CheckpointManager(self._alias.path, options=options, item_handlers=handlers)
    self._sweeper = futures.ThreadPoolExecutor(1)
    self._swept: futures.Future | None = None
    self._saved, self._looked = False, -_LOOK_S

  def latest_step(self) -> int | None:
    """Returns the step of the newest complete checkpoint, or None."""
    return self._manager.latest_step()

  def choose(self, resume: str = "latest", note: Callable[[str], None] = print) -> int | None:
    """Returns the step to resume from; None if nothing was saved yet.

    Args:
      resume: "latest" takes the newest checkpoint, which must be whole; "latest-valid" the newest whole one.
      note: called with one line for each checkpoint that is skipped.

    Raises:
      Damaged: the newest checkpoint is damaged ("latest"), or all are ("latest-valid"). A run never starts again from
        step 0 when there are checkpoints to lose.
    """
    if resume not in RESUME:
      raise errors.unknown("--resume", resume, RESUME)
    steps = sorted(self._manager.all_steps(), reverse=True)
    for step in steps:
      try:
        self.verify(step)
        return step
      except manifest.Damaged as damage:
        if resume == "latest":
          whole = next((s for s in steps[1:] if self._is_whole(s)), None)
          way = (
            _MOVE
            if whole is None
            else f"--resume=latest-valid goes on from step {whole}, which is whole"
          )
          raise manifest.Damaged(
            f"The newest checkpoint, step {step}, cannot be used: {damage} {way[0].upper()}{way[1:]}."
          ) from damage
        note(f"step {step} is passed over: {damage}")
    if steps:
      raise manifest.Damaged(f"No checkpoint in {self.folder} is whole; {_MOVE}.")
    return None

  def verify(self, step: int) -> manifest.Manifest:
    """Compares the files of a step with its manifest, opens its arrays, and returns the manifest.

    Raises:
      Damaged: files differ, or their arrays cannot be opened.
    """
    folder = self.folder / str(step)
    sums = manifest.read(folder / manifest.FOLDER)
    manifest.check_files(folder, sums, _UNSEALED)
    for item in _ITEMS:
      self._stored(step, item)
    return sums

  def _is_whole(self, step: int) -> bool:
    try:
      self.verify(step)
    except manifest.Damaged:
      return False
    return True

  def verify_arrays(self, step: int) -> None:
    """Does `verify`, then compares each array with its checksum; holds one item at a time in host memory."""
    sums = self.verify(step)
    for item in _ITEMS:
      with self._opened(step, item):
        arrays = _read(self._alias.path / str(step) / item)
      manifest.check_arrays(self.folder / str(step), item, arrays, sums)

  def _stored(self, step: int, item: str) -> Tree:
    """Returns the tree of an item's shapes and dtypes on disk."""
    with self._opened(step, item):
      return listing(self._alias.path / str(step) / item)

  @contextlib.contextmanager
  def _opened(self, step: int, item: str) -> Iterator[None]:
    """Turns what Orbax and TensorStore raise inside into `Damaged`, one line."""
    try:
      yield
    except errors.UserError:
      raise
    except Exception as e:
      where = self.folder / str(step) / item
      raise manifest.Damaged(
        f"{where} cannot be opened: {self._alias.in_words(_reason(e))}; its files are all there, so it was not written"
        " in full."
      ) from e

  def save(
    self,
    step: int,
    params: Params,
    state: Tree,
    record: Json,
    *,
    pieces: dict[str, dict[str, np.ndarray]] | None = None,
  ) -> None:
    """Copies the arrays and returns; files and checksums are written in the background.

    Args:
      step: of the checkpoint.
      params, state: arrays.
      record: as JSON.
      pieces: item -> the arrays or pieces that get checksums, by name; default: those of `manifest.pieces`.

    Raises:
      UserError: this or the previous checkpoint cannot be written; names the folder and the reason.
    """
    items = ocp.args.Composite(
      params=ocp.args.StandardSave(params),
      state=ocp.args.StandardSave(state),
      record=ocp.args.JsonSave(record),
      **{manifest.FOLDER: _SaveManifest({"params": params, "state": state}, pieces)},
    )
    self._or_user_error(lambda: self._manager.save(step, args=items))
    self._saved = True

  def check_room(self, state: Tree) -> None:
    """Raises a UserError if the disk has no room for one checkpoint of this state."""
    folder = next(p for p in (self.folder, *self.folder.parents) if p.exists())
    needed, free = trees.size_in_bytes(state), shutil.disk_usage(folder).free
    if free < needed:
      raise errors.UserError(
        f"A checkpoint takes {needed / 2**20:.0f} MiB, where {self.folder} is there are {free / 2**20:.0f} MiB; make"
        " room, or give another --workdir."
      )

  def check(self) -> None:
    """Raises a UserError if a background save has failed; takes microseconds.

    Also starts the background deletion of replaced checkpoints.
    """
    self._or_user_error(self._manager.check_for_errors)
    if time.monotonic() - self._looked > _LOOK_S:
      self._sweep()

  def wait(self) -> None:
    """Waits until everything is on disk; raises as `save` does."""
    self._or_user_error(self._manager.wait_until_finished)

  def _or_user_error(self, call: Callable[[], object]) -> None:
    try:
      call()
    except errors.UserError:
      raise
    except Exception as e:
      reason = self._alias.in_words(_reason(e))
      raise errors.UserError(
        f"A checkpoint could not be written to {self.folder}: {reason}. What was saved before it is still there; make"
        " room or mend the folder, and run the same command again."
      ) from e

  def restore(
    self, step: int, params: Params, state: Tree, *, verified: bool = False
  ) -> tuple[Params, Tree, Json]:
    """Returns (params, state, record) of a step, with the shapes, dtypes and shardings of the arguments.

    Args:
      step: of the checkpoint.
      params, state: arrays, or their shapes, dtypes and shardings.
      verified: `verify` was already done, here or on another process; only arrays are compared.

    Raises:
      UserError: the arrays differ in name, shape or dtype; nothing is cast.
      Damaged: a file or an array differs from what was written.
    """
    sums = (
      manifest.read(self.folder / str(step) / manifest.FOLDER) if verified else self.verify(step)
    )
    self.check_fit(step, params, state)
    items = ocp.args.Composite(
      params=ocp.args.StandardRestore(params),
      state=ocp.args.StandardRestore(state),
      record=ocp.args.JsonRestore(),
    )
    with self._opened(step, "params"):
      restored = self._manager.restore(step, args=items)
    for item in _ITEMS:
      manifest.check_arrays(self.folder / str(step), item, restored[item], sums)
    return restored.params, restored.state, restored.record

  def check_fit(self, step: int, params: Params, state: Tree) -> None:
    """Compares the names, shapes and dtypes of a step's arrays with these.

    Raises:
      UserError: they differ.
    """
    for item, like in zip(_ITEMS, (params, state), strict=True):
      if lines := trees.diff(like, self._stored(step, item)):
        where = self.folder / str(step)
        raise errors.UserError(
          f"{where} does not fit the model of this config: {'; '.join(lines)}. Give another --workdir."
        )

  def restore_params(self, step: int) -> tuple[Params, Json]:
    """Returns (params, record) of a step, on the default device.

    Raises:
      UserError: an array has a dtype that JAX would cast.
      Damaged: a file or an array differs from what was written.
    """
    sums = self.verify(step)
    record = self.record(step)
    stored = self._stored(step, "params")
    self._check_dtypes(step, stored)
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    like = jax.tree.map(lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype, sharding=here), stored)
    items = ocp.args.Composite(params=ocp.args.StandardRestore(like))
    with self._opened(step, "params"):
      params = self._manager.restore(step, args=items).params
    manifest.check_arrays(self.folder / str(step), "params", params, sums)
    return params, record

  def record(self, step: int) -> Json:
    """Returns the record of a step; one process may call it alone, unlike Orbax's restore, which waits for all."""
    with self._opened(step, "record"):
      return json.loads((self.folder / str(step) / "record" / "metadata").read_bytes())

  def delete_from(self, step: int) -> None:
    """Deletes the checkpoints of this step and later ones."""
    self.wait()
    for later in self._manager.all_steps():
      if later >= step:
        self._or_user_error(functools.partial(self._manager.delete, later))

  def close(self) -> None:
    """Waits until everything is on disk; raises as `save` does."""
    try:
      if self._saved:
        self.wait()
      self._manager.close()
    finally:
      self._alias.close()
    if self._saved:
      self._sweeper.shutdown()  # waits for the deletion in progress
      self._sweeper = futures.ThreadPoolExecutor(1)
      self._sweep()
    self._sweeper.shutdown()

  def _sweep(self) -> None:
    self._looked = time.monotonic()
    if jax.process_index() == 0 and (self._swept is None or self._swept.done()):
      old = self.folder / _OLD
      if old.is_dir() and (replaced := list(old.iterdir())):
        self._swept = self._sweeper.submit(_delete, replaced)

  def _check_dtypes(self, step: int, stored: Tree) -> None:
    canonical = jax.dtypes.canonicalize_dtype
    cast = jax.tree.map(lambda m: jax.ShapeDtypeStruct(m.shape, canonical(m.dtype)), stored)
    if lines := trees.diff(cast, stored):
      where = self.folder / str(step)
      raise errors.UserError(f"{where} holds what JAX would cast:\n  " + "\n  ".join(lines))


def listing(folder: pathlib.Path) -> Tree:
  """Opens each array in an item's folder and returns the tree of shapes and dtypes.

  Raises:
    FileNotFoundError: Orbax did not merge the parts of the processes.
  """
  if not (folder / _MERGED).is_file():
    raise FileNotFoundError(f"{_MERGED} is missing")
  metadata = ocp.StandardCheckpointHandler().metadata(epath.Path(folder))
  return jax.tree.map(lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype), dict(metadata.items()))


def _read(folder: pathlib.Path) -> Tree:
  """Reads the arrays of an item's folder into host memory."""
  numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), listing(folder))
  args = ocp.args.PyTreeRestore(restore_args=numpy)
  return ocp.PyTreeCheckpointHandler().restore(epath.Path(folder), args=args)


def _reason(error: Exception) -> str:
  first = str(error).splitlines()[0] if str(error) else ""
  return f"{type(error).__name__}: {first.partition(' [tensorstore_spec=')[0]}"


def _delete(folders: list[pathlib.Path]) -> None:
  for folder in folders:
    shutil.rmtree(folder, ignore_errors=True)


_MOVE = "move the folder away to start from the beginning"


class _ManifestHandler(ocp.AsyncCheckpointHandler):
  """Writes the checksums of arrays, computed while Orbax writes them, and of files once they are written.

  Each process computes the checksums of the pieces it saves. When all have written, process 0 opens the arrays,
  compares names, shapes and dtypes with what was saved, and merges the checksums.
  """

  _saved: Json

  async def async_save(self, directory: epath.Path, args: "_SaveManifest") -> list[Any]:
    folder, process = pathlib.Path(directory), jax.process_index()
    self._saved = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), args.items)
    # Views on a CPU (JAX does not donate memory that is viewed); copies from a device.
    host = args.pieces or {item: manifest.pieces(tree) for item, tree in args.items.items()}

    async def write() -> None:
      sums = {item: manifest.array_sums(arrays) for item, arrays in host.items()}
      manifest.write_part(folder, process, sums)

    return [ocp.future.CommitFutureAwaitingContractedSignals(write(), name="manifest")]

  def save(self, directory: epath.Path, args: "_SaveManifest") -> None:
    raise NotImplementedError("Saves are in the background.")

  def restore(self, directory: epath.Path, args: Any = None) -> manifest.Manifest:
    return manifest.read(pathlib.Path(directory))

  def finalize(self, directory: epath.Path) -> None:
    folder = pathlib.Path(directory)
    for item, saved in self._saved.items():
      if lines := trees.diff(saved, listing(folder.parent / item)):
        raise OSError(f"{item} is not what was saved: {'; '.join(lines)}")
    manifest.seal(folder, manifest.file_sums(folder.parent, skip=_UNSEALED))


@ocp.args.register_with_handler(_ManifestHandler, for_save=True, for_restore=True)
class _SaveManifest(ocp.args.CheckpointArgs):
  """The arrays of each item, and the pieces of them that get checksums."""

  def __init__(
    self, items: Json | None = None, pieces: dict[str, dict[str, np.ndarray]] | None = None
  ):
    self.items, self.pieces = items or {}, pieces


def find(path: pathlib.Path) -> tuple[pathlib.Path, int]:
  """Returns (checkpoint folder, step) for a run, its checkpoints folder, or one step in it.

  Raises:
    UserError: if there is no checkpoint there.
  """
  path = pathlib.Path(path).absolute()
  if (path / "record").is_dir() and path.name.isdigit():
    return path.parent, int(path.name)
  for folder in (path / "checkpoints", path):
    done = [int(p.name) for p in folder.glob("*") if p.name.isdigit() and (p / "record").is_dir()]
    if done:
      return folder, max(done)
  raise errors.UserError(
    f"No checkpoint in {path}; expected a run folder, its checkpoints/ or a step in it, or an .npz."
  )


def read_record(folder: pathlib.Path) -> tuple[int, Json] | None:
  """Returns the step and the record of the newest checkpoint with a whole record; None if there is none.

  Reads nothing else of a checkpoint: `choose` decides whether it is whole.

  Args:
    folder: RUN/checkpoints.
  """
  steps = (p for p in folder.glob("*") if p.name.isdigit() and (p / "record").is_dir())
  for step in sorted(steps, key=lambda p: int(p.name), reverse=True):
    file = step / "record" / "metadata"
    try:
      text = file.read_bytes()
      wanted = manifest.read(step / manifest.FOLDER).files.get("record/metadata")
      if wanted == manifest.bytes_sum(text):
        return int(step.name), json.loads(text)
    except (OSError, ValueError):  # Damaged is a ValueError
      continue
  return None


def record_of(path: pathlib.Path) -> Json:
  """Returns the record of a run, a checkpoints folder (the newest step), or one step; reads no array."""
  folder, step = find(path)
  checkpoints = Checkpoints(folder, read_only=True)
  try:
    return checkpoints.record(step)
  finally:
    checkpoints.close()


def load_params(path: pathlib.Path) -> tuple[Params, Json]:
  """Returns (params, record) of a run, a checkpoints folder (the newest step), or one step."""
  folder, step = find(path)
  checkpoints = Checkpoints(folder, read_only=True)
  try:
    return checkpoints.restore_params(step)
  finally:
    checkpoints.close()
