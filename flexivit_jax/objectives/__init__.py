"""Objectives: what a training step minimises, by the name that a config gives them."""

from collections.abc import Callable

from flexivit_jax.objectives.base import Objective
from flexivit_jax.objectives.contrastive import sigmoid_contrastive, softmax_contrastive
from flexivit_jax.objectives.detection import detection
from flexivit_jax.objectives.distill import distill
from flexivit_jax.objectives.distill_detection import distill_detection
from flexivit_jax.objectives.distill_embeddings import distill_embeddings
from flexivit_jax.objectives.segmentation import segmentation
from flexivit_jax.objectives.self_distill import self_distill
from flexivit_jax.objectives.supervised import supervised

OBJECTIVES: dict[str, Callable[..., Objective]] = {
  "supervised": supervised,
  "distill": distill,
  "distill_embeddings": distill_embeddings,
  "distill_detection": distill_detection,
  "self_distill": self_distill,
  "softmax_contrastive": softmax_contrastive,
  "sigmoid_contrastive": sigmoid_contrastive,
  "segmentation": segmentation,
  "detection": detection,
}
