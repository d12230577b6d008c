"""Distillation: the student's logits at the patch size drawn follow those of frozen teachers at their own.

Student and teachers see the same crop, flip and mixup of an image, each at its own resolution (function matching,
arXiv 2106.05237; FlexiViT, arXiv 2212.08013, section on distillation).
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from flexivit_jax import errors, losses
from flexivit_jax.objectives.base import Batch, Objective, Predict


class Teacher(NamedTuple):
  """A frozen model.

  Attributes:
    model, params: as `weights.load` returns them.
    image: the key of the batch under which it finds its image.
    size: static arguments of the model, e.g. {"seqhw": 14}; empty for its own patch size.
  """

  model: nn.Module
  params: Any
  image: str
  size: dict[str, Any]


def distill(
  *,
  teachers: Mapping[str, Teacher],
  distance: str = "kl",
  temperature: float = 1.0,
  mixup_p: float = 0.0,
  label_weight: float = 0.0,
  label_loss: str = "softmax_xent",
) -> Objective:
  """Sum over the teachers of the distance between student and teacher, with KL(teacher || student) by default.

  Args:
    teachers: by name.
    distance: a name in `losses.DISTANCES`.
    temperature: both sides' logits are divided by it, the result multiplied by its square.
    mixup_p: parameter of mixup's Beta distribution; 0 switches it off.
    label_weight: of the labels' loss, which is added; 0: batches need no labels.
    label_loss: a name in `losses.LOSSES`.

  Raises:
    UserError: no teacher, an unknown name, a temperature that is not positive, a negative weight.
  """
  if not teachers:
    raise errors.UserError("objective.teachers is empty; give at least one, with its checkpoint.")
  if distance not in losses.DISTANCES:
    raise errors.unknown("distance", distance, losses.DISTANCES)
  if label_loss not in losses.LOSSES:
    raise errors.unknown("label_loss", label_loss, losses.LOSSES)
  if temperature <= 0 or label_weight < 0:
    raise errors.UserError(
      f"temperature={temperature}, label_weight={label_weight}; expected > 0 and >= 0."
    )
  images = dict.fromkeys(["image", *(t.image for t in teachers.values())])
  inputs = (*images, *(("labels",) if label_weight else ()))

  def prepare(batch: Batch, key: jax.Array) -> Batch:
    mixed = losses.mixup(key, *(batch[name] for name in inputs), p=mixup_p)
    return dict(zip(inputs, mixed, strict=True))

  def per_example(predict: Predict, batch: Batch, frozen: Any) -> jax.Array:
    logits = predict(batch["image"])
    total = jnp.zeros(len(logits))
    if label_weight:
      total += label_weight * losses.LOSSES[label_loss](logits, batch["labels"])
    for name, teacher in teachers.items():
      target = teach(teacher, frozen[name], batch)
      far = losses.DISTANCES[distance](logits / temperature, target / temperature)
      total += temperature**2 * far
    return total

  return Objective(inputs, prepare, per_example, {n: t.params for n, t in teachers.items()})


def teach(teacher: Teacher, params: Any, batch: Batch) -> jax.Array:
  """Returns the teacher's logits [n, k]; no gradient flows through them."""
  logits, _ = teacher.model.apply({"params": params}, batch[teacher.image], **teacher.size)
  return jax.lax.stop_gradient(logits)
