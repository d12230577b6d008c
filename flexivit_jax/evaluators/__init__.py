"""Evaluators, by the name that a config gives them."""

from collections.abc import Callable
from typing import Any

from flexivit_jax.evaluators.classification import classification
from flexivit_jax.evaluators.distance import distance
from flexivit_jax.evaluators.fewshot import fewshot
from flexivit_jax.evaluators.knn import knn
from flexivit_jax.evaluators.teacher import teacher

EVALUATORS: dict[str, Callable[..., Any]] = {
  "classification": classification,
  "distance": distance,
  "fewshot": fewshot,
  "knn": knn,
  "teacher": teacher,
}
