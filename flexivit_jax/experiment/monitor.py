"""A metric that a run goes by: which it is, what is better, and when a run ends early."""

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from flexivit_jax import errors
from flexivit_jax.config import Section
from flexivit_jax.evaluators import results
from flexivit_jax.evaluators.metrics import Better, Metric
from flexivit_jax.evaluators.registry import METRICS, metrics_of as measured
from flexivit_jax.sizes import SeqHw, size_label, size_text
from flexivit_jax.trees import Json

Mode = Better
Rows = Sequence[Section]


class FollowedMetric(NamedTuple):
  """A metric of an evaluator, at one size or, with `size` None, its mean over all sizes; `mode` says what is better."""

  evaluator: str
  name: str
  size: str | None
  mode: str

  def __str__(self) -> str:
    return f"{self.evaluator}/{self.name}" + ("" if self.size is None else f"@{self.size}")

  def value(self, rows: Rows) -> float:
    """Its value in the rows of an evaluation."""
    return statistics.fmean(row[self.name] for row in rows if self._has(row))

  def better(self, value: float, best: float | None, by: float = 0.0) -> bool:
    """Whether a value is better by more than `by`; one that is not finite never is."""
    if not math.isfinite(value):
      return False
    if best is None:
      return True
    return value > best + by if self.mode == "max" else value < best - by

  def _has(self, row: Section) -> bool:
    whole = size_label(dict(row))
    return self.size is None or self.size == whole or self.size in whole.split(" ")


class EarlyStopping(NamedTuple):
  """A run ends after `patience` evaluations that are not better by more than `min_delta` than the best before."""

  metric: FollowedMetric
  patience: int
  min_delta: float

  def update(self, state: Section, step: int, rows: Rows) -> Json:
    """Returns the state after an evaluation; {} is that before the first, or of another metric."""
    value = self.metric.value(rows)
    if not self.is_of(state):
      state = {"metric": str(self.metric), "mode": self.metric.mode, "best": None, "bad": 0}
    if self.metric.better(value, state["best"], self.min_delta):
      return {**state, "step": step, "best": value, "best_step": step, "bad": 0}
    return {**state, "step": step, "bad": state["bad"] + 1}

  def is_of(self, state: Section) -> bool:
    """Whether the state is of this metric."""
    return bool(state) and (state["metric"], state["mode"]) == (str(self.metric), self.metric.mode)

  def ends(self, state: Section) -> bool:
    """Whether a run of this state has ended."""
    return self.is_of(state) and state["bad"] >= self.patience

  def reason(self, state: Section) -> str:
    """Why a run of this state has ended."""
    best = f"{state['best']:.4g} at step {state['best_step']}" if state["best"] is not None else "-"
    return (
      f"early stopping after step {state['step']}: in {state['bad']} evaluations {self.metric} has not become better"
      f" than {best}" + (f", by more than {self.min_delta:g}" if self.min_delta else "")
    )


def early_stopping(
  *,
  evals: Section,
  metric: str | None = None,
  patience: int = 3,
  min_delta: float = 0.0,
  mode: Mode | None = None,
) -> EarlyStopping:
  """Reads a section `early_stopping`.

  Args:
    evals: of the config.
    metric: see `parse`; default: the first metric of the main evaluator, "test/top1".
    patience: evaluations without improvement after which the run ends.
    min_delta: by how much a value has to be better.
    mode: see `parse`.

  Raises:
    UserError: see `parse`; a patience below 1, a min_delta that is negative or not finite.
  """
  if patience < 1 or not 0 <= min_delta < math.inf:
    raise errors.UserError(
      f"early_stopping has patience={patience}, min_delta={min_delta}; expected 1 or more, and a finite number >= 0."
    )
  if metric is None and evals:
    main = results.main_of(evals)
    metric = f"{main}/{next(iter(metrics_of(evals[main])), 'top1')}"
  return EarlyStopping(
    parse("early_stopping.metric", metric or "", evals, mode), patience, float(min_delta)
  )


def metrics_of(section: Section) -> dict[str, Metric]:
  """Returns the metrics of an evaluator that training changes, by name, the headline first."""
  return {metric.name: metric for metric in measured(section) if metric.trained}


def parse(where: str, text: str, evals: Section, mode: Mode | None = None) -> FollowedMetric:
  """Reads "test/top1", the mean over all sizes, or "test/top1@8", at one of them.

  Args:
    where: the key of the config.
    text: EVALUATOR/METRIC, or EVALUATOR/METRIC@SIZE, the size as a note of the run names it: 8, 8x6, "8 depth=3"; or a
      part of that.
    evals: of the config.
    mode: "max" where larger is better; default: what is better of such a metric.

  Raises:
    UserError: an evaluator, a metric or a size that the config does not have.
  """
  if not evals:
    raise errors.UserError(
      f"{where} needs an evaluation, and the config has none; add one to evals."
    )
  evaluator, slash, rest = text.partition("/")
  if not slash or "/" in rest:
    main = results.main_of(evals)
    example = f"{main}/{next(iter(metrics_of(evals[main])), 'top1')}"
    raise errors.UserError(
      f"{where} is {text!r}; expected EVALUATOR/METRIC or EVALUATOR/METRIC@SIZE, e.g. {example!r}."
    )
  if evaluator not in evals:
    raise errors.unknown(f"evaluator in {where}", evaluator, evals)
  name, at, size = rest.partition("@")
  metrics, kind = metrics_of(evals[evaluator]), evals[evaluator].get("type", "classification")
  if not metrics:
    raise errors.UserError(
      f"{where} is {text!r}, but training changes nothing that a {kind!r} measures; give another evaluator."
    )
  if name not in metrics:
    needs = next((metric.needs for metric in METRICS[kind] if metric.name == name), "")
    more = f" It needs {needs}=True of the evaluator." if needs else ""
    error = errors.unknown(f"metric in {where}", name, metrics)
    raise errors.UserError(f"{error}{more}")
  sizes = _sizes(evals[evaluator])
  if at and size not in sizes:
    raise errors.unknown(f"size in {where}", size, sizes)
  return FollowedMetric(evaluator, name, size if at else None, mode or metrics[name].better)


def _sizes(section: Section) -> list[str]:
  """The names of an evaluator's sizes, as far as its section tells, and their parts."""
  grids = [str(size_text(_square(size))) for size in section.get("seqhw") or ()]
  grids += [f"stride={s}" for s in section.get("stride") or ()]
  depths = [f"depth={k}" for k in section.get("depth") or ()]
  whole = [f"{grid} {depth}" for grid in grids for depth in depths if "=" not in grid]
  return [*grids, *depths, *whole]


def _square(size: SeqHw | list[int]) -> SeqHw:
  if isinstance(size, int):
    return size
  h, w = size
  return h if h == w else (h, w)
