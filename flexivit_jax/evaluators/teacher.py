"""A teacher's own accuracy, once: it never changes."""

from typing import Any, final

from jax.sharding import Mesh

from flexivit_jax.evaluators import metrics
from flexivit_jax.evaluators.base import Batches, Report, Row, silent
from flexivit_jax.evaluators.classification import classification
from flexivit_jax.evaluators.per_size import PerSize
from flexivit_jax.models import Model
from flexivit_jax.objectives.distill import Teacher
from flexivit_jax.trees import Params

METRICS = tuple(
  metric._replace(trained=False) for metric in metrics.CLASSIFICATION if not metric.needs
)


@final
class Once:
  """An evaluator of other parameters than those in training, which runs the first time it is asked."""

  def __init__(self, evaluator: PerSize, params: Params):
    self._evaluator, self._params = evaluator, params
    self._rows: list[Row] | None = None

  def check(self) -> None:
    """As of `PerSize`."""
    self._evaluator.check()

  def compile(self, params: Params, report: Report = silent) -> None:
    """As of `PerSize`; nothing where the result is known already."""
    if self._rows is None:
      self._evaluator.compile(self._params, report)

  def run(self, params: Params) -> list[Row]:
    """The rows of the other parameters, whatever `params` are."""
    if self._rows is None:
      self._rows = self._evaluator.run(self._params)
    return self._rows

  def costs(self, params: Params, repeats: int = 5) -> list[Row]:
    """As of `PerSize`."""
    return self._evaluator.costs(self._params, repeats)


def teacher(
  model: Model,
  batches: Batches,
  mesh: Mesh | None,
  *,
  teacher: Teacher,
  loss: str = "softmax_xent",
) -> Once:
  """Evaluates a teacher on labelled images at its own size.

  Args:
    model: the student, which has no part in it.
    batches: re-iterable, of the teacher's image (`teacher.image`), "labels" and "_mask".
    mesh: where it runs.
    teacher: its `size` is the one that is measured.
    loss: a name in `losses.LOSSES`.
  """
  renamed = _Renamed(batches, teacher.image)
  image_hw = next(iter(renamed))["image"].shape[1:3]
  size = teacher.model.grid(image_hw, **teacher.size).grid_hw
  seqhw = (size[0],) if size[0] == size[1] else (size,)
  return Once(classification(teacher.model, renamed, mesh, seqhw=seqhw, loss=loss), teacher.params)


class _Renamed:
  """Batches with one image under "image"."""

  def __init__(self, batches: Batches, key: str):
    self._batches, self._key = batches, key

  def __iter__(self) -> Any:
    for batch in self._batches:
      yield {**batch, "image": batch[self._key]}
