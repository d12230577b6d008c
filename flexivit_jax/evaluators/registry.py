"""Evaluators, by the name that a config gives them.

Not in `__init__.py`: that would import JAX for `flexivit report`, which needs `intervals` only.
"""

from collections.abc import Callable

from flexivit_jax.evaluators.base import Evaluator
from flexivit_jax.evaluators.classification import classification
from flexivit_jax.evaluators.distance import distance
from flexivit_jax.evaluators.fewshot import fewshot
from flexivit_jax.evaluators.knn import knn
from flexivit_jax.evaluators.teacher import teacher

EVALUATORS: dict[str, Callable[..., Evaluator]] = {
  "classification": classification,
  "distance": distance,
  "fewshot": fewshot,
  "knn": knn,
  "teacher": teacher,
}

_CLASSIFIED = {"top1": "max", "top5": "max", "loss": "min"}
# Of each the metrics that training changes, the headline first, and whether larger or smaller values are better. Some
# are there only with an option: `monitor.metrics_of`.
METRICS: dict[str, dict[str, str]] = {
  "classification": {**_CLASSIFIED, "top1_macro": "max"},
  "distance": {
    "agree1": "max",
    "agree5": "max",
    "kl": "min",
    "logsoftmax_euclidean": "min",
    **_CLASSIFIED,
  },
  "fewshot": {"top1": "max"},
  "knn": {"top1": "max"},
  "teacher": {},
}
