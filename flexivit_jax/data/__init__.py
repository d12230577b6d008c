"""Data: sources, preprocessing strings, and batches. Imports no JAX and no TensorFlow."""

from flexivit_jax.data.balanced import by_class
from flexivit_jax.data.box_census import box_lines
from flexivit_jax.data.census import class_sizes, pixel_shares
from flexivit_jax.data.known import planned_source
from flexivit_jax.data.loader import EvalBatches, TrainBatches, eval_batches, train_batches
from flexivit_jax.data.preprocess import (
  OPS,
  Preprocess,
  counted,
  image_operations,
  parse,
  tokens_of,
  without_files,
)
from flexivit_jax.data.renumbering import renumber
from flexivit_jax.data.shots import few_shots, subset
from flexivit_jax.data.sources import SOURCES, Source, is_prepared, make_source
from flexivit_jax.data.sources.folder import has_classes
from flexivit_jax.data.stream import BadExampleError

__all__ = [
  "OPS",
  "SOURCES",
  "BadExampleError",
  "EvalBatches",
  "Preprocess",
  "Source",
  "TrainBatches",
  "box_lines",
  "by_class",
  "class_sizes",
  "counted",
  "eval_batches",
  "few_shots",
  "has_classes",
  "image_operations",
  "is_prepared",
  "make_source",
  "parse",
  "pixel_shares",
  "planned_source",
  "renumber",
  "subset",
  "tokens_of",
  "train_batches",
  "without_files",
]
