"""What is read from the devices: the numbers of the steps, at each log; and what follows from them."""

from typing import NamedTuple

import jax
import numpy as np

from flexivit_jax import data, errors
from flexivit_jax.experiment.build import Experiment
from flexivit_jax.running import distributed, run_folder
from flexivit_jax.running.progress import Progress
from flexivit_jax.running.session import Session
from flexivit_jax.sizes import SizeArgs, size_name, size_text
from flexivit_jax.training import patch_schedule
from flexivit_jax.trees import Json


class Pending(NamedTuple):
  """A step whose numbers are still on the device, and the ids of its examples."""

  step: int
  size: SizeArgs
  measured: Json
  ids: np.ndarray | None


class Recorder:
  """Keeps the numbers of steps on the devices until a log writes them.

  Args:
    run: the session.
    exp: the experiment.
    batches: of the training data.
    start: the step before the first one.
  """

  def __init__(self, run: Session, exp: Experiment, batches: data.TrainBatches, start: int):
    self._run, self._exp, self._batches = run, exp, batches
    self._pending: list[Pending] = []
    self._skipped_in_a_row = 0
    self.progress = Progress(
      total_steps=exp.total_steps, batch_size=exp.images_per_step, start_step=start
    )

  def add(
    self, step: int, size: SizeArgs, measured: dict[str, jax.Array], batch: dict[str, np.ndarray]
  ) -> None:
    """Keeps what a step measured; reads nothing."""
    self._pending.append(Pending(step, size, measured, batch.get("_id")))

  def is_due(self, step: int) -> bool:
    """Whether a step ends with a log, whatever else it ends with."""
    return step % self._exp.log_every == 0 or patch_schedule.is_due(self._exp.flexi, step)

  def log(self, schedule: patch_schedule.State) -> patch_schedule.State:
    """Writes a row for each step since the last log; returns the state of the schedule of sizes after them.

    Raises:
      UserError: a step that is not finite, or too many skipped in a row; the rows until there are written.
    """
    errors_ = self._batches.errors
    rows = self._flush(self.progress.stats() | ({"data_errors": len(errors_)} if errors_ else {}))
    for row in rows:
      schedule = patch_schedule.update(
        self._exp.flexi,
        schedule,
        step=row.step,
        drawn=row.size,
        loss=float(row.measured["loss"]),
      )
    if rows:
      self._run.ledger.write(rows[-1].step)
      agree_on_next_steps(self._exp, self._batches, rows[-1].step, schedule)
    return schedule

  def _flush(self, extra: dict[str, float]) -> list[Pending]:
    """Writes the rows and returns them; stops the run at the first step that is not finite."""
    numbers = jax.device_get([p.measured for p in self._pending])
    rows = [p._replace(measured=n) for p, n in zip(self._pending, numbers, strict=True)]
    self._pending.clear()
    for row in rows:
      values = self._values(row)
      if row.step == rows[-1].step:
        values |= {k: v for k, v in extra.items() if k != "eta_s"}
      self._run.writer.write(row.step, values)
      if problems := self._problems(row):
        self._run.writer.flush()
        raise self._bad_step(row, problems)
    return rows

  def _values(self, row: Pending) -> Json:
    values: Json = {k: size_text(v) for k, v in row.size.items()}
    values |= {**row.measured, "epoch": row.step / self._exp.steps_per_epoch}
    return values | {
      f"schedule/{k}" if k != ".*" else "schedule": f(row.step - 1)
      for k, f in self._exp.optimizer.schedules.items()
    }

  def _problems(self, row: Pending) -> list[str]:
    """Says what of a step is not finite.

    Loss, gradient and parameters: a checkpoint of this step must not hold what the next one would stumble over. A step
    that was skipped holds nothing of its loss and gradient.
    """
    skipped, limit = bool(row.measured.get("skipped")), self._exp.skip_limit
    self._skipped_in_a_row = self._skipped_in_a_row + 1 if skipped else 0
    checked = {"param_norm": row.measured["param_norm"]} if skipped else row.measured
    problems = [f"{name} is {value}" for name, value in checked.items() if not np.isfinite(value)]
    if self._skipped_in_a_row >= limit:
      norm = row.measured["grad_norm"]
      problems.append(f"{limit} steps in a row are skipped, the gradient's norm is {norm:.3g}")
    return problems

  def _bad_step(self, row: Pending, problems: list[str]) -> errors.UserError:
    """Returns what to say of a step that was not finite; whatever else fails now does not hide it."""
    message = f"At step {row.step} ({size_name(row.size)}) {', '.join(problems)}; stopped."
    try:
      with self._run.ledger.of("checkpoints"):
        self._run.checkpoints.wait()
      message += " The last checkpoint is from before."
    except errors.UserError as e:
      message += f" {e}"
    try:
      dump = run_folder.write_bad_step(
        self._run.workdir,
        writing=self._run.first,
        step=row.step,
        size=row.size,
        measured=row.measured,
        ids=distributed.gathered(row.ids),
      )
      message += f" `flexivit replay {dump}` looks into the step."
    except errors.UserError as e:
      message += f" {e}"
    return errors.UserError(f"{message} Lower optim.lr, or set optim.clip.")


def agree_on_next_steps(
  exp: Experiment, batches: data.TrainBatches, step: int, schedule: patch_schedule.State
) -> None:
  """Compares what all processes do until the next log: other sizes would be other programs, which wait for ever.

  Raises:
    UserError: sizes or batches that differ, on all processes.
  """
  if not distributed.is_on():
    return
  ahead = range(step, min(step + exp.log_every, exp.total_steps))
  drawn = [
    patch_schedule.draw(
      exp.flexi, seed=exp.seed, step=s, total_steps=exp.total_steps, state=schedule
    )
    for s in ahead
  ]
  distributed.agree(step, {"sizes of the next steps": drawn, "next batch": batches.next_ids()})
