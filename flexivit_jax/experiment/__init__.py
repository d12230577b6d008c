"""A config becomes objects: data, model, objective, optimizer, evaluators. Computes nothing on a device."""

from flexivit_jax.experiment.build import (
  Experiment,
  check,
  divided_model,
  from_config,
  without_evaluations,
)
from flexivit_jax.experiment.checks import example_arrays
from flexivit_jax.experiment.evaluation import (
  Evaluation,
  build_evaluation,
  classes_of_tables,
  missing_data,
)
from flexivit_jax.experiment.loaders import REAL, Opening
from flexivit_jax.experiment.settings import Settings

__all__ = [
  "REAL",
  "Evaluation",
  "Experiment",
  "Opening",
  "Settings",
  "build_evaluation",
  "check",
  "classes_of_tables",
  "divided_model",
  "example_arrays",
  "from_config",
  "missing_data",
  "without_evaluations",
]
