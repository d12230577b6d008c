"""The trainer: `python -m flexivit_jax.train --config configs/digits.py --workdir runs/digits`, or `flexivit train`.

One trainer for all experiments: what is minimised is an objective, what is drawn at each step is `config.flexi`, what
is measured is an evaluator. The same command continues a run that was stopped.
"""

import argparse
import contextlib
import functools
import importlib
import os
import pathlib
import sys
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from clu import parameter_overview

from flexivit_jax import config, errors, experiment, files, heartbeat
from flexivit_jax.devices import compilation, sharding
from flexivit_jax.evaluators import results
from flexivit_jax.experiment import following, preparation
from flexivit_jax.running import (
  distributed,
  metrics_writer,
  peers as peers_of,
  processes,
  run_folder,
  signals,
  wandb_run,
)
from flexivit_jax.running.checkpoint import Checkpoints
from flexivit_jax.running.ledger import Ledger, process_begun
from flexivit_jax.running.progress import Progress
from flexivit_jax.sizes import size_label, size_name, size_text
from flexivit_jax.training import patch_schedule, step_programs, steps, teaching


class Run(NamedTuple):
  """What the loop works with."""

  exp: experiment.Experiment
  mesh: Any
  checkpoints: Checkpoints
  batches: Any
  writer: metrics_writer.MetricsWriter
  ledger: Ledger
  stop: signals.Stop
  watchdog: signals.Watchdog
  skips: list[int]  # how many of the last steps in a row were skipped
  peers: peers_of.Peers | None = None
  follow: following.Following = following.NOTHING


def train(
  settings: dict[str, Any],
  workdir: pathlib.Path,
  *,
  resume: str = "latest",
  allow_config_change: bool = False,
  begun: float | None = None,
) -> pathlib.Path:
  """Trains, evaluates and saves what a config says into a run folder; continues where the folder left off.

  Args:
    settings: the config.
    workdir: the run folder.
    resume: see `Checkpoints.choose`.
    allow_config_change: see `run_folder.check_config`.
    begun: `time.perf_counter()` from when on its time is counted; default: now.

  Returns:
    The run folder: config.json, parameters.txt, metrics.jsonl, tb/, checkpoints/, ledger.json, eval.json.

  Raises:
    UserError: a mistake in the config; a folder in use; a checkpoint that is damaged or does not fit the config; one
      that cannot be written; a loss that is not finite.
    Stopped: a signal came; what was done is saved.
  """
  begun = time.perf_counter() if begun is None else begun
  with contextlib.ExitStack() as stack:
    try:
      _train(settings, workdir, stack, begun, resume, allow_config_change)
    except Exception as error:
      if distributed.is_on():
        processes.abandon(error, workdir)
      raise
  return workdir


