"""The interface between whoever evaluates (the trainer, `flexivit eval`, `flexivit reproduce`) and an evaluator."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np

from flexivit_jax.devices.compilation import Program
from flexivit_jax.evaluators.image_scores import ImageScores
from flexivit_jax.sizes import SizeArgs
from flexivit_jax.trees import Params

Batches = Iterable[Mapping[str, np.ndarray]]
"""Re-iterable: each pass yields the same batches, this process's share of the images.

Keys of a batch, arrays [n, ...] of one length n: "image" float32 [n, h, w, c] in [-1, 1]; "_mask" float32 [n], 1 for
an image and 0 for padding; "labels" float32 [n, k], one-hot or multi-hot, where the evaluator needs them; a teacher's
image under its own key."""

Row = dict[str, Any]
"""What was measured at one size: "seqhw" (an int, or "HxW"), "stride" and "depth" where these are set, "n" (images that
counted), and the evaluator's metrics by name. Accuracies are fractions. "intervals": the low and the high end of the
95 % interval by the name of a metric, where the evaluator made one."""

Report = Callable[[SizeArgs, Program], None]


def silent(size: SizeArgs, program: Program) -> None:
  """The `Report` that reports nothing."""


@runtime_checkable
class Evaluator(Protocol):
  """Measures a model on a data set at several sizes.

  Made by a function of `registry.EVALUATORS`: `(model, batches, mesh, **options) -> Evaluator`. `model` is a
  `models.Model`, `batches` are `Batches`, `mesh` is where it runs. The options are keys of its section in a config:
  `seqhw`, `stride`, `depth` (sizes, see `per_size.sizes_of`) and its own. A function with arguments `train_batches` and
  `num_classes` gets the data set under `train_data`; one with an argument `teacher`, the loaded `Teacher`; one with
  `class_names`, `class_groups` and `tokens`, the names of the data's classes, groups of them (see `data.Source`), and
  how texts become tokens.
  Its file declares its metrics, the headline first (`metrics.Metric`): who is best, reports and eval.json go by that.
  """

  def check(self) -> None:
    """Reads the first batch and compares it with the model; computes nothing, so `mesh` may be None until here.

    Raises:
      UserError: a key that the batches lack, labels of other classes, a size that does not fit the images.
    """
    ...

  def compile(self, params: Params, report: Report = silent) -> None:
    """Compiles one program for each size; nothing is compiled later.

    Args:
      params: the model's, or their shapes and shardings.
      report: called with each size and its program.

    Raises:
      UserError: as `check`.
      OutOfMemory: a program that does not fit.
    """
    ...

  def run(self, params: Params) -> list[Row]:
    """Returns a row for each size, after one pass over the batches. Compiles first where `compile` was not called."""
    ...

  def costs(self, params: Params, repeats: int = 5) -> list[Row]:
    """Returns for each size {"patch", "tokens", "gflops", "ms"} of one image; call it after `compile` or `run`.

    Args:
      params: the model's.
      repeats: how often a batch is timed; "ms" is the median.
    """
    ...


@runtime_checkable
class ScoresImages(Protocol):
  """An evaluator that knows which images were right."""

  def image_scores(self) -> ImageScores | None:
    """Returns those of the latest `run`, of all processes; None where there are none."""
    ...


@runtime_checkable
class Illustrated(Protocol):
  """An evaluator that keeps samples to look at."""

  def pictures(self) -> dict[str, bytes]:
    """Returns files by name, those of this process's part of the latest `run`."""
    ...
