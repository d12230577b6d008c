"""The trainer: `python -m flexivit_jax.train --config configs/digits.py --workdir runs/digits`, or `flexivit train`.

One trainer for all experiments: what is minimised is an objective, what is drawn at each step is `config.flexi`, what
is measured is an evaluator. The same command continues a run that was stopped.
"""

import argparse
import contextlib
import json
import math
import pathlib
import sys
import time
from typing import Any

import jax
import numpy as np
from clu import parameter_overview

from flexivit_jax import (
  allocator,
  arguments,
  compilation,
  config,
  errors,
  experiment,
  metrics,
  patch_schedule,
  results,
  sharding,
  step_programs,
  steps,
  teaching,
  trees,
)
from flexivit_jax.checkpoint import Checkpoints
from flexivit_jax.evaluators.per_size import label, size_text
from flexivit_jax.models.flexivit import which_grid
from flexivit_jax.teacher_cache import TeacherCache


def train(settings: dict[str, Any], workdir: pathlib.Path) -> pathlib.Path:
  """Trains, evaluates and saves what a config says into a run folder; continues where the folder left off.

  Returns:
    The run folder: config.json, parameters.txt, metrics.jsonl, tb/, checkpoints/, eval.json.

  Raises:
    UserError: a mistake in the config; a checkpoint that does not fit it; a loss that is not finite.
  """
  config.check("", settings, experiment.build, given=("opening",))
  exp = experiment.build(**{"name": workdir.name, **settings})
  _note(
    f"{exp.name}: {exp.total_steps} steps of {exp.batch_size} ({exp.total_steps / exp.steps_per_epoch:.1f} epochs)"
  )
  for line in _costs(exp):
    _note(line)
  workdir.mkdir(parents=True, exist_ok=True)
  (workdir / "config.json").write_text(json.dumps(settings, indent=2, default=str) + "\n")
  mesh = sharding.make_mesh()
  parts, memory = _parts(exp, mesh)
  with contextlib.ExitStack() as stack:
    checkpoints = stack.enter_context(
      contextlib.closing(Checkpoints(workdir / "checkpoints", keep=exp.keep))
    )
    state, schedule, batches = _start_or_resume(exp, checkpoints, mesh)
    stack.enter_context(batches)
    start = int(state.step)
    overview = parameter_overview.get_parameter_overview(state.params, include_stats=False)
    (workdir / "parameters.txt").write_text(overview + "\n")
    writer = stack.enter_context(metrics.MetricsWriter(workdir, restored_step=start))
    evaluators = {name: e.make(exp.model, mesh) for name, e in exp.evaluations.items()}
    if start < exp.total_steps:
      held = memory - trees.size_in_bytes(state)
      targets = _targets(exp, start, mesh, stack, parts=parts, memory=held)
      programs = _compile(exp, state, targets, mesh, parts=parts, memory=memory)
      for evaluator in evaluators.values():
        evaluator.compile(state.params, _report_program("eval", exp))
      state = _loop(
        exp, state, schedule, targets, batches, programs, evaluators, checkpoints, writer, mesh
      )
    _final_evaluation(exp, state, evaluators, writer, workdir)
  return workdir


def _start_or_resume(
  exp: experiment.Experiment, checkpoints: Checkpoints, mesh: Any
) -> tuple[steps.TrainState, patch_schedule.State, Any]:
  """Returns the initial state or the newest checkpoint's, that of the schedule of sizes, and the batches from there."""
  state = _init(exp, mesh)
  latest = checkpoints.latest_step()
  if latest is None:
    return state, patch_schedule.init_state(exp.flexi), exp.batches(0)
  rest = _rest(state)
  params, rest, record = checkpoints.restore(latest, state.params, rest)
  _check_frozen(exp, record.get("frozen", {}), checkpoints.folder / str(latest))
  batches = exp.batches(0)
  batches.set_state(record["data"])
  epoch = latest / exp.steps_per_epoch
  _note(
    f"resumed from {checkpoints.folder / str(latest)}: step {latest}/{exp.total_steps}, epoch {epoch:.2f}"
  )
  return steps.TrainState(params=params, **rest), record.get("schedule", {}), batches


