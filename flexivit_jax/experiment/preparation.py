"""What a run's steps need before the first: the mesh, the state, the teachers, the programs."""

import contextlib
import functools
import json
import math
import pathlib
import shlex
import sys
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from flexivit_jax import errors, experiment, trees
from flexivit_jax.data import class_names
from flexivit_jax.devices import compilation, sharding
from flexivit_jax.running import checkpoint, distributed
from flexivit_jax.sizes import size_name
from flexivit_jax.training import patch_schedule, step_programs, steps, teaching
from flexivit_jax.training.teacher_cache import TeacherCache


def trained(workdir: pathlib.Path) -> class_names.Trained | None:
  """What the newest checkpoint in a run folder says of its classes; None: there is none. Changes nothing there."""
  newest = checkpoint.read_record(workdir / "checkpoints")
  return newest and class_names.trained(newest[1], str(workdir))


def place(exp: experiment.Experiment) -> tuple[experiment.Experiment, Any]:
  """Returns the experiment, its model knowing the mesh where that divides parameters, and the mesh that it names."""
  mesh = sharding.make_mesh(**{k: v for k, v in exp.mesh.items() if k != "divide_teachers"})
  for name, evaluation in exp.evaluations.items():
    sharding.check_divides(evaluation.section["batch_size"], mesh, f"evals.{name}.batch_size")
  if mesh.shape["fsdp"] > 1:
    exp = exp._replace(model=exp.model.clone(fsdp=mesh))
  return exp, mesh


