"""Self-distillation across sizes: no teacher but the model itself, at one size that is good, say the finest.

Labels teach the size drawn, and so does the model's own answer at `size`: of the same weights (as in-place distillation
does between widths, arXiv 1903.05134), or of their EMA (arXiv 1703.01780). Not in the FlexiViT paper.
"""

from collections.abc import Mapping
from typing import Any

import jax

from flexivit_jax import errors
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


def self_distill(
  *,
  size: Mapping[str, Any],
  weight: float = 1.0,
  distance: str = "kl",
  temperature: float = 1.0,
  ema: float | None = None,
  loss: str = "softmax_xent",
  mixup_p: float = 0.0,
  class_weights: ClassWeights = None,
) -> Objective:
  """The labels' loss at the size drawn, plus the distance from there to the model's own logits at `size`.

  Args:
    size: static arguments of the model where it teaches, e.g. {"seqhw": 30}.
    weight: of the distance.
    distance: a name in `losses.DISTANCES`.
    temperature: both sides' logits are divided by it, the distance multiplied by its square.
    ema: the EMA of the weights teaches, with this decay a step (for example 0.999; less in the first steps, see
      `steps.update_ema`). None: the weights themselves teach.
    loss: a name in `losses.LOSSES`.
    mixup_p: parameter of mixup's Beta distribution; 0 switches it off.
    class_weights: by what the labels' loss is multiplied, a number for each class, see `losses.weighted`.

  Raises:
    UserError: no size; an unknown name; a temperature or weight that is not positive; a decay outside (0, 1).
  """
  losses.check_mixup(mixup_p)
  labels_loss = weighted(loss, class_weights)
  if distance not in losses.DISTANCES:
    raise errors.unknown("distance", distance, losses.DISTANCES)
  if temperature <= 0 or weight <= 0:
    raise errors.UserError(f"temperature={temperature}, weight={weight}; expected both > 0.")
  if ema is not None and not 0 < ema < 1:
    raise errors.UserError(f"ema={ema}; expected a decay between 0 and 1, or None.")
  if not size:
    raise errors.UserError("size is empty; give where the model teaches, e.g. size=dict(seqhw=30).")
  size = dict(size)

  def prepare(batch: Batch, key: jax.Array) -> Batch:
    mixed, labels = losses.mixup(key, batch["image"], batch["labels"], p=mixup_p)
    return {"image": mixed, "labels": labels}

  def loss_of(predict: Predict, batch: Batch) -> Losses:
    inputs = {"image": batch["image"]}
    logits = predict(inputs)["logits"]
    target = predict(inputs, fixed=True, **size)["logits"]
    far = losses.DISTANCES[distance](logits / temperature, target / temperature)
    return Losses(labels_loss(logits, batch["labels"]) + weight * temperature**2 * far)

  inputs = {"image": image(), "labels": spec("classes")}
  return Objective(inputs, ("logits",), prepare, loss_of, ema=ema, also=(size,))
