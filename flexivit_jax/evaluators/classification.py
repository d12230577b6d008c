"""Top-1, top-5 and loss at every patch size."""

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from flexivit_jax import errors, losses, metrics
from flexivit_jax.evaluators.per_size import PerSize, Size


def eval_step(
  params: Any,
  batch: dict[str, jax.Array],
  *,
  model: nn.Module,
  loss: str,
  **size: Any,
) -> metrics.Sums:
  """Masked sums over one batch of top1, top5 and loss at one patch size."""
  logits, _ = model.apply({"params": params}, batch["image"], **size)
  return metrics.masked_sums(scores(logits, batch["labels"], loss), batch["_mask"])


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
  seqhw: Sequence[Size],
  loss: str = "softmax_xent",
) -> PerSize:
  """Evaluates a model on labelled images.

  Args:
    model: the model; its first output are logits.
    batches: re-iterable, of "image", "labels" (one-hot or multi-hot) and "_mask".
    mesh: where it runs.
    seqhw: sizes to evaluate: tokens per side, or (per column, per row).
    loss: a name in `losses.LOSSES`.
  """
  if loss not in losses.LOSSES:
    raise errors.unknown("loss", loss, losses.LOSSES)
  fn = functools.partial(eval_step, model=model, loss=loss)
  return PerSize(fn, model, batches, mesh, seqhw=seqhw, inputs=("image", "labels"))