def _train(
  settings: dict[str, Any],
  workdir: pathlib.Path,
  stack: contextlib.ExitStack,
  begun: float,
  resume: str,
  allow_config_change: bool,
) -> None:
  several = distributed.is_on()
  stop = stack.enter_context(signals.catch(distributed.preempted if several else None))
  with stop.interruptible():
    processes.agree_on_config(settings)
    experiment.check(settings)
    if settings.get("wandb") is not None:
      distributed.on_first(wandb_run.check, "its package wandb")
    signs: list[peers_of.Peers] = []
    watchdog = stack.enter_context(contextlib.closing(_watchdog(settings, signs)))
    run_folder.check_path(workdir, several=several)
    trained = preparation.trained(workdir)
    exp = experiment.from_config({"name": _name(workdir), **settings}, trained=trained)
    _say_costs(exp)
    exp, mesh = preparation.place(exp)
    parts, memory = preparation.parts(exp, mesh)
    processes.take(workdir, stack)
    first = jax.process_index() == 0
    ledger = Ledger(workdir / "ledger.json" if first else None, begun)
    refusing = stack.enter_context(_writing_unless_refused(ledger))
    peers = processes.signs_of_life(workdir)
    if peers is not None:
      signs.append(peers)
    batches = stack.enter_context(exp.batches(0))
    accepted, latest, (state, schedule, early) = _accept(
      exp, mesh, batches, workdir, settings, ledger, resume=resume, allow_change=allow_config_change
    )
    start = int(state.step)
    if several:
      distributed.agree(start, _facts(exp, batches, start, schedule))
    evaluators = {
      name: e.make(exp.model, mesh, watchdog.data) for name, e in exp.evaluations.items()
    }
    ended = following.Following(None, None, exp.early, early).ended
    if go_on := start < exp.total_steps and not ended:
      with ledger.of("compilation"):
        held = memory - sharding.bytes_each(state)
        targets = preparation.targets(exp, start, mesh, stack, parts=parts, memory=held)
        programs = preparation.programs(exp, state, targets, mesh, parts=parts, memory=memory)
        distributed.agree(start, {"parts of the batch": sorted(programs.parts.items())})
        for evaluator in evaluators.values():
          evaluator.compile(state.params, preparation.report_of("eval", exp))
    # Whatever can refuse the start has passed. Until here nothing in the folder has changed.
    distributed.on_first(lambda: _write(workdir, settings, accepted, state), "its folder")
    refusing.clear()
    checkpoints = stack.enter_context(
      _closing(Checkpoints(workdir / "checkpoints", keep=exp.keep), ledger)
    )
    others = {}
    if exp.wandb is not None:
      opening = functools.partial(wandb_run.open_run, workdir, settings, latest is not None)
      others["Weights & Biases"] = functools.partial(opening, **exp.wandb)
    writer = stack.enter_context(
      metrics_writer.MetricsWriter(workdir, restored_step=start, writing=first, others=others)
    )
    best = following.open_best(workdir, exp.best, begun=latest is not None)
    if best is not None:
      stack.enter_context(_closing(best, ledger))
    follow = following.Following(best, exp.best, exp.early, early)
    run = Run(exp, mesh, checkpoints, batches, writer, ledger, stop, watchdog, [0], peers, follow)
    if go_on:
      _evaluate_again(run, state, schedule, evaluators, workdir)
  if go_on and not follow.ended:
    ledger.steps_begin()
    state, schedule = _loop(run, state, schedule, targets, programs, evaluators)
  with stop.interruptible(), ledger.of("evaluation"):
    if follow.ended:
      preparation.note(follow.reason())
    _final_evaluation(run, state, schedule, evaluators, workdir)


@contextlib.contextmanager
def _writing_unless_refused(ledger: Ledger) -> Iterator[list[bool]]:
  """Writes the ledger at the end, but not of a start that was refused; one goes on that has emptied the list."""
  refusing = [True]
  try:
    yield refusing
  except errors.UserError:
    if not refusing:
      ledger.write()
    raise
  except BaseException:
    ledger.write()
    raise
  ledger.write()


def _name(workdir: pathlib.Path) -> str:
  """That of the folder, also of "." and of a path that ends with ".."."""
  return pathlib.Path(os.path.abspath(workdir)).name


Started = tuple[steps.TrainState, patch_schedule.State, dict[str, Any]]


def _accept(
  exp: experiment.Experiment,
  mesh: Any,
  batches: Any,
  workdir: pathlib.Path,
  settings: dict[str, Any],
  ledger: Ledger,
  *,
  resume: str,
  allow_change: bool,
) -> tuple[run_folder.Start | None, int | None, Started]:
  """Refuses what cannot be gone on with, or returns how the config differs, the checkpoint's step, and the state.

  Nothing in the folder changes. How the config differs is known on the first process only.
  """
  accepted: list[run_folder.Start] = []
  with contextlib.closing(Checkpoints(workdir / "checkpoints", read_only=True)) as checkpoints:

    def choose() -> int | None:
      latest = checkpoints.choose(resume, preparation.note)
      accepted.append(run_folder.compare(workdir, settings, begun=latest is not None))
      for line in accepted[0].notes:
        preparation.note(line)
      state = preparation.abstract_state(exp)
      if latest is not None:
        misfit = _misfit(exp, checkpoints, latest, state, batches, settings)
        run_folder.check_config(
          workdir, settings, accepted[0], allow_change=allow_change, misfit=misfit
        )
      checkpoints.check_room(state)
      return latest

    latest = distributed.on_first(choose, "its checkpoints or its config")
    ledger.go_on_from(latest or 0)
    started = _start_or_resume(exp, checkpoints, latest, ledger, mesh, batches)
  return (accepted[0] if accepted else None), latest, started


