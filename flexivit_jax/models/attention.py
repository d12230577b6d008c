"""Dot-product attention in several forms: the same numbers, each the fastest on some hardware and length.

All take queries, keys and values of shape [n, l, h, e] and return [n, l, h, e]. Products run in the arrays' dtype, sums
and softmax in float32. Which is fastest where: docs/performance.md.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from flexivit_jax.trees import Tree

Heads = Float[Array, "n q h e"]
Others = Float[Array, "n k h e"]
LONG = 256  # tokens from which scores of all heads at once leave a CPU's cache


def einsum(q: Heads, k: Others, v: Others) -> Heads:
  """As the formula has it; XLA's own choice on accelerators."""
  scores = jnp.einsum(
    "nqhe,nkhe->nhqk", q * q.shape[-1] ** -0.5, k, preferred_element_type=jnp.float32
  )
  return jnp.einsum("nhqk,nkhe->nqhe", jax.nn.softmax(scores).astype(v.dtype), v)


def heads_first(q: Heads, k: Others, v: Others) -> Heads:
  """Lays arrays out head by head, so that each product reads rows; normalises the output instead of the weights."""
  return _attend(*_by_head(q, k, v))[0].swapaxes(1, 2)


def one_by_one(q: Heads, k: Others, v: Others) -> Heads:
  """Loops over (image, head) and recomputes the scores in the backward pass, so memory holds one head's scores only."""
  return _looped(*_by_head(q, k, v)).swapaxes(1, 2)


def cudnn(q: Heads, k: Others, v: Others) -> Heads:
  """The fused kernel of cuDNN, for half precision on NVIDIA's GPUs."""
  lengths = [x.shape[1] for x in (q, k)]
  odd = [n % 2 for n in lengths]  # its backward pass takes even lengths only
  padded = [
    jnp.pad(x, ((0, 0), (0, o), (0, 0), (0, 0)))
    for x, o in zip((q, k, v), (odd[0], odd[1], odd[1]), strict=True)
  ]
  real = [jnp.full(len(q), n, jnp.int32) for n in lengths] if any(odd) else [None, None]
  output = jax.nn.dot_product_attention(
    *padded, query_seq_lengths=real[0], key_value_seq_lengths=real[1], implementation="cudnn"
  )
  return output[:, : lengths[0]]


FORMS: dict[str, Callable[..., Array]] = {
  "einsum": einsum,
  "heads_first": heads_first,
  "one_by_one": one_by_one,
  "cudnn": cudnn,
}


def choose(backend: str, queries: int, keys: int, dtype: Any) -> str:
  """Returns the form that measured fastest, a key of `FORMS`.

  Args:
    backend: "cpu", "gpu", ... (`jax.default_backend()`).
    queries, keys: numbers of tokens.
    dtype: of the products.
  """
  if backend == "cpu":
    return "one_by_one" if min(queries, keys) >= LONG else "heads_first"
  half = jnp.dtype(dtype).itemsize == 2
  if backend in ("gpu", "cuda") and half and min(queries, keys) >= 64:
    return "cudnn"
  return "einsum"


def _by_head(q: Heads, k: Others, v: Others) -> tuple[Array, Array, Array]:
  q, k, v = (x.swapaxes(1, 2) for x in (q * q.shape[-1] ** -0.5, k, v))
  return q, k, v


def _attend(q: Array, k: Array, v: Array) -> tuple[Array, Array]:
  """Of [..., l, e]: the output, and the logarithm of each query's sum of exponentials [..., l, 1]."""
  scores = jnp.matmul(q, k.swapaxes(-1, -2), preferred_element_type=jnp.float32)
  top = jax.lax.stop_gradient(scores.max(-1, keepdims=True))
  weights = jnp.exp(scores - top)
  total = weights.sum(-1, keepdims=True)
  out = jnp.matmul(weights.astype(v.dtype), v, preferred_element_type=jnp.float32) / total
  return out.astype(v.dtype), top + jnp.log(total)


@jax.custom_vjp
def _looped(q: Array, k: Array, v: Array) -> Array:
  return _forward(q, k, v)[0]


def _forward(q: Array, k: Array, v: Array) -> tuple[Array, tuple]:
  out, logs = _map_heads(_attend, q, k, v)
  return out, (q, k, v, out, logs)


def _backward(residuals: tuple, g: Array) -> tuple[Array, Array, Array]:
  return _map_heads(_gradients, *residuals, g)


_looped.defvjp(_forward, _backward)


def _gradients(
  q: Array, k: Array, v: Array, out: Array, logs: Array, g: Array
) -> tuple[Array, Array, Array]:
  """Of one head, from its output and sums; the weights are computed again (arXiv 2205.14135, appendix B.2)."""
  product = functools.partial(jnp.matmul, preferred_element_type=jnp.float32)
  weights = jnp.exp(product(q, k.T) - logs)
  mean = (g.astype(jnp.float32) * out).sum(-1, keepdims=True)
  d_scores = (weights * (product(g, v.T) - mean)).astype(q.dtype)
  grads = product(d_scores, k), product(d_scores.T, q), product(weights.T.astype(g.dtype), g)
  return tuple(d.astype(x.dtype) for d, x in zip(grads, (q, k, v), strict=True))  # type: ignore[return-value]


def _map_heads(fn: Callable[..., Tree], *arrays: Array) -> Tree:
  """Applies `fn` to each [l, e] of arrays [n, h, l, e], one after the other."""
  n, h = arrays[0].shape[:2]
  flat = tuple(x.reshape(n * h, *x.shape[2:]) for x in arrays)
  outputs = jax.lax.map(lambda xs: fn(*xs), flat)
  return jax.tree.map(lambda x: x.reshape(n, h, *x.shape[1:]), outputs)
