"""Weighted nearest neighbours at every patch size: how much of the classes lies in the frozen features as they are.

The protocol of DINO (arXiv 2104.14294), after Wu et al. 2018 (arXiv 1805.01978): of all training images the k with the
largest cosine similarity vote for their class, each with exp(similarity / temperature). Nothing is fitted.

The search runs on the first device of each process: it holds one size's training features, 4 * n * width bytes (of
ImageNet-1k and a ViT-B 3.9 GB), their labels, n * classes bytes (1.3 GB), and `BLOCK` similarities or votes at a time.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float

from flexivit_jax import errors, heartbeat
from flexivit_jax.evaluators import metrics
from flexivit_jax.evaluators.base import Batches
from flexivit_jax.evaluators.probing import Classify, Probing
from flexivit_jax.models import Model
from flexivit_jax.sizes import SeqHw

METRICS = (metrics.TOP1,)
BLOCK = 2**26  # similarities, or votes, of one part of the test images: 256 MiB


def knn(
  model: Model,
  batches: Batches,
  mesh: Mesh | None,
  *,
  train_batches: Batches,
  num_classes: int,
  seqhw: Sequence[SeqHw] = (),
  stride: Sequence[int] = (),
  depth: Sequence[int] = (),
  k: int = 20,
  temperature: float = 0.07,
) -> Probing:
  """Top-1 of weighted nearest neighbours among training images, at each patch size; for its memory see `Probing`.

  Args:
    model, batches, mesh, num_classes: see `Probing`.
    train_batches: as `batches`, of the same shapes: those that vote; each for all of its labels.
    seqhw, stride, depth: sizes to evaluate, see `per_size.sizes_of`.
    k: how many vote.
    temperature: a neighbour that is more alike by this much has e times the weight.

  Raises:
    UserError: k or a temperature that is not positive; later, fewer than k training images.
  """
  if k < 1 or not temperature > 0:
    raise errors.UserError(f"k={k}, temperature={temperature}; expected 1 or more, and over 0.")

  def fit(features: np.ndarray, labels: np.ndarray) -> tuple[Classify, dict[str, Any]]:
    if len(features) < k:
      raise errors.UserError(f"k={k} of {len(features)} training images; expected as many as k.")
    rows = max(1, BLOCK // max(len(features), k * labels.shape[1]))
    known = jnp.asarray(normalized(features)), jnp.asarray(labels)
    vote = functools.partial(votes, *known, k=k, temperature=float(temperature))
    return functools.partial(classify, vote, rows=rows), {}

  return Probing(
    model,
    batches,
    mesh,
    train_batches=train_batches,
    fit=fit,
    num_classes=num_classes,
    seqhw=seqhw,
    stride=stride,
    depth=depth,
  )


def normalized(features: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
  """Features of length one; one that is zero stays, and is as alike to all."""
  length = np.linalg.norm(features, axis=-1, keepdims=True)
  return (features / np.maximum(length, 1e-12)).astype(np.float32)


@functools.partial(jax.jit, static_argnames=("k", "temperature"))
def votes(
  known: Float[Array, "n d"],
  labels: Bool[Array, "n c"],
  asked: Float[Array, "m d"],
  *,
  k: int,
  temperature: float,
) -> Float[Array, "m c"]:
  """The votes for each class, divided by the nearest neighbour's own; features of length one.

  The division changes no order, and keeps exp from overflowing at a small temperature.
  """
  similarity = jnp.matmul(asked, known.T, precision=jax.lax.Precision.HIGHEST)
  nearest, which = jax.lax.top_k(similarity, k)
  # Not nearest[:, :1], which is the same: of a slice XLA (jax 0.10.2, CPU) makes a full sort, a hundred times as long.
  largest = nearest.max(axis=1, keepdims=True)
  weights = jnp.exp((nearest - largest) / temperature)
  return jnp.where(labels[which], weights[:, :, None], 0.0).sum(axis=1)


def classify(vote: Callable[[np.ndarray], Array], features: np.ndarray, *, rows: int) -> np.ndarray:
  """The class with most votes for each of the features [m, d], so many at a time; the lowest of equal ones."""
  neighbours = []
  for block in blocks(normalized(features), min(rows, len(features))):
    neighbours.append(np.asarray(vote(block)).argmax(axis=-1))
    heartbeat.beat()
  return np.concatenate(neighbours)[: len(features)]


def blocks(array: np.ndarray, rows: int) -> Iterator[np.ndarray]:
  """Parts of an array of so many rows each, the last one filled up with zeros: one shape, one program."""
  for start in range(0, len(array), rows):
    block = array[start : start + rows]
    yield np.pad(block, ((0, rows - len(block)), (0, 0)))
