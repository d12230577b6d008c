"""Per-example losses, distances between logits, and mixup, all in float32 whatever the inputs are."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Key, UInt32

from flexivit_jax.errors import UserError


def softmax_xent(logits: Float[Array, "n k"], labels: Float[Array, "n k"]) -> Float32[Array, "n"]:
  """Cross-entropy in nats of each example; `labels` are distributions over classes.

  Source: big_vision utils.py `softmax_xent`.
  """
  log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
  return -jnp.sum(labels.astype(jnp.float32) * log_p, axis=-1)


def sigmoid_xent(logits: Float[Array, "n k"], labels: Float[Array, "n k"]) -> Float32[Array, "n"]:
  """Sum over classes of the binary cross-entropies in nats; each label is in [0, 1].

  Source: big_vision utils.py `sigmoid_xent`. The sum, not the mean: the loss grows with `k`.
  """
  logits, labels = logits.astype(jnp.float32), labels.astype(jnp.float32)
  # log(1 - sigmoid(x)) = log_sigmoid(-x), without the cancellation.
  log_p, log_not_p = jax.nn.log_sigmoid(logits), jax.nn.log_sigmoid(-logits)
  return -jnp.sum(labels * log_p + (1.0 - labels) * log_not_p, axis=-1)


LOSSES = {"softmax_xent": softmax_xent, "sigmoid_xent": sigmoid_xent}


def weighted(loss: str, class_weights: Sequence[float] | None) -> Callable[..., Array]:
  """The loss of a name, each example's multiplied by the weight of its class.

  An example of soft labels y, after mixup say, has the weight `sum_k w_k y_k / sum_k y_k`; one without any label has 1.
  The mean over a batch divides by its size, not by the sum of its weights: each example's share does not depend on what
  else is in its batch, so that parts of a batch and devices add up to the same. PyTorch's `CrossEntropyLoss(weight=w)`
  has the same losses of one-hot labels, but its mean divides by the sum of the weights, a number that varies from batch
  to batch; of soft labels it weights the terms of the sum over classes.

  Args:
    loss: a name in `LOSSES`.
    class_weights: one for each class; None: all are alike.
  """
  fn = LOSSES[loss]
  if class_weights is None:
    return fn
  weights = np.asarray(class_weights, np.float32)

  def run(logits: Float[Array, "n k"], labels: Float[Array, "n k"]) -> Float32[Array, "n"]:
    labels = labels.astype(jnp.float32)
    total = labels.sum(axis=-1)
    mean = jnp.matmul(labels, weights, precision=jax.lax.Precision.HIGHEST)
    weight = jnp.where(total > 0, mean / jnp.where(total > 0, total, 1.0), 1.0)
    return fn(logits, labels) * weight

  return run


def kl(logits: Float[Array, "n k"], teacher: Float[Array, "n k"]) -> Float32[Array, "n"]:
  """KL(teacher || student) in nats of the two softmax distributions.

  Source: big_vision evaluators/proj/distill/distance.py, "kl" at t = 1.
  """
  log_p, log_q = (jax.nn.log_softmax(x.astype(jnp.float32)) for x in (teacher, logits))
  return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


def logsoftmax_euclidean(
  logits: Float[Array, "n k"], teacher: Float[Array, "n k"]
) -> Float32[Array, "n"]:
  """Euclidean distance of the log-probabilities. Source: as `kl`; its 1e-12 keeps the gradient finite at 0."""
  difference = jax.nn.log_softmax(logits.astype(jnp.float32)) - jax.nn.log_softmax(
    teacher.astype(jnp.float32)
  )
  return jnp.sqrt(jnp.sum(difference**2, axis=-1) + 1e-12)


class SparseLogits(NamedTuple):
  """What is kept of logits [n, k]: the largest `values` [n, top] at `indices` [n, top], `rest` [n] for the others."""

  values: Array
  indices: Array
  rest: Array


def sparse_logits(logits: Float[Array, "n k"], top: int) -> SparseLogits:
  """Keeps the `top` largest; the others become one number, with which together they have the probability that they had.

  So the kept probabilities stay exact, and what is lost is how the rest is divided. Not for sigmoid models.
  """
  logits = logits.astype(jnp.float32)
  top = min(top, logits.shape[-1])
  values, indices = jax.lax.top_k(logits, top)
  others = jnp.put_along_axis(logits, indices, -jnp.inf, axis=-1, inplace=False)
  rest = jax.nn.logsumexp(others, axis=-1) - jnp.log(max(logits.shape[-1] - top, 1))
  return SparseLogits(values, indices, rest)


def dense_logits(sparse: SparseLogits, k: int) -> Float32[Array, "n k"]:
  """Logits [n, k] of what `sparse_logits` kept."""
  dense = jnp.broadcast_to(sparse.rest[:, None], (len(sparse.rest), k))
  return jnp.put_along_axis(dense, sparse.indices, sparse.values, axis=-1, inplace=False)


def cosine_distance(
  embedding: Float[Array, "n d"], teacher: Float[Array, "n d"]
) -> Float32[Array, "n"]:
  """1 - the cosine of the angle between student and teacher, 0 to 2; 1 where one of them is zero."""
  return 1.0 - jnp.sum(_unit(embedding) * _unit(teacher), axis=-1)


def relation(
  embedding: Float[Array, "n d"], teacher: Float[Array, "n e"], temperature: float
) -> Float32[Array, "n"]:
  """How differently student and teacher see, from each example, the other examples of the batch.

  Of each example's cosine similarities to the others, divided by `temperature`, the softmax; of these distributions
  KL(teacher || student) in nats: the cross-entropy, less what no student can change. An example's similarity to itself
  is left out: it is 1 for both. The two spaces may have different lengths. Source: SEED (arXiv 2101.04731), there with
  a queue of examples. Memory: two matrices [n, n].
  """
  log_p, log_q = (_log_neighbours(x, temperature) for x in (teacher, embedding))
  return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


def _log_neighbours(x: Float[Array, "n d"], temperature: float) -> Float32[Array, "n n"]:
  unit = _unit(x)
  similarity = jnp.matmul(unit, unit.T, precision=jax.lax.Precision.HIGHEST) / temperature
  # Not -inf: 0 times the difference of two of these has to be 0.
  return jax.nn.log_softmax(jnp.where(jnp.eye(len(x), dtype=bool), -1e9, similarity))


def _unit(x: Float[Array, "n d"]) -> Float32[Array, "n d"]:
  x = x.astype(jnp.float32)
  # The gradient of a vector of zeros is finite.
  return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-24))


DISTANCES = {"kl": kl, "logsoftmax_euclidean": logsoftmax_euclidean}


def check_mixup(p: int | float) -> None:
  """Raises a UserError if `p` is no parameter of mixup: negative, or not finite."""
  if not 0 <= p < math.inf:
    raise UserError(f"mixup_p={p}; expected a finite number >= 0; 0 switches it off.")


def mixup(
  key: Key[Array, ""] | UInt32[Array, "2"], *arrays: Float[Array, "n ..."], p: int | float
) -> tuple[Float32[Array, "n ..."], ...]:
  """Mixes each example with its predecessor in the batch: `a * x + (1 - a) * roll(x, 1)`.

  `a ~ Beta(p, p)`, folded to [0.5, 1], is one number for the whole global batch (the reference
  under pmap: one a device), so images, teacher images and labels given together are mixed alike.
  `p=0` returns the arrays unmixed, the limit p -> 0. Source: big_vision utils.py `mixup`.

  Raises:
    UserError: `p` is negative.
  """
  check_mixup(p)
  arrays = tuple(x.astype(jnp.float32) for x in arrays)
  if p == 0:
    return arrays
  a = jax.random.beta(key, p, p, dtype=jnp.float32)
  # Folded, so that the example itself is the larger part and the label's argmax stays its own.
  a = jnp.maximum(a, 1.0 - a)
  return tuple(a * x + (1.0 - a) * jnp.roll(x, 1, axis=0) for x in arrays)
