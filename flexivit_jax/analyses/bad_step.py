"""Replays the steps from the checkpoint before a step that was not finite, and reports on that step.

The steps in between are repeated bit for bit; the report names the gradients and parameters of the bad step that are
not finite, and says how large the others are.
"""

import contextlib
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from flexivit_jax import errors, experiment, trees
from flexivit_jax.data.loader import TrainBatches
from flexivit_jax.data.stream import Batch
from flexivit_jax.experiment import preparation, restoring
from flexivit_jax.running import signals
from flexivit_jax.running.checkpoint import Checkpoints
from flexivit_jax.running.session import next_batch
from flexivit_jax.sizes import SizeArgs, size_name
from flexivit_jax.training import patch_schedule, steps
from flexivit_jax.trees import Json, Params


def look(dump: pathlib.Path) -> list[str]:
  """Returns the lines of a report on the step of a dump.

  Raises:
    UserError: the dump cannot be read, or the checkpoint of its run is of a later step.
  """
  try:
    recorded = json.loads(dump.read_text())
    step, config = recorded["step"], json.loads((dump.parent / "config.json").read_text())
  except (OSError, ValueError, KeyError, TypeError) as e:
    raise errors.UserError(
      f"{dump} cannot be replayed ({type(e).__name__}); give RUN/bad_step.json beside RUN/config.json."
    ) from e
  trained = restoring.trained(dump.parent)
  if not isinstance(config, dict):
    raise errors.UserError(
      f"{dump.parent / 'config.json'} holds no config; expected a JSON object."
    )
  settings = {"name": "replay", **_tuples(config)}
  exp, mesh = preparation.place(experiment.from_config(settings, trained=trained))
  with contextlib.ExitStack() as stack:
    state, schedule, batches = _before(exp, dump.parent, step, mesh)
    stack.enter_context(batches)
    step_fn = preparation.compile_step(exp, state, mesh, stack.enter_context)
    lines = [f"from step {int(state.step)} to step {step}"]
    for at in range(int(state.step) + 1, step + 1):
      size = patch_schedule.draw(
        exp.flexi, seed=exp.seed, step=at - 1, total_steps=exp.total_steps, state=schedule
      )
      batch = next_batch(batches, exp.batches_of(size), signals.Stop())
      if at == step:
        before = jax.device_get(state.params)
        new, measured, grads = step_fn.look(at, size, state, batch)
        measured, grads, after = jax.device_get((measured, grads, new.params))
        return lines + _report(recorded, size, batch, measured, grads, before, after)
      state, measured = step_fn(at, size, state, batch)
      schedule = patch_schedule.update(
        exp.flexi, schedule, step=at, drawn=size, loss=float(measured["loss"])
      )
  raise errors.UserError(f"{dump} is of step {step}, and the run's checkpoint of a later one.")


def _tuples(value: Any) -> Any:
  """Turns the lists of a JSON value back into tuples."""
  if isinstance(value, dict):
    return {k: _tuples(v) for k, v in value.items()}
  return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _before(
  exp: experiment.Experiment, folder: pathlib.Path, step: int, mesh: Mesh
) -> tuple[steps.TrainState, patch_schedule.State, TrainBatches]:
  """Returns the state of the newest checkpoint before a step (or the first state), the schedule and the batches."""
  state = preparation.first_state(exp, mesh)
  checkpoints = Checkpoints(folder / "checkpoints", read_only=True)
  try:
    latest = checkpoints.latest_step()
    if latest is not None and latest < step:
      params, rest, record = checkpoints.restore(latest, state.params, preparation.rest(state))
      batches = exp.batches(0)
      batches.set_state(record["data"])
      return steps.TrainState(params=params, **rest), record.get("schedule", {}), batches
  finally:
    checkpoints.close()
  return state, patch_schedule.init_state(exp.flexi), exp.batches(0)


def _report(
  dump: Json,
  size: SizeArgs,
  batch: Batch,
  measured: Mapping[str, np.ndarray],
  grads: Params,
  before: Params,
  after: Params,
) -> list[str]:
  again = {k: float(v) for k, v in measured.items()}
  dumped = {k: float(v) for k, v in dump["measured"].items()}
  same = all(np.array_equal(again[k], dumped[k], equal_nan=True) for k in again)
  ids = np.asarray(batch.get("_id", ()))
  lines = [
    f"step {dump['step']}, {size_name(size)}, {len(ids)} examples"
    + (", those of the dump" if ids.tolist() == dump["ids"] else ""),
    f"{again}: {'as in the dump' if same else f'other than in the dump: {dumped}'}",
  ]
  for what, tree in (
    ("parameter before the step", before),
    ("gradient", grads),
    ("parameter after it", after),
  ):
    flat = trees.flatten(tree)
    bad = [name for name, leaf in flat.items() if not np.isfinite(leaf).all()]
    finite = [np.abs(leaf[np.isfinite(leaf)]).max(initial=0.0) for leaf in flat.values()]
    largest = max(zip(finite, flat, strict=True))
    lines.append(
      f"{what}: {len(bad)} of {len(flat)} not finite{': ' + ', '.join(bad[:5]) if bad else ''}; the largest finite"
      f" value is {largest[0]:.3g} in {largest[1]}"
    )
  return lines
