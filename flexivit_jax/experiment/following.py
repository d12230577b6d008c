"""Follows a metric: RUN/best keeps the checkpoint of its best value, and early stopping ends the run.

RUN/best/STEP is a checkpoint without the optimizer's state. Its record holds the value, so that a
resumed run needs nothing else. It is on disk before a later checkpoint of the run: wherever a run resumes, no
evaluation before that step is lost. The state of early stopping is in the record of each checkpoint; a checkpoint of a
step that is evaluated is written after the evaluation.
"""

import shutil
from collections.abc import Callable, Sequence

from flexivit_jax.experiment import preparation
from flexivit_jax.experiment.monitor import EarlyStopping, FollowedMetric
from flexivit_jax.running import distributed, manifest
from flexivit_jax.running.checkpoint import BEST
from flexivit_jax.running.session import Saver, Session, note
from flexivit_jax.training import steps
from flexivit_jax.trees import Json


class Following:
  """The metrics that a run follows.

  Args:
    checkpoints: RUN/best, or None without `best`.
    best: metric whose best checkpoint is kept.
    early: when the run ends early.
    state: of early stopping, from the record of the checkpoint that the run resumes from.
  """

  def __init__(
    self,
    checkpoints: Saver | None,
    best: FollowedMetric | None,
    early: EarlyStopping | None,
    state: Json | None,
  ):
    self._checkpoints, self._best, self._early = checkpoints, best, early
    self._state = state or {}
    self._value = None if checkpoints is None else _value(checkpoints, best)

  @property
  def evaluators(self) -> set[str]:
    """Names of the evaluators that give these metrics."""
    metrics = (self._best, self._early and self._early.metric)
    return {metric.evaluator for metric in metrics if metric is not None}

  @property
  def ended(self) -> bool:
    """Whether early stopping has ended the run."""
    return self._early is not None and self._early.ends(self._state)

  def reason(self) -> str:
    """Returns why early stopping has ended the run."""
    return self._early.reason(self._state)

  def lacks(self, name: str, step: int) -> bool:
    """Whether the state of early stopping does not know the evaluation at a step."""
    if self._early is None or self._early.metric.evaluator != name:
      return False
    return not self._early.is_of(self._state) or self._state["step"] < step

  def record(self) -> Json:
    """Returns the state of early stopping for the record of a checkpoint."""
    return {} if self._early is None else {"early_stopping": self._state}

  def see(
    self,
    name: str,
    rows: Sequence[Json],
    state: steps.TrainState,
    record: Callable[[], Json],
    *,
    final: bool = False,
  ) -> None:
    """Updates the state of early stopping and saves RUN/best after an evaluation.

    Args:
      name: of the evaluator.
      rows: its results.
      state: what was evaluated.
      record: makes the record of a checkpoint.
      final: the run is over: early stopping has nothing to do.
    """
    step = int(state.step)
    if self._early is not None and self._early.metric.evaluator == name and not final:
      self._state = self._early.update(self._state, step, rows)
    if self._best is not None and self._best.evaluator == name:
      self._keep(self._best, rows, state, step, record)
    if distributed.is_on() and name in self.evaluators:
      distributed.agree(step, {"the best value so far": (self._value, self._state)})

  def _keep(
    self,
    best: FollowedMetric,
    rows: Sequence[Json],
    state: steps.TrainState,
    step: int,
    record: Callable[[], Json],
  ) -> None:
    value = best.value(rows)
    if not best.better(value, self._value):
      return
    self._value = value
    # Later checkpoints come from an earlier start: of another metric, or of a config that has changed.
    self._checkpoints.delete_from(step)
    rest = {k: v for k, v in preparation.rest(state).items() if k != "opt_state"}
    of = {"metric": str(best), "mode": best.mode, "value": value}
    self._checkpoints.save(step, state.params, rest, {**record(), "best": of})
    note(f"step {step}: {best} {value:.4g} is the best so far, kept in {BEST}/{step}")

  def wait(self) -> None:
    """Waits until RUN/best is on disk; a checkpoint of the run must not be there before it."""
    if self._checkpoints is not None:
      self._checkpoints.wait()


def open_best(run: Session, best: FollowedMetric | None, *, begun: bool) -> Saver | None:
  """Opens RUN/best where a config asks for it; a run that begins anew deletes an old one."""
  if best is None:
    return None
  folder = run.workdir / BEST

  def forget() -> None:
    if not begun and folder.is_dir():
      note(f"{folder} is of an earlier run, and deleted")
      shutil.rmtree(folder)

  distributed.on_first(forget, f"its folder {BEST}")
  return run.saver(BEST, keep=1, key=BEST)


def _value(checkpoints: Saver, best: FollowedMetric | None) -> float | None:
  """Returns the metric's value of the kept checkpoint, which process 0 reads for all; None: there is none."""
  return distributed.on_first(lambda: _value_on_disk(checkpoints, best), "its best checkpoint")


def _value_on_disk(checkpoints: Saver, best: FollowedMetric | None) -> float | None:
  step = checkpoints.latest_step()
  if step is None or best is None:
    return None
  try:
    checkpoints.verify(step)
  except manifest.Damaged as damage:
    note(f"{damage} The next evaluation takes its place.")
    return None
  of = checkpoints.record(step).get("best", {})
  if (of.get("metric"), of.get("mode")) == (str(best), best.mode):
    return of["value"]
  note(
    f"{checkpoints.folder / str(step)} is the best by {of.get('metric')}; the next evaluation of {best} takes its place"
  )
  return None
