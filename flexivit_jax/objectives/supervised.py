"""Supervised classification."""

import jax

from flexivit_jax.objectives import losses
from flexivit_jax.objectives.base import Batch, ClassWeights, Objective, Predict, weighted


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
    image, labels = losses.mixup(key, batch["image"], batch["labels"], p=mixup_p)
    return {"image": image, "labels": labels}

  def per_example(predict: Predict, batch: Batch) -> jax.Array:
    return labels_loss(predict(batch["image"]), batch["labels"])

  return Objective(("image", "labels"), prepare, per_example)
