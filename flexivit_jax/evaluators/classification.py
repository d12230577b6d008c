"""Top-1, top-5 and loss at every patch size."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from flexivit_jax import errors
from flexivit_jax.data import label_maps
from flexivit_jax.evaluators import metrics
from flexivit_jax.evaluators.base import Batches
from flexivit_jax.evaluators.per_size import PerSize, sizes_of
from flexivit_jax.evaluators.sums import Sums, masked_sums
from flexivit_jax.models import Model
from flexivit_jax.objectives import losses
from flexivit_jax.objectives.base import Batch
from flexivit_jax.sizes import SeqHw
from flexivit_jax.trees import Params

METRICS = metrics.CLASSIFICATION
MAX_CLASSES = 1000  # of `per_class`


def eval_step(
  params: Params,
  batch: Batch,
  *,
  model: Model,
  loss: str,
  label_map: label_maps.LabelMap | None,
  skip_unlabelled: bool,
  per_class: bool,
  **size: Any,
) -> Sums:
  """Masked sums over one batch of top1, top5 and loss at one patch size, and the table "confusion"."""
  logits, _ = model.apply({"params": params}, batch["image"], **size)
  labels, mask = batch["labels"], batch["_mask"]
  if skip_unlabelled:  # Of the data set's labels: that the model lacks a class excuses nothing.
    mask = mask * (labels > 0).any(axis=-1)
  if label_map:
    logits, labels = restricted(label_map, logits, labels)
  scored = scores(logits, labels, loss)
  sums = masked_sums(scored, mask)
  if "_id" in batch:
    label = jnp.where((labels > 0).any(axis=-1), labels.argmax(axis=-1), -1)
    per_image = {"top1": scored["top1"], "label": label, "predicted": predicted(logits)}
    sums = sums._replace(per_image=per_image | {"_mask": mask, "_id": batch["_id"]})
  if not per_class:
    return sums
  return sums._replace(tables={"confusion": confusion(logits, labels, mask)})


def confusion(
  logits: Float[Array, "n k"], labels: Float[Array, "n k"], mask: Float[Array, "n"]
) -> Int[Array, "k+1 k"]:
  """Counts examples by their class and the predicted one; the last row is of those without a label.

  Of several labels the class is the one that was predicted, if it is among them, else the first of the largest.
  """
  k, found = logits.shape[-1], predicted(logits)
  hit = jnp.take_along_axis(labels, found[:, None], axis=-1)[:, 0] > 0
  true = jnp.where(hit, found, labels.argmax(axis=-1))
  true = jnp.where((labels > 0).any(axis=-1), true, k)
  return jnp.zeros((k + 1, k), jnp.int32).at[true, found].add((mask > 0).astype(jnp.int32))


def predicted(logits: Float[Array, "n k"]) -> Int[Array, "n"]:
  """The class of the largest logit."""
  return logits.astype(jnp.float32).argmax(axis=-1)


def restricted(
  label_map: label_maps.LabelMap, logits: jax.Array, labels: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """The columns of the logits [n, model_classes] and of the labels that stay, in the same order."""
  columns, of_labels = label_map.columns, label_map.labels[labels.shape[-1]]
  return logits[:, np.asarray(columns)], labels[:, np.asarray(of_labels)]


def scores(logits: jax.Array, labels: jax.Array, loss: str) -> dict[str, jax.Array]:
  """Per example: top1 and top5 (any of the labels is right) and the loss."""
  k = min(5, logits.shape[-1])
  logits = logits.astype(jnp.float32)
  hits = jnp.take_along_axis(labels, jax.lax.top_k(logits, k)[1], axis=-1) > 0
  top1, top5 = hits[:, 0] * 1.0, hits.any(axis=-1) * 1.0
  return {"top1": top1, "top5": top5, "loss": losses.LOSSES[loss](logits, labels)}


def classification(
  model: Model,
  batches: Batches,
  mesh: Mesh | None,
  *,
  seqhw: Sequence[SeqHw] = (),
  stride: Sequence[int] = (),
  depth: Sequence[int] = (),
  loss: str = "softmax_xent",
  label_map: str | None = None,
  skip_unlabelled: bool = False,
  per_class: bool = False,
  samples: int = 8,
) -> PerSize:
  """Evaluates a model on labelled images.

  An image is right if any of its labels is the class of the largest logit (top1) or of one of the five largest (top5).

  Args:
    model: the model; its first output are logits.
    batches: re-iterable, of "image", "labels" (one-hot or multi-hot) and "_mask".
    mesh: where it runs.
    seqhw, stride, depth: sizes to evaluate, see `per_size.sizes_of`.
    loss: a name in `losses.LOSSES`; of several labels at once it is no more than a number.
    label_map: a name in `label_maps.LABEL_MAPS`; logits and labels are restricted to its classes before anything is
      scored. An image none of whose labels stays is wrong; it adds nothing to a softmax loss.
    skip_unlabelled: leave images without any label out of the means and of "n"; otherwise they are wrong.
    per_class: count images by their class and the predicted one, and give "top1_macro", the mean over the classes of
      their top1. Takes 4 * k * k bytes a size for k classes, at most `MAX_CLASSES`.
    samples: how many images that some size gets wrong are kept to look at, see `image_samples`.

  Raises:
    UserError: an unknown name; more classes than `per_class` bears; two towers, which have no classes; samples below 0.
  """
  if loss not in losses.LOSSES:
    raise errors.unknown("loss", loss, losses.LOSSES)
  if "text" in model.outputs and "logits" not in model.outputs:
    raise errors.UserError(
      f"A {type(model).__name__} has no classes, but texts; use type='zero_shot', whose classes are texts."
    )
  if samples < 0:
    raise errors.UserError(f"samples={samples} of an evaluation; expected 0 or more.")
  chosen = None if label_map is None else label_maps.label_map(label_map)
  classes = model.num_classes if chosen is None else len(chosen.columns)
  if per_class and classes > MAX_CLASSES:
    raise errors.UserError(
      f"per_class=True of {classes} classes: a table of {classes} x {classes} numbers at each size; expected at most"
      f" {MAX_CLASSES} classes. Leave it out, or restrict them with a label_map."
    )
  fn = functools.partial(
    eval_step,
    model=model,
    loss=loss,
    label_map=chosen,
    skip_unlabelled=skip_unlabelled,
    per_class=per_class,
  )
  sizes, inputs = sizes_of(seqhw, stride, depth), ("image", "labels")
  return PerSize(
    fn,
    model,
    batches,
    mesh,
    sizes=sizes,
    inputs=inputs,
    label_map=chosen,
    scored="top1",
    samples=samples,
  )


def table_classes(
  names: Sequence[str] | None, num_classes: int, label_map: str | None
) -> list[str]:
  """The names of the classes of a table of `per_class`, in its order; numbers where there are no names.

  Args:
    names: of the data's classes.
    num_classes: of the data.
    label_map: as in `classification`.
  """
  if label_map is None:
    return list(names) if names else [str(k) for k in range(num_classes)]
  chosen = label_maps.label_map(label_map)
  if names and num_classes in chosen.labels:
    return [names[k] for k in chosen.labels[num_classes]]
  return [str(column) for column in chosen.columns]