def _misfit(
  exp: experiment.Experiment,
  checkpoints: Checkpoints,
  latest: int,
  state: steps.TrainState,
  batches: Any,
  settings: dict[str, Any],
) -> str | None:
  """Why a checkpoint cannot be gone on from with this config, whatever the user allows; None: it can."""
  record, where = checkpoints.record(latest), checkpoints.folder / str(latest)
  try:
    checkpoints.check_fit(latest, state.params, preparation.rest(state))
    preparation.check_frozen(exp, record.get("frozen", {}), where)
    preparation.check_data(
      batches.get_state(), record["data"], settings["input"]["data"], where.parent.parent
    )
  except errors.UserError as e:
    return str(e)
  return None


@contextlib.contextmanager
def _closing(checkpoints: Checkpoints, ledger: Ledger) -> Iterator[Checkpoints]:
  """Closes them at the end; that a save failed is no more than a line where something else has ended the run."""
  try:
    yield checkpoints
  except BaseException:
    try:
      with ledger.of("checkpoints"):
        checkpoints.close()
    except errors.UserError as e:
      preparation.note(str(e))
    raise
  with ledger.of("checkpoints"):
    checkpoints.close()


def _watchdog(settings: dict[str, Any], signs: list[peers_of.Peers]) -> signals.Watchdog:
  """One that watches from now on, data are not opened yet; `signs` gets the other processes' as soon as there are."""
  limit = settings.get("hang_after", experiment.Settings.hang_after)
  return signals.Watchdog(
    limit if limit is not None and limit > 0 else None,  # others are refused in a moment
    preparation.note,
    tick=lambda: signs[0].tick() if signs else None,
    blame=lambda: signs[0].blame() if signs else "",
  )


def _write(
  workdir: pathlib.Path,
  settings: dict[str, Any],
  accepted: run_folder.Start | None,
  state: steps.TrainState,
) -> None:
  """Writes what a start leaves in its folder: its config, where it is another one, and the list of parameters."""
  if accepted is not None:
    run_folder.write_config(workdir, settings, accepted)
  overview = parameter_overview.get_parameter_overview(state.params, include_stats=False)
  files.write_atomically(workdir / "parameters.txt", overview + "\n")


def _facts(
  exp: experiment.Experiment, batches: Any, step: int, schedule: patch_schedule.State
) -> dict[str, Any]:
  """What all processes must have alike before the next steps: other sizes would be other programs, which wait for ever.

  The sizes are those until the next log at the latest.
  """
  ahead = range(step, min(step + exp.log_every, exp.total_steps))
  drawn = [
    patch_schedule.draw(
      exp.flexi, seed=exp.seed, step=s, total_steps=exp.total_steps, state=schedule
    )
    for s in ahead
  ]
  return {"sizes of the next steps": drawn, "next batch": batches.next_ids()}


def _say_costs(exp: experiment.Experiment) -> None:
  preparation.note(
    f"{exp.name}: {exp.total_steps} steps of {exp.batch_size} ({exp.total_steps / exp.steps_per_epoch:.1f} epochs)"
  )
  for line in [*_costs(exp), *exp.says(), *(f"note: {note}" for note in exp.notes)]:
    preparation.note(line)


def _start_or_resume(
  exp: experiment.Experiment,
  checkpoints: Checkpoints,
  latest: int | None,
  ledger: Ledger,
  mesh: Any,
  batches: Any,
) -> Started:
  """Returns the initial state or that of a checkpoint, that of the schedule of sizes, and that of early stopping;
  `batches` go on from there.
  """
  state = preparation.first_state(exp, mesh)
  if latest is None:
    return state, patch_schedule.init_state(exp.flexi), {}
  params, rest, record = checkpoints.restore(
    latest, state.params, preparation.rest(state), verified=True
  )
  batches.set_state(record["data"])
  seen = record["data"]["step"] * record["data"]["batch_size"]
  epoch = seen / record["data"]["examples"]
  preparation.note(
    f"resumed from {checkpoints.folder / str(latest)}: step {latest}/{exp.total_steps}, epoch {epoch:.2f},"
    f" {seen} images seen; {ledger.lost:.0f} s of work lost"
  )
  state = steps.TrainState(params=params, **rest)
  return state, record.get("schedule", {}), record.get("early_stopping", {})


