"""Supervised classification."""

import jax

from flexivit_jax.objectives import losses
from flexivit_jax.objectives.base import (
  Batch,
  ClassWeights,
  Losses,
  Objective,
  Predict,
  weighted,
)
from flexivit_jax.specs import image, spec


def supervised(
  *, loss: str = "softmax_xent", mixup_p: float = 0.0, class_weights: ClassWeights = None
) -> Objective:
  """Cross-entropy of batch["image"] against batch["labels"], after mixup.

  Args:
    loss: a name in `losses.LOSSES`.
    mixup_p: parameter of mixup's Beta distribution; 0 switches it off.
    class_weights: by what an example's loss is multiplied, a number for each class, see `losses.weighted`.
  """
  losses.check_mixup(mixup_p)
  labels_loss = weighted(loss, class_weights)

  def prepare(batch: Batch, key: jax.Array) -> Batch:
    mixed, labels = losses.mixup(key, batch["image"], batch["labels"], p=mixup_p)
    return {"image": mixed, "labels": labels}

  def loss_of(predict: Predict, batch: Batch) -> Losses:
    logits = predict({"image": batch["image"]})["logits"]
    return Losses(labels_loss(logits, batch["labels"]))

  inputs = {"image": image(), "labels": spec("classes")}
  return Objective(inputs, ("logits",), prepare, loss_of)
