"""Dot-product attention in several forms: the same numbers, each the fastest on some hardware and length.

All take queries, keys and values of shape [n, l, h, e] and return [n, l, h, e]. Products run in the arrays' dtype, sums
and softmax in float32. Which is fastest where, and what of it is not measured: docs/performance.md.

`splash` and `cudnn` are kernels: there is no array of the size queries x keys, neither kept for the backward pass nor
while they run (arXiv 2205.14135).
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from flexivit_jax import errors
from flexivit_jax.devices import sharding
from flexivit_jax.trees import Tree

Heads = Float[Array, "n q h e"]
Others = Float[Array, "n k h e"]
LONG = 256  # tokens from which scores of all heads at once leave a CPU's cache
# Tokens from which "auto" takes the kernel on a TPU. Not measured: nobody has run this on one. Below, tokens padded to
# whole blocks cost up to 1.6 times the products (401 are 512), and the scores are small beside the other activations;
# at 577 and 901, the paper's two longest sequences, they are most of the memory. `flexivit bench --attention all`.
TPU_LONG = 512
TPU_BLOCK = (
  512  # most queries or keys in a block: a tile of their scores in float32 is 1 MiB of a core's 16
)
LANES = 128  # numbers in a TPU's vector register: blocks are multiples of it
CUDNN_LONG = 64  # tokens from which cuDNN's kernel was faster on an H200
CUDNN_HEAD = 128  # largest width of a head that cuDNN's kernel takes on every GPU that has it


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


def splash(q: Heads, k: Others, v: Others, *, interpret: bool = False) -> Heads:
  """The fused Pallas kernel for TPUs that JAX ships ("splash attention"), on tokens padded to whole blocks and masked.

  Its sums run in an order that is always the same, so gradients are equal to the bit from run to run.

  Args:
    q, k, v: as for all forms. Arrays that are divided over a mesh by examples stay so.
    interpret: runs the kernel step by step on any backend: for tests, very slow.
  """
  return sharding.by_example(functools.partial(_splash, interpret=interpret), q, k, v)


def cudnn(q: Heads, k: Others, v: Others) -> Heads:
  """The fused kernel of cuDNN, for half precision on NVIDIA's GPUs.

  Its backward pass adds in any order unless XLA is told otherwise, which `devices/compilation.py` does. Arrays that are
  divided over a mesh by examples stay so.
  """
  return sharding.by_example(_cudnn, q, k, v)


FORMS: dict[str, Callable[..., Array]] = {
  "einsum": einsum,
  "heads_first": heads_first,
  "one_by_one": one_by_one,
  "splash": splash,
  "cudnn": cudnn,
}
KERNELS = ("splash", "cudnn")  # each for one kind of device
RECOMPUTED = ("one_by_one", *KERNELS)  # these keep no scores for the backward pass
# What `here` returns. "tpu v3" is for v2 too: JAX has no test of this kernel on them, so "auto" does not take it there.
PLATFORMS = ("cpu", "gpu", "rocm", "tpu", "tpu v3")


# --- which form ---


def here() -> str:
  """Returns the platform of this process's devices, one of `PLATFORMS` or another backend's name."""
  device = jax.devices()[0]
  if device.platform == "tpu":
    return "tpu v3" if device.device_kind in ("TPU v2", "TPU v3") else "tpu"
  if device.platform == "gpu" and "rocm" in device.client.platform_version.lower():
    return "rocm"
  return device.platform


def resolve(setting: str, queries: int, keys: int, dtype: Any, head: int) -> str:
  """Returns the form that a model's field `attention` means, a key of `FORMS`.

  Args:
    setting: a form or "auto", and after a colon one of `PLATFORMS` for which the program is made ("auto:tpu"); without:
      for the devices that are here.
    queries, keys: numbers of tokens.
    dtype: of the products.
    head: width of a head.

  Raises:
    UserError: a form that cannot run there.
  """
  form, _, platform = setting.partition(":")
  platform = platform or here()
  if form == "auto":
    return choose(platform, queries, keys, dtype, head)
  reason = why_not(form, platform, dtype, head)
  if reason:
    raise errors.UserError(
      f"attention={form!r} cannot run here: {reason}. Give 'auto', or one of"
      f" {', '.join(f for f in FORMS if not why_not(f, platform, dtype, head))}."
    )
  return form


def check_here(setting: str, dtype: Any, head: int) -> None:
  """Raises a UserError for a setting with which nothing can run in this process; arguments as for `resolve`."""
  _, colon, platform = setting.partition(":")
  if colon and platform != here():
    raise errors.UserError(
      f"attention={setting!r} is for programs that are made for {platform!r} and not run, and the devices are of the"
      f" kind {here()!r}; give {setting.partition(':')[0]!r}."
    )
  resolve(setting, 1, 1, dtype, head)


def choose(platform: str, queries: int, keys: int, dtype: Any, head: int) -> str:
  """Returns the form that is best there, a key of `FORMS`: measured on CPUs and an H200, by reasons on TPUs.

  Args:
    platform: one of `PLATFORMS`, or another backend's name.
    queries, keys, dtype, head: as for `resolve`.
  """
  fewest = min(queries, keys)
  if platform == "cpu":
    return "one_by_one" if fewest >= LONG else "heads_first"
  if platform == "gpu" and fewest >= CUDNN_LONG and not why_not("cudnn", platform, dtype, head):
    return "cudnn"
  return "splash" if platform == "tpu" and fewest >= TPU_LONG else "einsum"


def why_not(form: str, platform: str, dtype: Any, head: int) -> str:
  """Returns why a form cannot run on a platform, or "" where it can; arguments as for `resolve`."""
  if form == "splash" and not platform.startswith("tpu"):
    return f"its kernel is for TPUs, and the devices are of the kind {platform!r}"
  if form != "cudnn":
    return ""
  if platform != "gpu":
    return f"its kernel is for NVIDIA's GPUs, and the devices are of the kind {platform!r}"
  if jnp.dtype(dtype).itemsize != 2:
    return f"its kernel takes bfloat16 or float16, and dtype={jnp.dtype(dtype).name!r}"
  if head % 8 or head > CUDNN_HEAD:
    return (
      f"its kernel takes heads of a multiple of 8 up to {CUDNN_HEAD} numbers, and a head has {head}"
    )
  return ""


def keeps_scores(setting: str, tokens: int, dtype: Any, head: int) -> bool:
  """Whether the backward pass of self-attention reads stored scores; arguments as for `resolve`."""
  return resolve(setting, tokens, tokens, dtype, head) not in RECOMPUTED


def kernel_length(setting: str, tokens: int, dtype: Any, head: int) -> int | None:
  """Tokens as the kernel of self-attention pads them; None where the form is no kernel; arguments as for `resolve`."""
  form = resolve(setting, tokens, tokens, dtype, head)
  if form == "splash":
    return padded(tokens)[0]
  return tokens + tokens % 2 if form == "cudnn" else None


def products(setting: str, tokens: int, dtype: Any, head: int) -> tuple[int, int]:
  """Length and number of the products of length squared times width that a form computes for self-attention.

  Two forwards and four backwards are the formula's. The other forms compute the scores again. The kernel for TPUs has
  two programs backwards, one for queries and one for keys and values: each computes the scores and their gradients.

  Args:
    setting, tokens, dtype, head: as for `resolve`.

  Returns:
    Tokens with padding; products forwards and backwards.
  """
  form = resolve(setting, tokens, tokens, dtype, head)
  length = kernel_length(setting, tokens, dtype, head) or tokens
  return length, {"splash": 2 + 7, "cudnn": 2 + 5, "one_by_one": 2 + 5}.get(form, 2 + 4)


# --- kernels ---


def _splash(q: Array, k: Array, v: Array, *, interpret: bool) -> Array:
  # Imported at use, for the start of commands on other platforms.
  from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as kernels,
    splash_attention_mask as masks,
  )

  (queries, of_q), (keys, of_k) = (padded(x.shape[1]) for x in (q, k))

  def lay_out(x: Array, length: int) -> Array:
    return jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, 0), (0, length - x.shape[1]), (0, 0)))

  # Queries attend to the keys of their own segment: all of them to the real ones. Outputs of padding are cut off below.
  segments = None
  if keys > k.shape[1]:
    real = (jnp.arange(keys) < k.shape[1]).astype(jnp.int32)
    segments = kernels.SegmentIds(jnp.ones(queries, jnp.int32), real)
  sizes = kernels.BlockSizes(
    block_q=of_q,
    block_kv=of_k,
    block_q_dkv=of_q,
    block_kv_dkv=of_k,
    block_q_dq=of_q,
    block_kv_dq=of_k,
  )
  every = masks.MultiHeadMask([masks.FullMask((queries, keys))] * q.shape[2])
  kernel = kernels.make_splash_mha_single_device(every, block_sizes=sizes, interpret=interpret)
  arrays = lay_out(q * q.shape[-1] ** -0.5, queries), lay_out(k, keys), lay_out(v, keys)
  out = jax.vmap(functools.partial(kernel, segment_ids=segments))(*arrays)
  return out[:, :, : q.shape[1]].swapaxes(1, 2)


def _cudnn(q: Array, k: Array, v: Array) -> Array:
  lengths = [x.shape[1] for x in (q, k)]
  odd = [n % 2 for n in lengths]  # see `kernel_length`: its backward pass takes even lengths only
  padded = [
    jnp.pad(x, ((0, 0), (0, o), (0, 0), (0, 0)))
    for x, o in zip((q, k, v), (odd[0], odd[1], odd[1]), strict=True)
  ]
  real: list[Array | None] = [None, None]
  if any(odd):
    # Made from q, so that under `jax.vmap` they have the axis that it has: JAX's rule for this kernel asks for that.
    zeros = 0 * jax.lax.bitcast_convert_type(q[:, 0, 0, 0], jnp.int16).astype(jnp.int32)
    real = [zeros + n for n in lengths]
  output = jax.nn.dot_product_attention(
    *padded, query_seq_lengths=real[0], key_value_seq_lengths=real[1], implementation="cudnn"
  )
  return output[:, : lengths[0]]


def padded(tokens: int) -> tuple[int, int]:
  """Returns the length to which the kernel for TPUs pads, and its blocks, which are equal: as few as there can be."""
  blocks = -(-tokens // TPU_BLOCK)
  block = -(-tokens // (blocks * LANES)) * LANES
  return blocks * block, block


# --- forms for CPUs ---


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
