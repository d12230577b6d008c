"""The trainer: `python -m flexivit_jax.train --config configs/digits.py --workdir runs/digits`, or `flexivit train`.

One trainer for all experiments: what is minimised is an objective, what is drawn at each step is `config.flexi`, what
is measured is an evaluator. The same command resumes a run that was stopped. From top to bottom: data and model,
restore, compile, loop, evaluate, save. The step with its gradient is `training/steps.py`; what keeps a run alive is
`running/session.py`.
"""

import functools
import importlib
import pathlib
import sys

from flexivit_jax import experiment, heartbeat
from flexivit_jax.data import TrainBatches
from flexivit_jax.experiment import preparation, restoring
from flexivit_jax.experiment.evaluating import Evaluating
from flexivit_jax.experiment.recording import Recorder, agree_on_next_steps
from flexivit_jax.running import session, signals
from flexivit_jax.running.session import note
from flexivit_jax.sizes import size_name
from flexivit_jax.training import patch_schedule, steps
from flexivit_jax.training.patch_schedule import State as Schedule
from flexivit_jax.trees import Json


def train(
  settings: Json,
  workdir: pathlib.Path,
  *,
  resume: str = "latest",
  allow_config_change: bool = False,
  begun: float | None = None,
) -> pathlib.Path:
  """Trains, evaluates and saves what a config says into a run folder; resumes where the folder left off.

  Args:
    settings: the config.
    workdir: the run folder; or s3://BUCKET/RUN, gs://BUCKET/RUN.
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
  hang_after = settings.get("hang_after", experiment.Settings.hang_after)
  with session.start(settings, workdir, hang_after=hang_after, begun=begun) as run:
    # Until the first step nothing is lost by a stop: a signal ends the start-up wherever it is.
    with run.stop.interruptible():
      # The config becomes objects: data, model, objective, optimizer, sizes, evaluators.
      trained = restoring.trained(run.workdir)
      exp = experiment.from_config(settings, name=run.name, trained=trained)
      report_costs(exp)

      # The devices. What does not divide over them is refused before the folder is taken.
      exp, mesh = preparation.place(exp)
      run.take_folder()
      batches = run.hold(exp.batches(0))

      # The state: a new one, or that of the newest checkpoint. Nothing in the folder has changed yet.
      begin, difference = restoring.start(
        run, exp, mesh, batches, settings, resume=resume, allow_change=allow_config_change
      )
      state, schedule = begin.state, begin.schedule
      agree_on_next_steps(exp, batches, int(state.step), schedule)
      record = functools.partial(restoring.record, exp, batches=batches)
      evaluating = Evaluating(run, exp, mesh, record, begin.early)

      # Each size compiles once, before the first step: the gradients at each, one update, the evaluators.
      step_fn = None
      if int(state.step) < exp.total_steps and not evaluating.end_the_run:
        with run.ledger.of("compilation"):
          step_fn = preparation.compile_step(exp, state, mesh, run.hold)
          evaluating.compile(state.params)

      # Whatever can refuse the start has passed.
      restoring.write_start(run.workdir, settings, difference, state)
      step, resumed = int(state.step), begin.resumed
      run.open(settings, keep=exp.keep, step=step, resumed=resumed, wandb=exp.wandb)
      evaluating.open_best(resumed=resumed)
      if step_fn is not None:
        evaluating.evaluate_unfinished(state, schedule)

    if step_fn is not None and not evaluating.end_the_run:
      run.ledger.steps_begin()
      state, schedule = _loop(run, exp, step_fn, evaluating, batches, state, schedule)

    with run.stop.interruptible(), run.ledger.of("evaluation"):
      evaluating.finish(state, schedule)
  return workdir


def _loop(
  run: session.Session,
  exp: experiment.Experiment,
  step_fn: preparation.Step,
  evaluating: Evaluating,
  batches: TrainBatches,
  state: steps.TrainState,
  schedule: Schedule,
) -> tuple[steps.TrainState, Schedule]:
  """Makes every step that is left, unless early stopping ends the run.

  The devices are asked for numbers only when there is a log.
  """
  done = saved = int(state.step)
  recorder = Recorder(run, exp, batches, start=done)

  def record() -> Json:
    return restoring.record(exp, done, schedule, batches)

  try:
    for step in range(done + 1, exp.total_steps + 1):
      # The patch size of this step, a function of (config, seed, step), and as many batches as it takes.
      size = patch_schedule.draw(
        exp.flexi, seed=exp.seed, step=step - 1, total_steps=exp.total_steps, state=schedule
      )
      batch, waited = run.next(step, batches, exp.batches_of(size))

      # Forward, backward, update. What it measured stays on the devices.
      state, measured = step_fn(step, size, state, batch)
      done = step
      recorder.add(step, size, measured, batch)

      # A log reads it. The schedule of sizes changes at logs only, so one comes before whatever depends on it.
      due, saves = evaluating.due(step), step % exp.save_every == 0 or step == exp.total_steps
      if recorder.is_due(step) or due or saves:
        schedule = recorder.log(schedule)
      recorder.progress.update(step, data_wait=waited)
      heartbeat.beat()

      # Evaluate, save. What the run follows comes first: the checkpoint has to know of it.
      with recorder.progress.paused():
        for name in filter(evaluating.is_followed, due):
          evaluating.evaluate(name, state, schedule)
        if saves or evaluating.end_the_run:
          _save(run, evaluating, step, state, record())
          saved = step
        run.check()
        for name in due:
          if not evaluating.is_followed(name):
            evaluating.evaluate(name, state, schedule)
      if evaluating.end_the_run:
        break
      run.stop.check_after(step)
  except signals.Stopped as stopped:
    # A signal: the step in hand is done, and saved where it is not.
    if done > saved:
      schedule = recorder.log(schedule)
      _save(run, evaluating, done, state, record())
    with run.ledger.of("checkpoints"):
      run.checkpoints.wait()
    run.ledger.write(done)
    where = f"after step {done}, which is saved" if done else "before the first step"
    note(f"{stopped}: stopped {where}; the same command goes on")
    raise
  return state, schedule


def _save(
  run: session.Session, evaluating: Evaluating, step: int, state: steps.TrainState, record: Json
) -> None:
  """Saves a step in the background. RUN/best is on disk before: the checkpoint may know of it."""
  with run.ledger.of("checkpoints"):
    record = record | evaluating.state()
    evaluating.wait()
    run.checkpoints.save(step, state.params, preparation.rest(state), record)
  run.ledger.saved(step)
  run.ledger.write(step)


def report_costs(exp: experiment.Experiment) -> None:
  """Prints how long the run is, what its schedule of sizes costs, and what the user should know of its classes."""
  epochs = exp.total_steps / exp.steps_per_epoch
  note(f"{exp.name}: {exp.total_steps} steps of {exp.batch_size} ({epochs:.1f} epochs)")
  for line in [*_costs(exp), *exp.class_lines(), *(f"note: {text}" for text in exp.notes)]:
    note(line)


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


if __name__ == "__main__":
  # The command of big_vision's style. By name, for an import of `cli` would point upwards.
  importlib.import_module("flexivit_jax.cli").entry(["train", *sys.argv[1:]])
