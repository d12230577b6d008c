"""Supervised classification."""

import jax

from flexivit_jax import errors, losses
from flexivit_jax.objectives.base import Batch, Objective, Predict


def supervised(*, loss: str = "softmax_xent", mixup_p: float = 0.0) -> Objective:
  """Cross-entropy of batch["image"] against batch["labels"], after mixup.

  Args:
    loss: a name in `losses.LOSSES`.
    mixup_p: parameter of mixup's Beta distribution; 0 switches it off.
  """
  losses.check_mixup(mixup_p)
  if loss not in losses.LOSSES:
    raise errors.unknown("loss", loss, losses.LOSSES)

  def prepare(batch: Batch, key: jax.Array) -> Batch:
    image, labels = losses.mixup(key, batch["image"], batch["labels"], p=mixup_p)
    return {"image": image, "labels": labels}

  def per_example(predict: Predict, batch: Batch) -> jax.Array:
    return losses.LOSSES[loss](predict(batch["image"]), batch["labels"])

  return Objective(("image", "labels"), prepare, per_example)
