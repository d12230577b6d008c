"""Distillation of a detector: the student's boxes and scores at the patch size drawn follow those of frozen teachers.

Both have a box and scores for each patch, but not the same patches. Each token of the teacher belongs to the student's
patch whose centre is nearest to its own; a student's token follows the surest of those that belong to it. Where patches
are finer than the teacher's, most have none: they learn to say nothing, for a second box of the same object would be
one too many. On equal grids each token follows itself, so that a student that is its teacher has no loss. Ours: no
published detector was distilled over patch sizes.
"""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from flexivit_jax import errors
from flexivit_jax.objectives.base import Batch, Losses, Objective, Outputs, Predict, Teaching, keep
from flexivit_jax.objectives.detection import corners, generalized_iou
from flexivit_jax.objectives.distill import Teacher, taught_images
from flexivit_jax.specs import image
from flexivit_jax.trees import Params

OUTPUTS = ("class_logits", "patch_centres", "pred_boxes")


def distill_detection(
  *,
  teachers: Mapping[str, Teacher],
  class_weight: float = 1.0,
  l1_weight: float = 1.0,
  giou_weight: float = 1.0,
) -> Objective:
  """Sum over the teachers of three losses: KL of each query's score, L1 and GIoU of the boxes.

  KL is that of two Bernoulli distributions, summed over tokens and queries; a token that follows none has the score 0
  as its target. A box counts as much as the teacher is sure of it, the highest probability of its queries. The sums of
  an image are divided by that of these weights (at least 1), as `detection` divides by the number of boxes.

  Args:
    teachers: by name; detectors of the same queries in the same order, which are their classes.
    class_weight, l1_weight, giou_weight: of the three.

  Raises:
    UserError: no teacher, or a weight that is negative or not finite; where it runs, another number of queries.
  """
  if not teachers:
    raise errors.UserError("objective.teachers is empty; give at least one, with its checkpoint.")
  weights = dict(class_weight=class_weight, l1_weight=l1_weight, giou_weight=giou_weight)
  for name, value in weights.items():
    if not 0 <= value < math.inf:
      raise errors.UserError(f"{name}={value}; expected a finite number >= 0.")
  images, prepare_images = taught_images(teachers, mixup_p=0.0)

  def targets(frozen: Params, batch: Batch) -> dict[str, Outputs]:
    return {name: _answers(t, frozen[name], batch) for name, t in teachers.items()}

  def loss_of(predict: Predict, batch: Batch) -> Losses:
    out = predict({"image": batch["image"]})
    logits, boxes = (out[name].astype(jnp.float32) for name in ("class_logits", "pred_boxes"))
    total = jnp.zeros(len(logits))
    for name, target in batch["targets"].items():
      theirs = target["class_logits"]
      if theirs.shape[-1] != logits.shape[-1]:
        raise errors.UserError(
          f"objective.teachers.{name} scores {theirs.shape[-1]} queries, the model {logits.shape[-1]}; expected the"
          " same."
        )
      owner = owners(target["patch_centres"][0], out["patch_centres"][0])
      each = jax.vmap(_losses, in_axes=(0, 0, 0, 0, None))
      parts = each(logits, boxes, theirs, target["pred_boxes"], owner)
      total += parts @ jnp.array([*weights.values()])
    return Losses(total)

  frozen = {name: t.params for name, t in teachers.items()}
  teaching = Teaching(images, prepare_images, targets, frozen)
  return Objective({"image": image()}, OUTPUTS, keep("image", "targets"), loss_of, teaching)


def _answers(teacher: Teacher, params: Params, batch: Batch) -> Outputs:
  """What a teacher finds, float32; no gradient flows through it."""
  _, out = teacher.model.apply({"params": params}, batch[teacher.image], **teacher.size)
  return {name: jax.lax.stop_gradient(out[name].astype(jnp.float32)) for name in OUTPUTS}


def owners(theirs: Float[Array, "T 2"], ours: Float[Array, "t 2"]) -> Int[Array, "T"]:
  """Returns for each patch of the teacher the student's patch whose centre is nearest; of equally near ones, the first.

  Args:
    theirs, ours: centres (x, y) in shares of the image.
  """
  far = jnp.square(theirs[:, None] - ours[None]).sum(-1)
  return far.argmin(-1)


def followed(
  sure: Float[Array, "T"], owner: Int[Array, "T"], tokens: int
) -> tuple[Int[Array, "t"], Bool[Array, "t"]]:
  """Returns for each of the student's tokens the surest of the teacher's that it owns, and whether it owns any."""
  own = jnp.where(owner[:, None] == jnp.arange(tokens)[None], sure[:, None], -1.0)
  return own.argmax(0), own.max(0) >= 0


def _losses(
  logits: Float[Array, "t q"],
  boxes: Float[Array, "t 4"],
  target_logits: Float[Array, "T q"],
  target_boxes: Float[Array, "T 4"],
  owner: Int[Array, "T"],
) -> Float[Array, "3"]:
  """Of one image: the three losses, divided by the weight of its boxes."""
  sure = jax.nn.sigmoid(target_logits.max(-1))
  token, owns = followed(sure, owner, len(logits))
  target, true = target_logits[token], target_boxes[token]
  yes, no = jax.nn.log_sigmoid(target), jax.nn.log_sigmoid(-target)
  # Queries that are padding have scores far below all others on both sides: 0 times a finite number.
  p = jax.nn.sigmoid(target)
  our_yes, our_no = jax.nn.log_sigmoid(logits), jax.nn.log_sigmoid(-logits)
  divergence = p * (yes - our_yes) + (1.0 - p) * (no - our_no)
  scores = jnp.where(owns[:, None], divergence, -our_no).sum()
  weight = sure[token] * owns
  own, true = corners(boxes), corners(true)
  l1 = (weight * jnp.abs(own - true).sum(-1)).sum()
  giou = (weight * (1.0 - generalized_iou(own, true))).sum()
  return jnp.stack([scores, l1, giou]) / jnp.maximum(weight.sum(), 1.0)
