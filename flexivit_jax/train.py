"""The trainer: `python -m flexivit_jax.train --config configs/digits.py --workdir runs/digits`, or `flexivit train`.

One trainer for all experiments: what is minimised is an objective, what is drawn at each step is `config.flexi`, what
is measured is an evaluator. The same command continues a run that was stopped.
"""

import argparse
import contextlib
import functools
import json
import pathlib
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
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
  steps,
  trees,
)
from flexivit_jax.checkpoint import Checkpoints
from flexivit_jax.evaluators.per_size import size_text
from flexivit_jax.models.flexivit import which_patch


def train(settings: dict[str, Any], workdir: pathlib.Path) -> pathlib.Path:
  """Trains, evaluates and saves what a config says into a run folder; continues where the folder left off.

  Returns:
    The run folder: config.json, parameters.txt, metrics.jsonl, tb/, checkpoints/, eval.json.

  Raises:
    UserError: a mistake in the config; a checkpoint that does not fit it; a loss that is not finite.
  """
  config.check("", settings, experiment.build)
  exp = experiment.build(**{"name": workdir.name, **settings})
  _note(
    f"{exp.name}: {exp.total_steps} steps of {exp.batch_size} ({exp.total_steps / exp.steps_per_epoch:.1f} epochs)"
  )
  workdir.mkdir(parents=True, exist_ok=True)
  (workdir / "config.json").write_text(json.dumps(settings, indent=2, default=str) + "\n")
  mesh = sharding.make_mesh()
  sharding.check_divides(exp.batch_size // exp.accumulate, mesh)
  with contextlib.ExitStack() as stack:
    checkpoints = stack.enter_context(
      contextlib.closing(Checkpoints(workdir / "checkpoints", keep=exp.keep))
    )
    state, batches = _start_or_resume(exp, checkpoints, mesh)
    stack.enter_context(batches)
    start = int(state.step)
    overview = parameter_overview.get_parameter_overview(state.params, include_stats=False)
    (workdir / "parameters.txt").write_text(overview + "\n")
    writer = stack.enter_context(metrics.MetricsWriter(workdir, restored_step=start))
    evaluators = {name: e.make(exp.model, mesh) for name, e in exp.evaluations.items()}
    if start < exp.total_steps:
      frozen = jax.device_put(exp.objective.frozen, sharding.replicated(mesh))
      programs = _compile(exp, state, frozen, mesh)
      for evaluator in evaluators.values():
        evaluator.compile(state.params, _report_program("eval", exp))
      state = _loop(exp, state, frozen, batches, programs, evaluators, checkpoints, writer, mesh)
    _final_evaluation(exp, state, evaluators, writer, workdir)
  return workdir


def _start_or_resume(
  exp: experiment.Experiment, checkpoints: Checkpoints, mesh: Any
) -> tuple[steps.TrainState, Any]:
  """Returns the initial state or the newest checkpoint's, and the batches from there on."""
  state = _init(exp, mesh)
  latest = checkpoints.latest_step()
  if latest is None:
    return state, exp.batches(0)
  rest = {"step": state.step, "opt_state": state.opt_state}
  params, rest, record = checkpoints.restore(latest, state.params, rest)
  _check_frozen(exp, record.get("frozen", {}), checkpoints.folder / str(latest))
  batches = exp.batches(0)
  batches.set_state(record["data"])
  epoch = latest / exp.steps_per_epoch
  _note(
    f"resumed from {checkpoints.folder / str(latest)}: step {latest}/{exp.total_steps}, epoch {epoch:.2f}"
  )
  return steps.TrainState(rest["step"], params, rest["opt_state"]), batches


def _init(exp: experiment.Experiment, mesh: Any) -> steps.TrainState:
  def init(given: Any) -> steps.TrainState:
    params = steps.init_params(exp.model, exp.image_shape, exp.seed, exp.head_bias)
    params = params if given is None else given
    return steps.TrainState(jnp.int32(0), params, exp.optimizer.tx.init(params))

  state = jax.jit(init, out_shardings=sharding.replicated(mesh))(exp.init)
  _note(f"{trees.count(state.params):,} parameters on {mesh.size} x {jax.devices()[0].device_kind}")
  return state


def _check_frozen(exp: experiment.Experiment, stored: dict[str, str], where: pathlib.Path) -> None:
  if exp.frozen_digests != stored:
    raise errors.UserError(
      f"{where} was trained with other teachers: {stored} there, {exp.frozen_digests} here (sha256);"
      " give the same ones, or another --workdir."
    )


def _compile(
  exp: experiment.Experiment, state: steps.TrainState, frozen: Any, mesh: Any
) -> dict[tuple, compilation.Program]:
  local = exp.batch_size // jax.process_count()
  batch = sharding.specs(
    {n: np.broadcast_to(np.float32(0), (local, *s)) for n, s in exp.input_shapes.items()}, mesh
  )
  fn = functools.partial(
    steps.step,
    model=exp.model,
    objective=exp.objective,
    tx=exp.optimizer.tx,
    seed=exp.seed,
    accumulate=exp.accumulate,
  )
  sizes = patch_schedule.all_static(exp.flexi)
  return compilation.compile_each(
    fn, (state, batch, frozen), sizes, donate=(0,), report=_report_program("train", exp)
  )


def _loop(
  exp: experiment.Experiment,
  state: steps.TrainState,
  frozen: Any,
  batches: Any,
  programs: dict[tuple, compilation.Program],
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
  for step in range(start + 1, exp.total_steps + 1):
    asked = time.perf_counter()
    batch = next(batches)
    waited = time.perf_counter() - asked
    size = patch_schedule.draw(exp.flexi, seed=exp.seed, step=step - 1)
    on_device = sharding.put_batch({k: batch[k] for k in exp.input_shapes}, mesh)
    state, measured = programs[compilation.size_key(size)].run(state, on_device, frozen)
    pending.append((step, size, measured))
    last = step == exp.total_steps
    due = [name for name, e in exp.evaluations.items() if step % e.every == 0 and not last]
    save = step % exp.save_every == 0 or last
    if step % exp.log_every == 0 or due or save:
      skipped = {"data_errors": len(batches.errors)} if batches.errors else {}
      _flush(exp, pending, writer, progress.stats() | skipped)
    progress.update(step, data_wait=waited)
    with progress.paused():
      if save:
        rest = {"step": state.step, "opt_state": state.opt_state}
        checkpoints.save(step, state.params, rest, _record(exp, step, batches))
      for name in due:
        _note_rows(name, step, evaluators[name].run(state.params), writer)
  return state


def _flush(
  exp: experiment.Experiment,
  pending: list[tuple[int, dict, dict]],
  writer: metrics.MetricsWriter,
  extra: dict[str, float],
) -> None:
  """Writes one row for each step since the last time; stops the run at the first that is not finite."""
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


def _note_rows(
  name: str, step: int, rows: list[dict[str, Any]], writer: metrics.MetricsWriter
) -> None:
  for row in rows:
    values = {f"{name}/{k}/seqhw={row['seqhw']}": row[k] for k in results.metrics_of(row)}
    writer.write(step, values)
  first = results.metrics_of(rows[0])[0]
  _note(f"step {step}: {name} {first} " + ", ".join(f"{r['seqhw']}: {r[first]:.1%}" for r in rows))


def _record(exp: experiment.Experiment, step: int, batches: Any) -> dict[str, Any]:
  """What a checkpoint says of itself: enough to go on training, and to predict without the config."""
  main = exp.evaluations.get(results.main_of(exp.evaluations))
  names = main.source.class_names if main else None
  return {
    "name": exp.name,
    "step": step,
    "data": batches.get_state(),
    "model": exp.model_record,
    "image_shape": list(exp.image_shape),
    "pp": main.pp if main else None,
    "class_names": list(names) if names else None,
    "frozen": exp.frozen_digests,
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


def _report_program(kind: str, exp: experiment.Experiment) -> Any:
  def report(size: dict, program: compilation.Program) -> None:
    h, w, _ = exp.image_shape
    ph, pw = which_patch((h, w), exp.model.patch_size, **size)
    _note(
      f"compiled {kind} {compilation.size_name(size)}: {h // ph * (w // pw)} tokens,"
      f" {program.seconds:.1f} s, {program.temp_bytes / 2**20:.1f} MiB temporary"
    )

  return report


def _note(message: str) -> None:
  if jax.process_index() == 0:
    print(message, file=sys.stderr, flush=True)


def run(args: argparse.Namespace) -> None:
  """`flexivit train`."""
  train(config.load(args.config, args.overrides), args.workdir)


if __name__ == "__main__":
  allocator.keep_memory()
  try:
    run(arguments.parse(["train", *sys.argv[1:]]))
  except errors.UserError as e:
    sys.exit(f"flexivit: error: {e}")