def _evaluate_again(
  run: Run,
  state: steps.TrainState,
  schedule: patch_schedule.State,
  evaluators: dict[str, Any],
  workdir: pathlib.Path,
) -> None:
  """Runs the evaluations that were due at the step that a run goes on from, and did not end."""
  step = int(state.step)

  def done(name: str) -> int:
    rows = metrics_writer.read_rows(workdir / "metrics.jsonl")
    return any(key.startswith(f"{name}/") for row in rows if row["step"] == step for key in row)

  for name, evaluation in run.exp.evaluations.items():
    if not step or step % evaluation.every:
      continue
    known = distributed.on_first(functools.partial(done, name), "metrics.jsonl")
    if run.follow.lacks(name, step) or not known:
      _evaluate(run, name, evaluators[name], state, schedule)


def _evaluate(
  run: Run, name: str, evaluator: Any, state: steps.TrainState, schedule: patch_schedule.State
) -> None:
  with run.ledger.of("evaluation"):
    with run.stop.interruptible():
      rows = evaluator.run(state.params)
    _see(run, name, rows, state, schedule)
    _note_rows(name, int(state.step), rows, run.writer)


def _see(
  run: Run,
  name: str,
  rows: list[dict[str, Any]],
  state: steps.TrainState,
  schedule: patch_schedule.State,
  *,
  final: bool = False,
) -> None:
  """Tells what the run goes by of an evaluation."""
  step = int(state.step)
  record = functools.partial(_record, run.exp, step, schedule, run.batches)
  run.follow.see(name, rows, state, record, final=final)


def _loop(
  run: Run,
  state: steps.TrainState,
  schedule: patch_schedule.State,
  targets: teaching.Targets | None,
  programs: step_programs.StepPrograms,
  evaluators: dict[str, Any],
) -> tuple[steps.TrainState, patch_schedule.State]:
  """Runs every step that is left, unless early stopping ends the run.

  The device is asked for numbers only every `log_every` steps.
  """
  exp, start = run.exp, int(state.step)
  progress = Progress(total_steps=exp.total_steps, batch_size=exp.images_per_step, start_step=start)
  pending: list[Pending] = []
  constants = preparation.constants(exp, run.mesh)
  done = saved = start
  try:
    for step in range(start + 1, exp.total_steps + 1):
      asked = time.perf_counter()
      size = patch_schedule.draw(
        exp.flexi, seed=exp.seed, step=step - 1, total_steps=exp.total_steps, state=schedule
      )
      with run.watchdog.data(), run.ledger.of("data wait"):
        batch = next_batch(run.batches, exp.batches_of(size), run.stop)
      waited = time.perf_counter() - asked
      if run.peers is not None:
        run.peers.step = (
          step  # before the first wait for others: who is a step behind is the one they wait for
        )
      on_device = sharding.put_batch({k: batch[k] for k in exp.objective.inputs}, run.mesh)
      if targets is not None:
        on_device["targets"] = targets(step - 1, batch, state.step)
      state, measured = programs(size, state, on_device, constants)
      done = step
      pending.append(Pending(step, size, measured, batch.get("_id")))
      last = step == exp.total_steps
      due = [name for name, e in exp.evaluations.items() if step % e.every == 0 and not last]
      save = step % exp.save_every == 0 or last
      if step % exp.log_every == 0 or due or save or patch_schedule.is_due(exp.flexi, step):
        schedule = _log(run, pending, schedule, progress)
      progress.update(step, data_wait=waited)
      heartbeat.beat()
      with progress.paused():
        # What the run goes by comes first: the checkpoint has to know of it.
        followed = [name for name in due if name in run.follow.evaluators]
        for name in followed:
          _evaluate(run, name, evaluators[name], state, schedule)
        if save or run.follow.ended:
          _save(run, step, state, schedule)
          saved = step
        run.checkpoints.check()
        for name in due:
          if name not in followed:
            _evaluate(run, name, evaluators[name], state, schedule)
      if run.follow.ended:
        break
      run.stop.check_after(step)
  except signals.Stopped as stopped:
    if done > saved:
      schedule = _log(run, pending, schedule, progress)
      _save(run, done, state, schedule)
    with run.ledger.of("checkpoints"):
      run.checkpoints.wait()
    run.ledger.write(done)
    where = f"after step {done}, which is saved" if done else "before the first step"
    preparation.note(f"{stopped}: stopped {where}; the same command goes on")
    raise
  return state, schedule


