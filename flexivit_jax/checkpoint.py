"""Checkpoints of a run: written in the background by Orbax, listed only once complete.

A checkpoint holds the parameters, the rest of the training state, and a small JSON record that says what model they
are of and where in the data the run was.
"""

import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp

from flexivit_jax import errors, trees


class Checkpoints:
  """The folder RUN/checkpoints: one subfolder for each saved step.

  Args:
    folder: made when the first checkpoint is written.
    keep: how many of the newest to keep; None keeps all.
  """

  def __init__(self, folder: pathlib.Path, *, keep: int | None = 1):
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
    handlers = {
      "params": ocp.StandardCheckpointHandler(),
      "state": ocp.StandardCheckpointHandler(),
      "record": ocp.JsonCheckpointHandler(),
    }
    self.folder = pathlib.Path(folder).absolute()
    self._manager = ocp.CheckpointManager(self.folder, options=options, item_handlers=handlers)

  def latest_step(self) -> int | None:
    """The newest complete checkpoint's step, or None."""
    return self._manager.latest_step()

  def save(self, step: int, params: Any, state: Any, record: dict[str, Any]) -> None:
    """Copies the arrays and returns; the files are written in the background."""
    items = ocp.args.Composite(
      params=ocp.args.StandardSave(params),
      state=ocp.args.StandardSave(state),
      record=ocp.args.JsonSave(record),
    )
    self._manager.save(step, args=items)

  def restore(self, step: int, params: Any, state: Any) -> tuple[Any, Any, dict[str, Any]]:
    """Returns (params, state, record) of a step, with the shapes, dtypes and shardings of the arguments.

    Raises:
      UserError: if the checkpoint's arrays differ in name, shape or dtype; nothing is cast.
    """
    self._check(step, "params", params)
    items = ocp.args.Composite(
      params=ocp.args.StandardRestore(params),
      state=ocp.args.StandardRestore(state),
      record=ocp.args.JsonRestore(),
    )
    restored = self._manager.restore(step, args=items)
    return restored.params, restored.state, restored.record

  def restore_params(self, step: int) -> tuple[Any, dict[str, Any]]:
    """Returns (params, record) of a step, on the default device.

    Raises:
      UserError: arrays of a dtype that JAX would cast to another one.
    """
    record = self._manager.restore(
      step, args=ocp.args.Composite(record=ocp.args.JsonRestore())
    ).record
    self._check_dtypes(step)
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    stored = self._manager.item_metadata(step).params
    like = jax.tree.map(
      lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype, sharding=here), dict(stored.items())
    )
    return self._manager.restore(
      step, args=ocp.args.Composite(params=ocp.args.StandardRestore(like))
    ).params, record

  def close(self) -> None:
    """Waits until everything is on disk; raises what went wrong there."""
    self._manager.wait_until_finished()
    self._manager.close()

  def _check_dtypes(self, step: int) -> None:
    stored = dict(self._manager.item_metadata(step).params.items())
    got = jax.tree.map(lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype), stored)
    kept = jax.tree.map(
      lambda m: jax.ShapeDtypeStruct(m.shape, jax.dtypes.canonicalize_dtype(m.dtype)), got
    )
    if lines := trees.diff(kept, got):
      where = self.folder / str(step)
      raise errors.UserError(f"{where} holds what JAX would cast:\n  " + "\n  ".join(lines))

  def _check(self, step: int, item: str, like: Any) -> None:
    stored = dict(getattr(self._manager.item_metadata(step), item).items())
    got = jax.tree.map(lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype), stored)
    lines = trees.diff(like, got)
    if lines:
      where = self.folder / str(step)
      raise errors.UserError(
        f"{where} does not fit the model of this config:\n  " + "\n  ".join(lines)
      )


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


def load_params(path: pathlib.Path) -> tuple[Any, dict[str, Any]]:
  """Returns (params, record) of a run, a checkpoints folder (the newest step), or one step."""
  folder, step = find(path)
  checkpoints = Checkpoints(folder, keep=None)
  try:
    return checkpoints.restore_params(step)
  finally:
    checkpoints.close()
