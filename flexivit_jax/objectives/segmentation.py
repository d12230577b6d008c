"""Semantic segmentation: the loss of each pixel that has a class."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int

from flexivit_jax import errors
from flexivit_jax.objectives.base import (
  Batch,
  ClassWeights,
  Losses,
  Objective,
  Predict,
  keep,
)
from flexivit_jax.specs import NO_CLASS, image, spec

LOSSES = ("cross_entropy", "focal", "dice")


def segmentation(
  *,
  loss: str | Mapping[str, float] = "cross_entropy",
  gamma: float = 2.0,
  class_weights: ClassWeights = None,
) -> Objective:
  """Loss of the model's "pixel_logits" [n, h, w, k] against batch["mask"] [n, h, w].

  A pixel of class -1 counts for nothing, in no loss. The mean is over all other pixels of the global batch, however
  they are divided among images, devices and microbatches.

  Args:
    loss: a name in `LOSSES`, or the weights of several: {"cross_entropy": 1.0, "dice": 0.5}. "focal" is
      (1 - p)^gamma times the cross-entropy (arXiv 1708.02002). "dice" is `1 - 2 |P T| / (|P| + |T|)` of an image, the
      mean over the classes that it has; each image weighs as many pixels as it has with a class.
    gamma: of "focal".
    class_weights: by what the loss of a pixel is multiplied, a number for each class, or numbers by name; for "dice"
      its share of the mean over classes.

  Raises:
    UserError: an unknown loss, a weight or gamma that is negative or not finite; class weights that are not resolved.
  """
  shares = {loss: 1.0} if isinstance(loss, str) else dict(loss)
  for name, share in shares.items():
    if name not in LOSSES:
      raise errors.unknown("loss", name, LOSSES)
    if not 0 < share < np.inf:
      raise errors.UserError(f"loss: {name} has the weight {share}; expected a finite number > 0.")
  if not shares:
    raise errors.UserError(f"loss={loss!r}; expected one of {', '.join(LOSSES)}, or several.")
  if not 0 <= gamma < np.inf:
    raise errors.UserError(f"gamma={gamma}; expected a finite number >= 0.")
  if isinstance(class_weights, str | Mapping):
    raise errors.UserError(f"class_weights={class_weights!r}; expected a number for each class.")
  weights = None if class_weights is None else tuple(class_weights)

  def loss_of(predict: Predict, batch: Batch) -> Losses:
    logits = predict({"image": batch["image"]})["pixel_logits"]
    return pixel_losses(logits, batch["mask"], shares, gamma, weights)

  inputs = {"image": image(), "mask": spec("h w", "int")}
  return Objective(inputs, ("pixel_logits",), keep("image", "mask"), loss_of)


def pixel_losses(
  logits: Float[Array, "n h w k"],
  mask: Int[Array, "n h w"],
  shares: Mapping[str, float],
  gamma: float = 2.0,
  class_weights: tuple[float, ...] | None = None,
) -> Losses:
  """Returns, of each image, the summed loss of its pixels with a class, and how many these are."""
  logits = logits.astype(jnp.float32)
  counts = (mask != NO_CLASS).astype(jnp.float32)
  labels = jnp.where(mask == NO_CLASS, 0, mask)
  number = counts.sum((1, 2))
  k = logits.shape[-1]
  weights = jnp.ones(k) if class_weights is None else jnp.asarray(class_weights, jnp.float32)

  log_p = jax.nn.log_softmax(logits)
  own = jnp.take_along_axis(log_p, labels[..., None], axis=-1)[..., 0]
  total = jnp.zeros_like(number)
  for name, share in shares.items():
    if name == "dice":
      total += share * number * _dice(jnp.exp(log_p), labels, counts, weights)
      continue
    # 1 - p of a sure pixel is 0, where the gradient of a power below 1 is infinite.
    focus = (jnp.maximum(-jnp.expm1(own), 1e-12)) ** gamma if name == "focal" else 1.0
    total += share * (-own * focus * weights[labels] * counts).sum((1, 2))
  return Losses(total, number)


def _dice(
  p: Float[Array, "n h w k"],
  labels: Int[Array, "n h w"],
  counts: Float[Array, "n h w"],
  weights: Float[Array, "k"],
) -> Float32[Array, "n"]:
  """1 - the Dice coefficient of each image, the weighted mean over the classes that it has; 0 for one without any."""
  true = jax.nn.one_hot(labels, p.shape[-1]) * counts[..., None]
  both = (p * true).sum((1, 2))
  size = (p * counts[..., None]).sum((1, 2)) + true.sum((1, 2))
  present = (true.sum((1, 2)) > 0) * weights[None]
  each = 1.0 - 2.0 * both / jnp.maximum(size, 1e-6)
  return (each * present).sum(-1) / jnp.maximum(present.sum(-1), 1e-12)
