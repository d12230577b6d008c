"""A config becomes objects: data, model, objective, optimizer, sizes, evaluations. Computes nothing on a device."""

from flexivit_jax.experiment.build import (
  GIVEN,
  Evaluation,
  Experiment,
  build,
  build_evaluation,
  classes_of_tables,
  example_shapes,
  naming,
  without_evaluations,
)
from flexivit_jax.experiment.loaders import REAL, Opening

__all__ = [
  "GIVEN",
  "REAL",
  "Evaluation",
  "Experiment",
  "Opening",
  "build",
  "build_evaluation",
  "classes_of_tables",
  "example_shapes",
  "naming",
  "without_evaluations",
]
