"""Evaluators, by the name that a config gives them.

Not in `__init__.py`: that would import JAX for `flexivit report`, which needs `intervals` and `metrics` only.
"""

from collections.abc import Callable, Mapping
from typing import Any

from flexivit_jax.evaluators import (
  classification,
  detection,
  distance,
  embedding_distance,
  fewshot,
  knn,
  retrieval,
  segmentation,
  teacher,
  zero_shot,
)
from flexivit_jax.evaluators.base import Evaluator
from flexivit_jax.evaluators.metrics import Metric

_DECLARED: dict[str, tuple[Callable[..., Evaluator], tuple[Metric, ...]]] = {
  "classification": (classification.classification, classification.METRICS),
  "detection": (detection.detection, detection.METRICS),
  "distance": (distance.distance, distance.METRICS),
  "embedding_distance": (embedding_distance.embedding_distance, embedding_distance.METRICS),
  "fewshot": (fewshot.fewshot, fewshot.METRICS),
  "knn": (knn.knn, knn.METRICS),
  "retrieval": (retrieval.retrieval, retrieval.METRICS),
  "segmentation": (segmentation.segmentation, segmentation.METRICS),
  "teacher": (teacher.teacher, teacher.METRICS),
  "zero_shot": (zero_shot.zero_shot, zero_shot.METRICS),
}

EVALUATORS = {name: make for name, (make, _) in _DECLARED.items()}
METRICS = {name: metrics for name, (_, metrics) in _DECLARED.items()}


def metrics_of(section: Mapping[str, Any]) -> tuple[Metric, ...]:
  """Returns the metrics that an evaluator of this section of `evals` measures, the headline first."""
  declared = METRICS[section.get("type", "classification")]
  return tuple(metric for metric in declared if not metric.needs or section.get(metric.needs))