def next_batch(batches: Any, number: int, stop: signals.Stop) -> dict[str, np.ndarray]:
  """The next batches as one; a signal may only come before the first, lest those after it were lost."""
  with stop.interruptible():
    first = next(batches)
  if number == 1:
    return first
  several = [first, *(next(batches) for _ in range(number - 1))]
  return {key: np.concatenate([batch[key] for batch in several]) for key in first}


class Pending(NamedTuple):
  """A step whose numbers are still on the device, and the ids of its examples."""

  step: int
  size: dict[str, Any]
  measured: dict[str, Any]
  ids: np.ndarray | None


def _log(
  run: Run, pending: list[Pending], schedule: patch_schedule.State, progress: Progress
) -> patch_schedule.State:
  """Writes what is pending; returns the state of the schedule of sizes after it."""
  skipped = {"data_errors": len(run.batches.errors)} if run.batches.errors else {}
  rows = _flush(run, pending, progress.stats() | skipped)
  for at, drawn, values, _ in rows:
    schedule = patch_schedule.update(
      run.exp.flexi, schedule, step=at, drawn=drawn, loss=float(values["loss"])
    )
  if rows:
    run.ledger.write(rows[-1].step)
    if distributed.is_on():
      facts = _facts(run.exp, run.batches, rows[-1].step, schedule)
      distributed.agree(rows[-1].step, facts)
  return schedule


def _save(run: Run, step: int, state: steps.TrainState, schedule: patch_schedule.State) -> None:
  with run.ledger.of("checkpoints"):
    record = _record(run.exp, step, schedule, run.batches) | run.follow.record()
    run.follow.wait()
    run.checkpoints.save(step, state.params, preparation.rest(state), record)
  run.ledger.saved(step)
  run.ledger.write(step)


def _flush(run: Run, pending: list[Pending], extra: dict[str, float]) -> list[Pending]:
  """Writes one row for each step since the last time, and returns them; stops the run at the first not finite."""
  exp = run.exp
  numbers = jax.device_get([p.measured for p in pending])
  rows = [p._replace(measured=n) for p, n in zip(pending, numbers, strict=True)]
  pending.clear()
  for step, size, measured, ids in rows:
    values: dict[str, Any] = {k: size_text(v) for k, v in size.items()}
    values |= {**measured, "epoch": step / exp.steps_per_epoch}
    values |= {
      f"schedule/{k}" if k != ".*" else "schedule": f(step - 1)
      for k, f in exp.optimizer.schedules.items()
    }
    if step == rows[-1].step:
      values |= {k: v for k, v in extra.items() if k != "eta_s"}
    run.writer.write(step, values)
    # Each of the three: a checkpoint of this step must not hold what the next one would stumble over. A step that was
    # skipped holds nothing of it.
    skipped = bool(measured.get("skipped"))
    run.skips[0] = run.skips[0] + 1 if skipped else 0
    checked = {"param_norm": measured["param_norm"]} if skipped else measured
    bad = [f"{name} is {value}" for name, value in checked.items() if not np.isfinite(value)]
    if run.skips[0] >= exp.skip_limit:
      bad.append(
        f"{exp.skip_limit} steps in a row are skipped, the gradient's norm is {measured['grad_norm']:.3g}"
      )
    if bad:
      run.writer.flush()
      found = dict(step=step, size=size, measured=measured, ids=distributed.gathered(ids))
      raise _bad_step(run, bad, found)
  return rows


def _bad_step(run: Run, bad: list[str], found: dict[str, Any]) -> errors.UserError:
  """Returns what to say of a step that was not finite; whatever else fails now does not hide it."""
  folder, size = run.checkpoints.folder.parent, size_name(found["size"])
  said = f"At step {found['step']} ({size}) {', '.join(bad)}; stopped."
  try:
    with run.ledger.of("checkpoints"):
      run.checkpoints.wait()
    said += " The last checkpoint is from before."
  except errors.UserError as e:
    said += f" {e}"
  try:
    dump = run_folder.write_bad_step(folder, writing=jax.process_index() == 0, **found)
    said += f" `flexivit replay {dump}` looks into the step."
  except errors.UserError as e:
    said += f" {e}"
  return errors.UserError(f"{said} Lower optim.lr, or set optim.clip.")