def parts(exp: experiment.Experiment, mesh: Any) -> tuple[list[int], float]:
  """Into how many parts a batch may be divided, and the bytes of each device into which a step has to fit."""
  if exp.accumulate != "auto":
    sharding.check_divides(exp.batch_size // int(exp.accumulate), mesh)
    return [int(exp.accumulate)], math.inf
  sharding.check_divides(exp.batch_size, mesh)
  if exp.memory_gib is not None:
    return sharding.possible_parts(exp.batch_size, mesh), exp.memory_gib * 2**30
  memory = distributed.smallest(compilation.device_memory())  # other parts would be other programs
  return sharding.possible_parts(exp.batch_size, mesh), memory


def abstract_state(exp: experiment.Experiment) -> steps.TrainState:
  """The shapes and dtypes of the training state; nothing is computed."""
  return jax.eval_shape(functools.partial(_init, exp), exp.init, np.uint32(exp.seed))


def first_state(exp: experiment.Experiment, mesh: Any) -> steps.TrainState:
  """The state before the first step, made where it lives: what is divided is never whole on a device."""
  init = jax.jit(functools.partial(_init, exp))
  given = None if exp.init is None else jax.device_put(exp.init, sharding.divided(exp.init, mesh))
  seed = np.uint32(exp.seed)
  where = sharding.divided(jax.eval_shape(init, given, seed), mesh)
  state = jax.jit(init, out_shardings=where)(given, seed)
  note(
    f"{trees.count(state.params):,} parameters on {mesh.size} x {jax.devices()[0].device_kind}"
    + (f", divided by {mesh.shape['fsdp']}" if mesh.shape["fsdp"] > 1 else "")
  )
  return state


def _init(exp: experiment.Experiment, given: Any, seed: jax.Array) -> steps.TrainState:
  params = steps.init_params(exp.model, exp.image_shape, seed, exp.head_bias)
  params = {**params, **(given or {})}  # what is given may lack the head
  return steps.init_state(params, exp.optimizer.tx, exp.objective)


def rest(state: steps.TrainState) -> dict[str, Any]:
  """What a checkpoint holds beside the parameters."""
  found = {k: v for k, v in state._asdict().items() if k != "params"}
  return {k: v for k, v in found.items() if v is not None}


def constants(exp: experiment.Experiment, mesh: Any) -> dict[str, jax.Array]:
  """What is the same in all steps of a run, and other in another run of the same programs."""
  numbers = {"seed": np.uint32(exp.seed), "total_steps": np.int32(exp.total_steps)}
  return jax.device_put(numbers, sharding.replicated(mesh))


def targets(
  exp: experiment.Experiment, start: int, mesh: Any, stack: contextlib.ExitStack, **fit: Any
) -> teaching.Targets | None:
  """What the teachers say of each step that is left; None without teachers. `fit`: `parts` and `memory`."""
  if exp.objective.teaching is None:
    return None
  cache = None
  if exp.teacher_cache is not None:
    process = (jax.process_index(), jax.process_count())
    cache = TeacherCache(exp.teacher_cache, exp.drawn, process)
    stack.enter_context(contextlib.closing(cache))
  found = teaching.Targets(
    exp.objective.teaching,
    _specs(exp, exp.objective.teaching.inputs, mesh),
    mesh,
    seed=exp.seed,
    cache=cache,
    todo=range(start, exp.total_steps),
    divide=exp.mesh.get("divide_teachers", True),
    report=lambda program: note(f"compiled teachers: {program.seconds:.1f} s"),
    **fit,
  )
  if found.complete:
    note(f"teachers: their logits of all steps are in {exp.teacher_cache}")
  return found


def programs(
  exp: experiment.Experiment,
  state: steps.TrainState,
  taught: teaching.Targets | None,
  mesh: Any,
  **fit: Any,
) -> step_programs.StepPrograms:
  """Compiles the steps at all sizes. `fit`: `parts` and `memory`."""
  batch = _specs(exp, exp.objective.inputs, mesh)
  if taught is not None:
    batch["targets"] = taught.specs
  sizes = sorted(patch_schedule.all_static(exp.flexi), key=exp.step_flops)
  made = step_programs.compile_steps(
    sizes,
    state,
    batch,
    constants(exp, mesh),
    mesh,
    model=exp.model,
    objective=exp.objective,
    tx=exp.optimizer.tx,
    skip_above=exp.skip_above,
    batches_of=exp.batches_of,
    update_scale=exp.update_scale,
    report=report_of("train", exp),
    **fit,
  )
  note(f"{len(sizes)} sizes and the update compiled in {made.seconds:.1f} s")
  return made


def _specs(exp: experiment.Experiment, inputs: Any, mesh: Any) -> dict[str, Any]:
  local = exp.batch_size // jax.process_count()
  shapes = {name: (local, *exp.input_shapes[name]) for name in inputs}
  return sharding.specs({k: np.broadcast_to(np.float32(0), s) for k, s in shapes.items()}, mesh)


def report_of(kind: str, exp: experiment.Experiment) -> Any:
  """Returns what says a line about each program that was compiled."""

  def report(size: dict, program: compilation.Program, parts: int = 1) -> None:
    if not size:
      note(f"compiled the update: {program.seconds:.1f} s, {_mib(program.bytes)}")
      return
    rows, columns = exp.model.grid(exp.image_shape[:2], **size).grid_hw
    note(
      f"compiled {kind} {size_name(size)}: {rows * columns} tokens,"
      f" {program.seconds:.1f} s, {_mib(program.bytes)}, {_mib(program.temp_bytes)} of it temporary"
      + (f", in {parts} parts" if parts > 1 else "")
    )

  return report


def check_frozen(exp: experiment.Experiment, stored: dict[str, str], where: Any) -> None:
  """Raises a UserError if a checkpoint was trained with other teachers."""
  if exp.frozen_digests != stored:
    raise errors.UserError(
      f"{where} was trained with other teachers: {stored} there, {exp.frozen_digests} here (sha256);"
      " give the same ones, or another --workdir."
    )


def check_data(
  own: Mapping[str, Any], stored: Mapping[str, Any], data: Mapping[str, Any], where: pathlib.Path
) -> None:
  """Compares where in the data a checkpoint was with what this config's data are.

  Args:
    own: state of this run's batches.
    stored: state of those of the checkpoint.
    data: the config's `input.data`, for the message.
    where: the checkpoint.

  Raises:
    UserError: another number of examples, batch size, seed or sampler: the next batches would be other ones.
  """
  named = pathlib.Path(str(data.get("data_dir") or data.get("name")), str(data.get("split")))
  lines = {
    "examples": f"{named} has {own['examples']} examples, and had {stored['examples']}",
    "batch_size": f"it was trained in batches of {stored['batch_size']}, not of {own['batch_size']}",
  }
  keys = [k for k in {**own, **stored} if k != "step" and own.get(k) != stored.get(k)]
  if keys:
    differs = "; ".join(lines.get(k, f"{k} was {stored.get(k)}, and is {own.get(k)}") for k in keys)
    weights = shlex.quote(json.dumps({"checkpoint": str(where)}, ensure_ascii=False))
    raise errors.UserError(
      f"{where} cannot be gone on from: {differs}. The order of the examples depends on that. Put it back, or"
      f" give another --workdir, where --config.init={weights} starts from these weights."
    )


def _mib(size: float) -> str:
  return f"{size / 2**20:.1f} MiB"


def note(message: str) -> None:
  """A line for who waits, from the first process."""
  if jax.process_index() == 0:
    print(message, file=sys.stderr, flush=True)
