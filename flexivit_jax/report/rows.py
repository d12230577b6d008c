"""What a report knows of a run: rows, one for each size, and what they have beside their numbers."""

import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from flexivit_jax.evaluators.metrics import Metric

SizeText = int | str  # tokens or pixels of a side; "HxW" where the sides differ
Key = tuple[SizeText, SizeText, int | None]  # (patch, seqhw, depth)


class EvalRow(NamedTuple):
  """One evaluation of the first `depth` blocks (None: all).

  `gflops` are 2 x MACs / 1e9 of one image, `ms` its median time, `n` images. `value` is that of the run's metric and
  `interval` its 95 % interval, if there is one; `measured` are (name, value) of all metrics. Of a cascade `cascade` are
  its sizes, "4→8", and `setting` signal and risk; the patch is that of its finest size, the tokens are a mean.
  """

  seqhw: SizeText
  patch: SizeText
  tokens: int
  gflops: float
  ms: float | None
  n: int
  depth: int | None
  value: float
  interval: tuple[float, float] | None
  measured: tuple[tuple[str, float], ...]
  cascade: str = ""
  setting: str = ""

  def of(self, name: str) -> float | None:
    """Returns the value of a metric, None if the row lacks it."""
    return dict(self.measured).get(name)


class ImageSample(NamedTuple):
  """A sample image of classification at one size; `label` is None for an image without a class."""

  file: Path
  label: int | None
  predicted: int
  right: bool


class ReportRun(NamedTuple):
  """One curve: `metric` at each size. `trained` holds the grids `(h, w)` of its training, None if unknown.

  `metrics` are all that its rows have. `confusions` are the counts of class and predicted class of rows that have them,
  by `key_of`; `classes` their names. Of rows that have them `ious` are the intersections over unions of the classes,
  None for one without a pixel in the masks, and `samples` the files of predicted masks; `pixels` are those of each
  class in the masks. Of detection `aps` are the average precisions of the classes, None for one without a box,
  `boxes` the number of boxes of each, `parts` the average precisions of boxes of some areas and groups by the names
  of the evaluator, and `samples` the files of pictures with boxes. `images` are samples of classification, the same in
  all rows that have them. `cascades` are measured by the metric. `file` is the eval.json, `images_sha256` the digest of
  the scores of its images, if it has some.
  """

  name: str
  metric: Metric
  metrics: tuple[Metric, ...]
  rows: tuple[EvalRow, ...]
  trained: frozenset[tuple[int, int]] | None
  facts: dict[str, str]
  classes: tuple[str, ...] = ()
  confusions: Mapping[Key, Int[np.ndarray, "k k"]] = MappingProxyType({})
  ious: Mapping[Key, tuple[float | None, ...]] = MappingProxyType({})
  pixels: tuple[int, ...] = ()
  samples: Mapping[Key, tuple[Path, ...]] = MappingProxyType({})
  aps: Mapping[Key, tuple[float | None, ...]] = MappingProxyType({})
  boxes: tuple[int, ...] = ()
  parts: Mapping[Key, Mapping[str, float]] = MappingProxyType({})
  images: Mapping[Key, tuple[ImageSample, ...]] = MappingProxyType({})
  cascades: tuple[EvalRow, ...] = ()
  file: Path | None = None
  images_sha256: str | None = None

  @property
  def points(self) -> tuple[EvalRow, ...]:
    """Its rows and its cascades."""
    return self.rows + self.cascades

  @property
  def ceiling(self) -> Metric | None:
    """The metric that the run's can hardly be larger than, if it has one."""
    return next((m for m in self.metrics if m.ceiling_of == self.metric.name), None)


def key_of(row: EvalRow) -> Key:
  """Returns the key that identifies a row in its run."""
  return row.patch, row.seqhw, row.depth


def sides(size: object) -> tuple[int, int]:
  """Returns `(h, w)` of 8 or "8x6"; ValueError on anything else."""
  if isinstance(size, int) and not isinstance(size, bool) and size > 0:
    return size, size
  match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", size) if isinstance(size, str) else None
  if not match:
    raise ValueError(size)
  return int(match[1]), int(match[2])


def order(size: SizeText) -> tuple[int, int]:
  """Sorts sizes by area, then by height."""
  h, w = sides(size)
  return h * w, h


def is_trained(run: ReportRun, row: EvalRow) -> bool | None:
  """Whether the run was trained at the size of the row; None if the run does not say."""
  return None if run.trained is None else sides(row.seqhw) in run.trained