def _rest(state: steps.TrainState) -> dict[str, Any]:
  """What a checkpoint holds beside the parameters."""
  rest = {k: v for k, v in state._asdict().items() if k != "params"}
  return {k: v for k, v in rest.items() if v is not None}


def _init(exp: experiment.Experiment, mesh: Any) -> steps.TrainState:
  def init(given: Any, seed: jax.Array) -> steps.TrainState:
    params = steps.init_params(exp.model, exp.image_shape, seed, exp.head_bias)
    params = {**params, **(given or {})}  # what is given may lack the head
    return steps.init_state(params, exp.optimizer.tx, exp.objective)

  state = jax.jit(init, out_shardings=sharding.replicated(mesh))(exp.init, np.uint32(exp.seed))
  _note(f"{trees.count(state.params):,} parameters on {mesh.size} x {jax.devices()[0].device_kind}")
  return state


def _check_frozen(exp: experiment.Experiment, stored: dict[str, str], where: pathlib.Path) -> None:
  if exp.frozen_digests != stored:
    raise errors.UserError(
      f"{where} was trained with other teachers: {stored} there, {exp.frozen_digests} here (sha256);"
      " give the same ones, or another --workdir."
    )


def _parts(exp: experiment.Experiment, mesh: Any) -> tuple[list[int], float]:
  """Into how many parts a batch may be divided, and the bytes of each device into which a step has to fit."""
  if exp.accumulate != "auto":
    sharding.check_divides(exp.batch_size // int(exp.accumulate), mesh)
    return [int(exp.accumulate)], math.inf
  sharding.check_divides(exp.batch_size, mesh)
  memory = compilation.device_memory() if exp.memory_gib is None else exp.memory_gib * 2**30
  return sharding.possible_parts(exp.batch_size, mesh), memory


def _targets(
  exp: experiment.Experiment, start: int, mesh: Any, stack: contextlib.ExitStack, **fit: Any
) -> teaching.Targets | None:
  """What the teachers say of each step that is left; None without teachers."""
  if exp.objective.teaching is None:
    return None
  cache = None
  if exp.teacher_cache is not None:
    process = (jax.process_index(), jax.process_count())
    cache = TeacherCache(exp.teacher_cache, exp.drawn, process)
    stack.enter_context(contextlib.closing(cache))
  targets = teaching.Targets(
    exp.objective.teaching,
    _specs(exp, exp.objective.teaching.inputs, mesh),
    mesh,
    seed=exp.seed,
    cache=cache,
    todo=range(start, exp.total_steps),
    report=lambda program: _note(f"compiled teachers: {program.seconds:.1f} s"),
    **fit,
  )
  if targets.complete:
    _note(f"teachers: their logits of all steps are in {exp.teacher_cache}")
  return targets


def _specs(exp: experiment.Experiment, inputs: Any, mesh: Any) -> dict[str, Any]:
  local = exp.batch_size // jax.process_count()
  shapes = {name: (local, *exp.input_shapes[name]) for name in inputs}
  return sharding.specs({k: np.broadcast_to(np.float32(0), s) for k, s in shapes.items()}, mesh)


def _compile(
  exp: experiment.Experiment,
  state: steps.TrainState,
  targets: teaching.Targets | None,
  mesh: Any,
  **fit: Any,
) -> step_programs.StepPrograms:
  batch = _specs(exp, exp.objective.inputs, mesh)
  if targets is not None:
    batch["targets"] = targets.specs

  sizes = sorted(patch_schedule.all_static(exp.flexi), key=exp.step_flops)
  report = _report_program("train", exp)
  programs = step_programs.compile_steps(
    sizes,
    state,
    batch,
    _run_constants(exp, mesh),
    mesh,
    model=exp.model,
    objective=exp.objective,
    tx=exp.optimizer.tx,
    report=report,
    **fit,
  )
  _note(f"{len(sizes)} sizes and the update compiled in {programs.seconds:.1f} s")
  return programs


def _run_constants(exp: experiment.Experiment, mesh: Any) -> dict[str, jax.Array]:
  """What is the same in all steps of a run, and other in another run of the same programs."""
  numbers = {"seed": np.uint32(exp.seed), "total_steps": np.int32(exp.total_steps)}
  return jax.device_put(numbers, sharding.replicated(mesh))


def _loop(
  exp: experiment.Experiment,
  state: steps.TrainState,
  schedule: patch_schedule.State,
  targets: teaching.Targets | None,
  batches: Any,
  programs: step_programs.StepPrograms,
  evaluators: dict[str, Any],
  checkpoints: Checkpoints,
  writer: metrics.MetricsWriter,
  mesh: Any,
) -> steps.TrainState:
  """Runs every step that is left. The device is asked for numbers only every `log_every` steps."""
  start = int(state.step)
  progress = metrics.Progress(
    total_steps=exp.total_steps, batch_size=exp.batch_size, start_step=start
  )
  pending: list[tuple[int, dict, dict]] = []
  constants = _run_constants(exp, mesh)
  for step in range(start + 1, exp.total_steps + 1):
    asked = time.perf_counter()
    batch = next(batches)
    waited = time.perf_counter() - asked
    size = patch_schedule.draw(
      exp.flexi, seed=exp.seed, step=step - 1, total_steps=exp.total_steps, state=schedule
    )
    on_device = sharding.put_batch({k: batch[k] for k in exp.objective.inputs}, mesh)
    if targets is not None:
      on_device["targets"] = targets(step - 1, batch, state.step)
    state, measured = programs(size, state, on_device, constants)
    pending.append((step, size, measured))
    last = step == exp.total_steps
    due = [name for name, e in exp.evaluations.items() if step % e.every == 0 and not last]
    save = step % exp.save_every == 0 or last
    if step % exp.log_every == 0 or due or save or patch_schedule.is_due(exp.flexi, step):
      skipped = {"data_errors": len(batches.errors)} if batches.errors else {}
      for at, drawn, values in _flush(exp, pending, writer, progress.stats() | skipped):
        schedule = patch_schedule.update(
          exp.flexi, schedule, step=at, drawn=drawn, loss=float(values["loss"])
        )
    progress.update(step, data_wait=waited)
    with progress.paused():
      if save:
        record = _record(exp, step, schedule, batches)
        checkpoints.save(step, state.params, _rest(state), record)
      for name in due:
        _note_rows(name, step, evaluators[name].run(state.params), writer)
  return state


def _flush(
  exp: experiment.Experiment,
  pending: list[tuple[int, dict, dict]],
  writer: metrics.MetricsWriter,
  extra: dict[str, float],
) -> list[tuple[int, dict, dict]]:
  """Writes one row for each step since the last time, and returns them; stops the run at the first not finite."""
  rows, pending[:] = jax.device_get(pending), []
  for step, size, measured in rows:
    values: dict[str, Any] = {k: size_text(v) for k, v in size.items()}
    values |= {**measured, "epoch": step / exp.steps_per_epoch}
    values |= {
      f"schedule/{k}" if k != ".*" else "schedule": f(step - 1)
      for k, f in exp.optimizer.schedules.items()
    }
    if step == rows[-1][0]:
      values |= {k: v for k, v in extra.items() if k != "eta_s"}
    writer.write(step, values)
    # Each of the three: a checkpoint of this step must not hold what the next one would stumble over.
    bad = [f"{name} is {value}" for name, value in measured.items() if not np.isfinite(value)]
    if bad:
      writer.flush()
      raise errors.UserError(
        f"At step {step} ({compilation.size_name(size)}) {', '.join(bad)}; stopped. The last"
        " checkpoint is from before. Lower optim.lr, or set optim.clip."
      )
  return rows


def _note_rows(
  name: str, step: int, rows: list[dict[str, Any]], writer: metrics.MetricsWriter
) -> None:
  for row in rows:
    values = {f"{name}/{k}/seqhw={label(row)}": row[k] for k in results.metrics_of(row)}
    writer.write(step, values)
  first = results.metrics_of(rows[0])[0]
  _note(f"step {step}: {name} {first} " + ", ".join(f"{label(r)}: {r[first]:.1%}" for r in rows))


def _record(
  exp: experiment.Experiment, step: int, schedule: patch_schedule.State, batches: Any
) -> dict[str, Any]:
  """What a checkpoint says of itself: enough to go on training, and to predict without the config."""
  main = exp.evaluations.get(results.main_of(exp.evaluations))
  # An evaluator that fits its own classifier may be of other classes than the model.
  own = main is not None and main.source.num_classes == exp.model.num_classes
  names = main.source.class_names if own else None
  return {
    "name": exp.name,
    "step": step,
    "data": batches.get_state(),
    "model": exp.model_record,
    "image_shape": list(exp.image_shape),
    "pp": main.pp if main else None,
    "class_names": list(names) if names else None,
    "frozen": exp.frozen_digests,
    "schedule": schedule,
    "trained": {name: list(choice.values) for name, choice in exp.flexi.items()},
  }


def _final_evaluation(
  exp: experiment.Experiment,
  state: steps.TrainState,
  evaluators: dict,
  writer: metrics.MetricsWriter,
  workdir: pathlib.Path,
) -> None:
  """Scores and costs at every size, into metrics.jsonl and RUN/eval.json."""
  trained = list(exp.flexi["seqhw"].values) if "seqhw" in exp.flexi else None
  for name, evaluator in evaluators.items():
    source, rows = exp.evaluations[name].source, results.measure(evaluator, state.params)
    _note_rows(name, int(state.step), rows, writer)
    about = results.about(
      exp.name, source.name, source.split, int(state.step), state.params, trained
    )
    results.write(results.file_of(workdir / "eval.json", name, evaluators), about, rows)


def _costs(exp: experiment.Experiment) -> list[str]:
  """What the schedule of sizes will cost, a line for each size and one for all."""
  shares = patch_schedule.shares(exp.flexi, exp.step_flops)
  mean = patch_schedule.mean_cost(exp.flexi, exp.step_flops)
  lines = [
    f"{compilation.size_name(size)}: {share:.1%} of the steps, {share * cost / mean:.1%} of the FLOPs"
    for size, share, cost in shares
  ]
  adaptive = any(choice.adapt for choice in exp.flexi.values())
  note = ", as the sizes are drawn at first" if adaptive else ""
  return [*lines, f"{mean * exp.total_steps:.3g} FLOPs expected in all{note}"]


def _report_program(kind: str, exp: experiment.Experiment) -> Any:
  def report(size: dict, program: compilation.Program, parts: int = 1) -> None:
    if not size:
      _note(f"compiled the update: {program.seconds:.1f} s, {_mib(program.bytes)}")
      return
    rows, columns = which_grid(exp.image_shape[:2], exp.model.patch_size, **size).grid_hw
    _note(
      f"compiled {kind} {compilation.size_name(size)}: {rows * columns} tokens,"
      f" {program.seconds:.1f} s, {_mib(program.bytes)}, {_mib(program.temp_bytes)} of it temporary"
      + (f", in {parts} parts" if parts > 1 else "")
    )

  return report


def _mib(size: float) -> str:
  return f"{size / 2**20:.1f} MiB"


def _note(message: str) -> None:
  if jax.process_index() == 0:
    print(message, file=sys.stderr, flush=True)


def run(args: argparse.Namespace) -> None:
  """`flexivit train`."""
  compilation.keep_programs()
  train(config.load(args.config, args.overrides), args.workdir)


if __name__ == "__main__":
  allocator.keep_memory()
  try:
    run(arguments.parse(["train", *sys.argv[1:]]))
  except errors.UserError as e:
    sys.exit(f"flexivit: error: {e}")
