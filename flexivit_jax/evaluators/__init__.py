"""Evaluators, by the name that a config gives them."""

from collections.abc import Callable

from flexivit_jax.evaluators.classification import classification
from flexivit_jax.evaluators.distance import distance
from flexivit_jax.evaluators.per_size import PerSize

EVALUATORS: dict[str, Callable[..., PerSize]] = {
  "classification": classification,
  "distance": distance,
}
