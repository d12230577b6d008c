"""The evaluators of a run: each compiled once, run when due and at the end, its rows written, its metrics followed."""

import functools
from collections.abc import Callable

from jax.sharding import Mesh

from flexivit_jax.evaluators import results
from flexivit_jax.experiment import following, preparation
from flexivit_jax.experiment.build import Experiment
from flexivit_jax.experiment.evaluation import classes_of_tables
from flexivit_jax.running import distributed, metrics_writer
from flexivit_jax.running.session import Session, note
from flexivit_jax.sizes import size_label
from flexivit_jax.training import patch_schedule, steps
from flexivit_jax.trees import Json, Params

Record = Callable[[int, patch_schedule.State], Json]


class Evaluating:
  """The evaluators of one start of a run.

  Args:
    run: the session.
    exp: the experiment.
    mesh: where they run.
    record: what a checkpoint of a step records, see `restoring.record`.
    early: state of early stopping, from the checkpoint that the run resumes from.
  """

  def __init__(self, run: Session, exp: Experiment, mesh: Mesh, record: Record, early: Json):
    self._run, self._exp, self._record, self._early = run, exp, record, early
    self._evaluators = {
      name: e.make(exp.model, mesh, run.watchdog.data) for name, e in exp.evaluations.items()
    }
    self._follow = following.Following(None, None, exp.early, early)

  @property
  def end_the_run(self) -> bool:
    """Whether early stopping has ended the run."""
    return self._follow.ended

  def compile(self, params: Params) -> None:
    """Compiles each at its sizes."""
    report = preparation.report_of("eval", self._exp)
    for evaluator in self._evaluators.values():
      evaluator.compile(params, report)

  def open_best(self, *, resumed: bool) -> None:
    """Opens RUN/best, where the config asks for it."""
    best = following.open_best(self._run, self._exp.best, begun=resumed)
    self._follow = following.Following(best, self._exp.best, self._exp.early, self._early)

  def due(self, step: int) -> list[str]:
    """Returns the names of those that run after a step, those whose metrics the run follows first.

    A checkpoint of the step has to know of these; the last step has the final evaluation.
    """
    if step == self._exp.total_steps:
      return []
    names = [name for name, e in self._exp.evaluations.items() if step % e.every == 0]
    return sorted(names, key=lambda name: not self.is_followed(name))

  def is_followed(self, name: str) -> bool:
    """Whether the best checkpoint or early stopping goes by an evaluator."""
    return name in self._follow.evaluators

  def evaluate(self, name: str, state: steps.TrainState, schedule: patch_schedule.State) -> None:
    """Runs one and writes its row. A signal ends it at once; it then runs again when the run resumes."""
    with self._run.ledger.of("evaluation"):
      with self._run.stop.interruptible():
        rows = self._evaluators[name].run(state.params)
      self._see(name, rows, state, schedule)
      self._write_rows(name, int(state.step), rows)

  def evaluate_unfinished(self, state: steps.TrainState, schedule: patch_schedule.State) -> None:
    """Re-runs evaluations that were due at the restored step but did not finish."""
    step = int(state.step)

    def has_row(name: str) -> int:
      rows = metrics_writer.read_rows(self._run.workdir / "metrics.jsonl")
      return any(key.startswith(f"{name}/") for row in rows if row["step"] == step for key in row)

    for name, evaluation in self._exp.evaluations.items():
      if not step or step % evaluation.every:
        continue
      written = distributed.on_first(functools.partial(has_row, name), "metrics.jsonl")
      if self._follow.lacks(name, step) or not written:
        self.evaluate(name, state, schedule)

  def finish(self, state: steps.TrainState, schedule: patch_schedule.State) -> None:
    """Writes scores and costs at every size into metrics.jsonl and RUN/eval.json."""
    exp = self._exp
    if self._follow.ended:
      note(self._follow.reason())
    drawn = exp.flexi.get("seqhw") or exp.flexi.get("grid_hw")
    sizes = [v if isinstance(v, int) else f"{v[0]}x{v[1]}" for v in drawn.values] if drawn else None
    for name, evaluator in self._evaluators.items():
      source, rows = exp.evaluations[name].source, results.measure(evaluator, state.params)
      self._see(name, rows, state, schedule, final=True)
      self._write_rows(name, int(state.step), rows)
      classes = classes_of_tables(exp.evaluations[name], rows)
      about = results.about(
        exp.name,
        source.name,
        source.split,
        int(state.step),
        state.params,
        sizes,
        classes,
        exp.evaluations[name].metrics,
      )
      file = results.file_of(self._run.workdir / "eval.json", name, self._evaluators)
      results.write(file, about, rows, evaluator)

  def state(self) -> Json:
    """Returns what the record of a checkpoint holds of the metrics that are followed."""
    return self._follow.record()

  def wait(self) -> None:
    """Waits until RUN/best is on disk; a checkpoint of the run must not be there before it."""
    self._follow.wait()

  def _see(
    self,
    name: str,
    rows: list[Json],
    state: steps.TrainState,
    schedule: patch_schedule.State,
    *,
    final: bool = False,
  ) -> None:
    record = functools.partial(self._record, int(state.step), schedule)
    self._follow.see(name, rows, state, record, final=final)

  def _write_rows(self, name: str, step: int, rows: list[Json]) -> None:
    # All sizes at once: a stop between two would leave some, and the evaluation would count as made.
    metrics = self._exp.evaluations[name].metrics
    values = {
      f"{name}/{k}/seqhw={size_label(row)}": row[k]
      for row in rows
      for k in results.metrics_of(row, metrics)
    }
    self._run.writer.write(step, values)
    first = metrics[0]
    note(
      f"step {step}: {name} {first.name} "
      + ", ".join(f"{size_label(row)}: {first.text(row[first.name])}" for row in rows)
    )
