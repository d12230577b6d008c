"""Layers of timm's Vision Transformer as ours, and back.

Only the layout differs: timm's kernels are [out, in], it keeps queries, keys and values in one array, and a head's
features have no axis of their own. Both directions are exact; LayerScale is folded on the way in, exactly up to
rounding: `gamma * (W x + b) = (gamma W) x + gamma b`.
"""

from collections.abc import Mapping

import numpy as np

Arrays = Mapping[str, np.ndarray]
Flat = dict[str, np.ndarray]

_ATTENTION, _MLP = "MultiHeadDotProductAttention_0", "MlpBlock_0"
_BLOCK = {"attn.qkv": ("query", "key", "value")}
_POOL = {"q": ("query",), "kv": ("key", "value")}


def block_from_timm(a: Arrays, heads: int) -> Flat:
  """The arrays of a block, in our names; `a` are those of `blocks.0.`, without this prefix."""
  return (
    norm_from_timm(a, "norm1", "LayerNorm_0")
    | norm_from_timm(a, "norm2", "LayerNorm_1")
    | _attention_from_timm(a, _BLOCK, "attn.proj", heads, a.get("ls1.gamma"))
    | _mlp_from_timm(a, a.get("ls2.gamma"))
  )


def block_to_timm(flat: Arrays) -> Flat:
  """The inverse of `block_from_timm`, without LayerScale."""
  return (
    norm_to_timm(flat, "LayerNorm_0", "norm1")
    | norm_to_timm(flat, "LayerNorm_1", "norm2")
    | _attention_to_timm(flat, _BLOCK, "attn.proj")
    | _mlp_to_timm(flat)
  )


def pool_from_timm(a: Arrays, heads: int) -> Flat:
  """The arrays of our attention pooling; `a` are those of `attn_pool.`, without this prefix."""
  return (
    {"probe": a["latent"]}
    | norm_from_timm(a, "norm", "LayerNorm_0")
    | _attention_from_timm(a, _POOL, "proj", heads)
    | _mlp_from_timm(a)
  )


def pool_to_timm(flat: Arrays) -> Flat:
  """The inverse of `pool_from_timm`."""
  return (
    {"latent": flat["probe"]}
    | norm_to_timm(flat, "LayerNorm_0", "norm")
    | _attention_to_timm(flat, _POOL, "proj")
    | _mlp_to_timm(flat)
  )


def norm_from_timm(a: Arrays, name: str, to: str) -> Flat:
  """A LayerNorm called `name` in timm as one called `to` here."""
  return {f"{to}/scale": a[f"{name}.weight"], f"{to}/bias": a[f"{name}.bias"]}


def norm_to_timm(flat: Arrays, name: str, to: str) -> Flat:
  """The inverse of `norm_from_timm`."""
  return {f"{to}.weight": flat[f"{name}/scale"], f"{to}.bias": flat[f"{name}/bias"]}


def dense_from_timm(a: Arrays, name: str, to: str, gamma: np.ndarray | None = None) -> Flat:
  """A linear layer, its output times gamma [out]."""
  kernel, bias = a[f"{name}.weight"].T, a[f"{name}.bias"]
  if gamma is not None:
    kernel, bias = kernel * gamma[None], bias * gamma
  return {f"{to}/kernel": np.ascontiguousarray(kernel), f"{to}/bias": bias}


def dense_to_timm(flat: Arrays, name: str, to: str) -> Flat:
  """The inverse of `dense_from_timm`, without gamma."""
  return {f"{to}.weight": flat[f"{name}/kernel"].T, f"{to}.bias": flat[f"{name}/bias"]}


def _mlp_from_timm(a: Arrays, gamma: np.ndarray | None = None) -> Flat:
  first = dense_from_timm(a, "mlp.fc1", f"{_MLP}/Dense_0")
  return first | dense_from_timm(a, "mlp.fc2", f"{_MLP}/Dense_1", gamma)


def _mlp_to_timm(flat: Arrays) -> Flat:
  first = dense_to_timm(flat, f"{_MLP}/Dense_0", "mlp.fc1")
  return first | dense_to_timm(flat, f"{_MLP}/Dense_1", "mlp.fc2")


def _attention_from_timm(
  a: Arrays,
  fused: Mapping[str, tuple[str, ...]],
  proj: str,
  heads: int,
  gamma: np.ndarray | None = None,
) -> Flat:
  """`fused` says which of query, key and value timm's layers hold, one above the other."""
  width, out = a[f"{proj}.weight"].shape[0], f"{_ATTENTION}/out"
  flat = dense_from_timm(a, proj, out, gamma)
  flat[f"{out}/kernel"] = flat[f"{out}/kernel"].reshape(heads, -1, width)
  for layer, names in fused.items():
    weights = np.split(a[f"{layer}.weight"], len(names))
    biases = np.split(a[f"{layer}.bias"], len(names))
    for name, weight, bias in zip(names, weights, biases, strict=True):
      flat[f"{_ATTENTION}/{name}/kernel"] = weight.T.reshape(width, heads, -1)
      flat[f"{_ATTENTION}/{name}/bias"] = bias.reshape(heads, -1)
  return flat


def _attention_to_timm(flat: Arrays, fused: Mapping[str, tuple[str, ...]], proj: str) -> Flat:
  width = flat[f"{_ATTENTION}/out/kernel"].shape[-1]
  arrays = {
    f"{proj}.weight": flat[f"{_ATTENTION}/out/kernel"].reshape(-1, width).T,
    f"{proj}.bias": flat[f"{_ATTENTION}/out/bias"],
  }
  for layer, names in fused.items():
    kernels = [flat[f"{_ATTENTION}/{name}/kernel"].reshape(width, -1).T for name in names]
    biases = [flat[f"{_ATTENTION}/{name}/bias"].reshape(-1) for name in names]
    arrays |= {f"{layer}.weight": np.concatenate(kernels), f"{layer}.bias": np.concatenate(biases)}
  return arrays
