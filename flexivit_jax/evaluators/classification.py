"""Top-1, top-5 and loss at every patch size."""

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from flexivit_jax import errors, label_maps, losses, metrics
from flexivit_jax.evaluators.per_size import PerSize, Size, sizes_of


def eval_step(
  params: Any,
  batch: dict[str, jax.Array],
  *,
  model: nn.Module,
  loss: str,
  label_map: label_maps.LabelMap | None,
  skip_unlabelled: bool,
  **size: Any,
) -> metrics.Sums:
  """Masked sums over one batch of top1, top5 and loss at one patch size."""
  logits, _ = model.apply({"params": params}, batch["image"], **size)
  labels, mask = batch["labels"], batch["_mask"]
  if skip_unlabelled:  # Of the data set's labels: that the model lacks a class excuses nothing.
    mask = mask * (labels > 0).any(axis=-1)
  if label_map:
    logits, labels = restricted(label_map, logits, labels)
  return metrics.masked_sums(scores(logits, labels, loss), mask)


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
  model: nn.Module,
  batches: Iterable[dict],
  mesh: Any,
  *,
  seqhw: Sequence[Size] = (),
  stride: Sequence[int] = (),
  depth: Sequence[int] = (),
  loss: str = "softmax_xent",
  label_map: str | None = None,
  skip_unlabelled: bool = False,
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
  """
  if loss not in losses.LOSSES:
    raise errors.unknown("loss", loss, losses.LOSSES)
  chosen = None if label_map is None else label_maps.label_map(label_map)
  fn = functools.partial(
    eval_step, model=model, loss=loss, label_map=chosen, skip_unlabelled=skip_unlabelled
  )
  sizes, inputs = sizes_of(seqhw, stride, depth), ("image", "labels")
  return PerSize(fn, model, batches, mesh, sizes=sizes, inputs=inputs, label_map=chosen)
