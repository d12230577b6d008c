"""Distillation: the student's logits at the patch size drawn follow those of frozen teachers at their own.

Student and teachers see the same crop, flip and mixup of an image, each at its own resolution (function matching,
arXiv 2106.05237; FlexiViT, arXiv 2212.08013, section on distillation).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from flexivit_jax import errors
from flexivit_jax.objectives import losses
from flexivit_jax.objectives.base import (
  Batch,
  ClassWeights,
  Losses,
  Objective,
  Predict,
  Teaching,
  weighted,
)
from flexivit_jax.sizes import SizeArgs
from flexivit_jax.specs import Specs, image, spec
from flexivit_jax.trees import Params


class Teacher(NamedTuple):
  """A frozen model.

  Attributes:
    model, params: as `weights.load` returns them.
    image: the key of the batch under which it finds its image.
    size: static arguments of the model, e.g. {"seqhw": 14}; empty for its own patch size.
    class_names: in the order of its logits; None: they are known by number only.
  """

  model: nn.Module
  params: Params
  image: str
  size: SizeArgs
  class_names: tuple[str, ...] | None = None


def distill(
  *,
  teachers: Mapping[str, Teacher],
  distance: str = "kl",
  temperature: float = 1.0,
  mixup_p: float = 0.0,
  label_weight: float = 0.0,
  label_loss: str = "softmax_xent",
  top_k: int | None = None,
  class_weights: ClassWeights = None,
) -> Objective:
  """Sum over the teachers of the distance between student and teacher, with KL(teacher || student) by default.

  Args:
    teachers: by name.
    distance: a name in `losses.DISTANCES`.
    temperature: both sides' logits are divided by it, the result multiplied by its square.
    mixup_p: parameter of mixup's Beta distribution; 0 switches it off.
    label_weight: of the labels' loss, which is added; 0: batches need no labels.
    label_loss: a name in `losses.LOSSES`.
    top_k: of a teacher's logits only so many are kept, and one number for all others, see `losses.sparse_logits`:
      what a cache of them then takes. None: all.
    class_weights: by what the labels' loss is multiplied, a number for each class, see `losses.weighted`.

  Raises:
    UserError: no teacher, an unknown name, a temperature that is not positive, a negative weight, a top_k below 1;
      class_weights without label_weight.
  """
  if not teachers:
    raise errors.UserError("objective.teachers is empty; give at least one, with its checkpoint.")
  losses.check_mixup(mixup_p)
  if distance not in losses.DISTANCES:
    raise errors.unknown("distance", distance, losses.DISTANCES)
  if label_loss not in losses.LOSSES:
    raise errors.unknown("label_loss", label_loss, losses.LOSSES)
  if class_weights is not None and not label_weight:
    raise errors.UserError(
      "class_weights without label_weight has no effect; remove one or set both."
    )
  labels_loss = weighted(label_loss, class_weights)
  if temperature <= 0 or label_weight < 0 or (top_k is not None and top_k < 1):
    raise errors.UserError(
      f"temperature={temperature}, label_weight={label_weight}, top_k={top_k};"
      " expected > 0, >= 0, and None or >= 1."
    )
  inputs = {"image": image(), **({"labels": spec("classes")} if label_weight else {})}

  def prepare(batch: Batch, key: jax.Array) -> Batch:
    mixed = losses.mixup(key, *(batch[name] for name in inputs), p=mixup_p)
    return {**dict(zip(inputs, mixed, strict=True)), "targets": batch["targets"]}

  images, prepare_images = taught_images(teachers, mixup_p)

  def targets(frozen: Params, batch: Batch) -> dict[str, Any]:
    taught = {name: teach(t, frozen[name], batch) for name, t in teachers.items()}
    if top_k is None:
      return taught
    return {name: losses.sparse_logits(logits, top_k) for name, logits in taught.items()}

  def loss_of(predict: Predict, batch: Batch) -> Losses:
    logits = predict({"image": batch["image"]})["logits"]
    total = jnp.zeros(len(logits))
    if label_weight:
      total += label_weight * labels_loss(logits, batch["labels"])
    for top in batch["targets"].values():
      target = top if top_k is None else losses.dense_logits(top, logits.shape[-1])
      far = losses.DISTANCES[distance](logits / temperature, target / temperature)
      total += temperature**2 * far
    return Losses(total)

  frozen = {name: t.params for name, t in teachers.items()}
  teaching = Teaching(images, prepare_images, targets, frozen)
  return Objective(inputs, ("logits",), prepare, loss_of, teaching)


def taught_images(
  teachers: Mapping[str, Teacher], mixup_p: float
) -> tuple[Specs, Callable[[Batch, jax.Array], Batch]]:
  """Returns the images that teachers take from the batch, and a `prepare` that mixes them as the student's."""
  images = {t.image: image(t.image) for t in teachers.values()}

  def prepare(batch: Batch, key: jax.Array) -> Batch:
    mixed = losses.mixup(key, *(batch[name] for name in images), p=mixup_p)
    return dict(zip(images, mixed, strict=True))

  return images, prepare


def reordered(teacher: Teacher, order: Sequence[int], class_names: Sequence[str] | None) -> Teacher:
  """The same teacher with its logits in another order.

  Args:
    teacher: a teacher.
    order: which of its logits comes first, second, ...; all of them.
    class_names: in the new order.
  """
  head = {name: a[..., np.asarray(order)] for name, a in teacher.params["head"].items()}
  names = None if class_names is None else tuple(class_names)
  return teacher._replace(params={**teacher.params, "head": head}, class_names=names)


def teach(teacher: Teacher, params: Params, batch: Batch) -> jax.Array:
  """Returns the teacher's logits [n, k]; no gradient flows through them."""
  logits, _ = teacher.model.apply({"params": params}, batch[teacher.image], **teacher.size)
  return jax.lax.stop_gradient(logits)