def _note_rows(
  name: str, step: int, rows: list[dict[str, Any]], writer: metrics_writer.MetricsWriter
) -> None:
  # All sizes at once: a stop between two would leave some, and the evaluation would count as made.
  values = {
    f"{name}/{k}/seqhw={size_label(row)}": row[k] for row in rows for k in results.metrics_of(row)
  }
  writer.write(step, values)
  first = results.metrics_of(rows[0])[0]
  preparation.note(
    f"step {step}: {name} {first} " + ", ".join(f"{size_label(r)}: {r[first]:.1%}" for r in rows)
  )


def _record(
  exp: experiment.Experiment, step: int, schedule: patch_schedule.State, batches: Any
) -> dict[str, Any]:
  """What a checkpoint says of itself: enough to go on training, and to predict without the config."""
  main = exp.evaluations.get(results.main_of(exp.evaluations))
  # An evaluator that fits its own classifier, or a label map, may be of other classes than the model.
  scored = main is not None and not main.section.keys() & {"train_data", "label_map", "teacher"}
  own = scored and main.source.num_classes == exp.model.num_classes
  names = exp.class_names or (main.source.class_names if own else None)
  return {
    "name": exp.name,
    "step": step,
    "data": batches.get_state(),
    "model": exp.model_record,
    "image_shape": list(exp.image_shape),
    "pp": main.pp if main else None,
    "class_names": list(names) if names else None,
    "data_classes": list(exp.data_classes) if exp.data_classes else None,
    "frozen": exp.frozen_digests,
    "schedule": schedule,
    "trained": {name: list(choice.values) for name, choice in exp.flexi.items()},
  }


def _final_evaluation(
  run: Run,
  state: steps.TrainState,
  schedule: patch_schedule.State,
  evaluators: dict,
  workdir: pathlib.Path,
) -> None:
  """Scores and costs at every size, into metrics.jsonl and RUN/eval.json."""
  exp, writer = run.exp, run.writer
  trained = list(exp.flexi["seqhw"].values) if "seqhw" in exp.flexi else None
  for name, evaluator in evaluators.items():
    source, rows = exp.evaluations[name].source, results.measure(evaluator, state.params)
    _see(run, name, rows, state, schedule, final=True)
    _note_rows(name, int(state.step), rows, writer)
    classes = experiment.classes_of_tables(exp.evaluations[name], rows)
    about = results.about(
      exp.name, source.name, source.split, int(state.step), state.params, trained, classes
    )
    results.write(results.file_of(workdir / "eval.json", name, evaluators), about, rows)


def _costs(exp: experiment.Experiment) -> list[str]:
  """What the schedule of sizes will cost, a line for each size and one for all."""
  shares = patch_schedule.shares(exp.flexi, exp.step_flops)
  mean = patch_schedule.mean_cost(exp.flexi, exp.step_flops)
  lines = [
    f"{size_name(size)}: {share:.1%} of the steps, {share * cost / mean:.1%} of the FLOPs"
    for size, share, cost in shares
  ]
  adaptive = any(choice.adapt for choice in exp.flexi.values())
  note = ", as the sizes are drawn at first" if adaptive else ""
  return [*lines, f"{mean * exp.total_steps:.3g} FLOPs expected in all{note}"]


def run(args: argparse.Namespace) -> None:
  """`flexivit train`."""
  distributed.start(
    args.coordinator_address,
    args.num_processes,
    args.process_id,
    join_timeout=args.join_timeout,
    heartbeat_timeout=args.heartbeat_timeout,
  )
  compilation.keep_programs()
  train(
    config.load(args.config, args.overrides),
    args.workdir,
    resume=args.resume,
    allow_config_change=args.allow_config_change,
    begun=process_begun(),
  )


if __name__ == "__main__":
  # The command of big_vision's style. By name, for an import of `cli` would point upwards.
  importlib.import_module("flexivit_jax.cli").entry(["train", *sys.argv[1:]])
