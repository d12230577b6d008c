"""Distillation where there are no classes: the student's embedding at the size drawn follows that of frozen teachers.

Two terms. Each embedding points where the teacher's does (cosine); and seen from each image, the other images of the
batch are as near as they are for the teacher (relational: the idea of arXiv 1904.05068, in the form of arXiv 2101.04731
with the batch in the place of a queue). The second is what nearest neighbours and prompts of names go by.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from flexivit_jax import errors
from flexivit_jax.objectives import losses
from flexivit_jax.objectives.base import Batch, BatchLoss, Losses, Objective, Predict, Teaching
from flexivit_jax.objectives.distill import Teacher, taught_images
from flexivit_jax.specs import image
from flexivit_jax.trees import Params, Tree

OUTPUTS = ("pre_logits", "logits")


def distill_embeddings(
  *,
  teachers: Mapping[str, Teacher],
  output: str = "pre_logits",
  cosine: float = 1.0,
  relational: float = 1.0,
  temperature: float = 0.1,
  mixup_p: float = 0.0,
) -> Objective:
  """Sum over the teachers of `cosine` times the cosine distance plus `relational` times `losses.relation`.

  Args:
    teachers: by name; their embeddings have the length of the student's.
    output: "pre_logits", what the model pools; or "logits", where these are a projection to a space of texts (CLIP).
    cosine, relational: weights of the terms.
    temperature: cosine similarities are divided by it before the softmax over the other images.
    mixup_p: parameter of mixup's Beta distribution; 0 switches it off.

  Raises:
    UserError: no teacher, an unknown output, a temperature that is not positive, a weight below 0 or both 0.
  """
  if not teachers:
    raise errors.UserError("objective.teachers is empty; give at least one, with its checkpoint.")
  if output not in OUTPUTS:
    raise errors.unknown("output", output, OUTPUTS)
  if not temperature > 0 or min(cosine, relational) < 0 or not cosine + relational > 0:
    raise errors.UserError(
      f"cosine={cosine}, relational={relational}, temperature={temperature}; expected weights >= 0, one of them > 0,"
      " and a temperature > 0."
    )
  losses.check_mixup(mixup_p)
  images, prepare_images = taught_images(teachers, mixup_p)

  def prepare(batch: Batch, key: jax.Array) -> Batch:
    (mixed,) = losses.mixup(key, batch["image"], p=mixup_p)
    return {"image": mixed, "targets": batch["targets"]}

  def targets(frozen: Params, batch: Batch) -> dict[str, jax.Array]:
    return {name: embedding(t, frozen[name], batch, output) for name, t in teachers.items()}

  def embed(predict: Predict, batch: Batch) -> Tree:
    return predict({"image": batch["image"]})[output]

  def loss(embedded: Tree, batch: Batch) -> Losses:
    total = jnp.zeros(len(embedded))
    for target in batch["targets"].values():
      total += cosine * losses.cosine_distance(embedded, target)
      if relational:
        total += relational * losses.relation(embedded, target, temperature)
    return Losses(total)

  frozen = {name: t.params for name, t in teachers.items()}
  teaching = Teaching(images, prepare_images, targets, frozen)

  def separable(predict: Predict, batch: Batch) -> Losses:
    return loss(embed(predict, batch), batch)

  # Without the second term the loss of an example depends on no other one: microbatches then need one pass.
  of_batch = BatchLoss(embed, loss) if relational else separable
  return Objective({"image": image()}, (output,), prepare, of_batch, teaching)


def embedding(teacher: Teacher, params: Params, batch: Batch, output: str) -> jax.Array:
  """Returns the teacher's embedding [n, d]; no gradient flows through it."""
  _, out = teacher.model.apply({"params": params}, batch[teacher.image], **teacher.size)
  return jax.lax.stop_gradient(out[output])
