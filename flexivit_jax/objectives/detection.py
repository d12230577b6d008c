"""Detection as set prediction: each true box is matched with one token, on the device (DETR, OWL-ViT)."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
from optax import assignment

from flexivit_jax import errors
from flexivit_jax.objectives.base import Batch, Losses, Objective, Predict, keep
from flexivit_jax.specs import image, spec

NORMALIZATIONS = ("example", "global")


class Match(NamedTuple):
  """Pairs of tokens and true boxes of one image; as many as there are tokens, or rows of boxes if these are fewer.

  Attributes:
    token: number of the token.
    box: number of the row in `boxes`.
    real: whether that row is a box and no padding.
  """

  token: Int[Array, "p"]
  box: Int[Array, "p"]
  real: Bool[Array, "p"]


def detection(
  *,
  queries: bool = False,
  multilabel: bool = False,
  alpha: float = 0.3,
  gamma: float = 2.0,
  class_weight: float = 1.0,
  l1_weight: float = 1.0,
  giou_weight: float = 1.0,
  normalization: str = "example",
) -> Objective:
  """Focal loss of the queries, and L1 and GIoU losses of the matched boxes; source: scenic's owl_vit at 4a38d475.

  An image has rows of boxes (x0, y0, x1, y1 in shares of the image: `pad_boxes`, `relative_boxes('xyxy')`), of which
  `box_mask` says which are real, and of each row the classes or queries that describe it. Tokens that match no box have
  no class. Where an image has more boxes than tokens, the boxes that match worst are left out of the loss.

  Args:
    queries: the batch has "queries" for the model and "box_targets" [m, q], for each row 1 at the queries that describe
      it; without, "box_labels" [m] are numbers of classes.
    multilabel: without queries: "box_targets" [m, classes], for each row 1 at its classes, in place of "box_labels".
    alpha, gamma: of the focal loss (arXiv 1708.02002).
    class_weight, l1_weight, giou_weight: of the three losses, and of the three costs of matching.
    normalization: "example": the class loss of an image is divided by the number of its positive labels, the others by
      that of its boxes (at least 1), and the mean is over images, as in the source. "global": all are summed, and
      divided by the number of boxes in the global batch.

  Raises:
    UserError: an unknown normalization; a weight, alpha or gamma that is out of range; queries and multilabel.
  """
  if normalization not in NORMALIZATIONS:
    raise errors.unknown("normalization", normalization, NORMALIZATIONS)
  if queries and multilabel:
    raise errors.UserError(
      "Got queries and multilabel; with queries a box may have several anyway. Leave multilabel out."
    )
  given = dict(class_weight=class_weight, l1_weight=l1_weight, giou_weight=giou_weight, gamma=gamma)
  for name, value in given.items():
    if not 0 <= value < math.inf:
      raise errors.UserError(f"{name}={value}; expected a finite number >= 0.")
  if not 0 < alpha < 1:
    raise errors.UserError(f"alpha={alpha}; expected a number between 0 and 1.")
  weights = (class_weight, l1_weight, giou_weight)

  def loss_of(predict: Predict, batch: Batch) -> Losses:
    out = predict({name: batch[name] for name in model_inputs})
    logits = out["class_logits"].astype(jnp.float32)
    boxes, real = batch["boxes"].astype(jnp.float32), batch["box_mask"].astype(bool)
    if queries or multilabel:
      targets = batch["box_targets"].astype(jnp.float32)
    else:
      # A class of -1, or a row of padding, describes nothing.
      targets = jax.nn.one_hot(batch["box_labels"], logits.shape[-1])
    targets = targets * real[..., None]
    each = functools.partial(_losses, weights=weights, alpha=alpha, gamma=gamma)
    predicted = out["pred_boxes"].astype(jnp.float32)
    parts, positives, number = jax.vmap(each)(logits, predicted, boxes, targets, real)
    if normalization == "global":
      return Losses(parts.sum(-1), number)
    per = jnp.stack([positives, number, number], axis=-1)
    return Losses((parts / jnp.maximum(per, 1.0)).sum(-1))

  model_inputs = ("image", "queries") if queries else ("image",)
  inputs = {"image": image(), "boxes": spec("m 4"), "box_mask": spec("m", "any")}
  if queries:
    # Of tokens, or vectors made of texts before: the model says which.
    inputs |= {"queries": spec("q l", "any"), "box_targets": spec("m q", "any")}
  elif multilabel:
    inputs |= {"box_targets": spec("m classes", "any")}
  else:
    inputs |= {"box_labels": spec("m", "int")}
  return Objective(inputs, ("class_logits", "pred_boxes"), keep(*inputs), loss_of)


def _losses(
  logits: Float[Array, "t q"],
  predicted: Float[Array, "t 4"],
  boxes: Float[Array, "m 4"],
  targets: Float[Array, "m q"],
  real: Bool[Array, "m"],
  *,
  weights: tuple[float, float, float],
  alpha: float,
  gamma: float,
) -> tuple[Float[Array, "3"], Float[Array, ""], Float[Array, ""]]:
  """Of one image: the three weighted sums, the number of positive labels and that of boxes."""
  # A row of padding has no area, where GIoU is not defined; its place is taken by the whole image.
  boxes = jnp.where(real[:, None], boxes, jnp.array([0.0, 0.0, 1.0, 1.0])[None])
  match = matched(logits, predicted, boxes, targets, real, weights, alpha, gamma)
  at_token = jnp.zeros_like(logits).at[match.token].set(targets[match.box] * match.real[:, None])
  positive, negative = focal_terms(logits, alpha, gamma)
  # Queries that are padding have scores far below all others: their loss is 0, and so is its gradient.
  class_loss = (at_token * positive + (1.0 - at_token) * negative).sum()
  own, true = corners(predicted)[match.token], boxes[match.box]
  counted = match.real.astype(jnp.float32)
  l1 = (jnp.abs(own - true).sum(-1) * counted).sum()
  far = ((1.0 - generalized_iou(own, true)) * counted).sum()
  parts = jnp.stack([class_loss, l1, far]) * jnp.array(weights)
  return parts, at_token.sum(), counted.sum()


def matched(
  logits: Float[Array, "t q"],
  predicted: Float[Array, "t 4"],
  boxes: Float[Array, "m 4"],
  targets: Float[Array, "m q"],
  real: Bool[Array, "m"],
  weights: tuple[float, float, float] = (1.0, 1.0, 1.0),
  alpha: float = 0.3,
  gamma: float = 2.0,
) -> Match:
  """Returns the cheapest matching of tokens and boxes; no gradient goes through it.

  Args:
    logits: scores of the queries for each token.
    predicted: boxes of the tokens (cx, cy, w, h).
    boxes: true boxes (x0, y0, x1, y1); rows of padding hold any box with an area.
    targets: 1 at the queries that describe the box.
    real: which rows are no padding.
    weights: of the costs: class, L1 of (cx, cy, w, h), and -GIoU.
    alpha, gamma: of the focal loss, in the cost of a class: positive less negative term, summed over the labels.
  """
  arrays = (logits, predicted, boxes, targets)
  logits, predicted, boxes, targets = (jax.lax.stop_gradient(x) for x in arrays)
  positive, negative = focal_terms(logits, alpha, gamma)
  labels = jnp.matmul(positive - negative, targets.T, precision=jax.lax.Precision.HIGHEST)
  far = jnp.abs(predicted[:, None] - centres(boxes)[None]).sum(-1)
  overlap = generalized_iou(corners(predicted)[:, None], boxes[None])
  cost = weights[0] * labels + weights[1] * far - weights[2] * overlap
  cost = jnp.where(real[None], cost, -jnp.inf)
  # Dearer than any real box, so that none goes without a token while a row of padding has one.
  dear = jnp.maximum(jnp.where(jnp.isfinite(cost), cost, 0.0).max(), 0.0) * 1.1 + 10.0
  cost = jnp.where(jnp.isfinite(cost), cost, dear)
  token, box = assignment.hungarian_algorithm(cost)
  return Match(token, box, real[box])


def focal_terms(
  logits: Float[Array, "t q"], alpha: float, gamma: float
) -> tuple[Float[Array, "t q"], Float[Array, "t q"]]:
  """The focal loss of each score where it should be 1, and where it should be 0."""
  log_p, log_not_p = jax.nn.log_sigmoid(logits), jax.nn.log_sigmoid(-logits)
  # As exponentials of gamma times a logarithm, which have finite gradients at 0 for every gamma.
  positive = -alpha * jnp.exp(gamma * log_not_p) * log_p
  negative = -(1.0 - alpha) * jnp.exp(gamma * log_p) * log_not_p
  return positive, negative


def corners(boxes: Float[Array, "*b 4"]) -> Float[Array, "*b 4"]:
  """(cx, cy, w, h) as (x0, y0, x1, y1)."""
  centre, half = boxes[..., :2], boxes[..., 2:] / 2
  return jnp.concatenate([centre - half, centre + half], axis=-1)


def centres(boxes: Float[Array, "*b 4"]) -> Float[Array, "*b 4"]:
  """(x0, y0, x1, y1) as (cx, cy, w, h)."""
  low, high = boxes[..., :2], boxes[..., 2:]
  return jnp.concatenate([(low + high) / 2, high - low], axis=-1)


def generalized_iou(a: Float[Array, "*a 4"], b: Float[Array, "*b 4"]) -> Float[Array, "*c"]:
  """GIoU of boxes (x0, y0, x1, y1), -1 to 1 (arXiv 1902.09630); 0 where both have no area and lie in one place."""
  low, high = jnp.maximum(a[..., :2], b[..., :2]), jnp.minimum(a[..., 2:], b[..., 2:])
  both = jnp.prod(jnp.maximum(high - low, 0.0), axis=-1)
  areas = [jnp.prod(x[..., 2:] - x[..., :2], axis=-1) for x in (a, b)]
  union = areas[0] + areas[1] - both
  low, high = jnp.minimum(a[..., :2], b[..., :2]), jnp.maximum(a[..., 2:], b[..., 2:])
  hull = jnp.prod(high - low, axis=-1)
  tiny = 1e-9
  iou = both / jnp.maximum(union, tiny)
  return iou - (hull - union) / jnp.maximum(hull, tiny)
