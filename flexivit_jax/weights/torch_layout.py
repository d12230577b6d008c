"""Layers as PyTorch lays them out, turned into ours and back: those of timm, transformers and what comes as theirs.

Only the layout differs. PyTorch's kernels are [out, in], ours [in, out]; its attention keeps the features of all heads
on one axis and may stack queries, keys and values in one array. Both directions are exact. LayerScale is folded on the
way in, exactly up to rounding: `gamma * (W x + b) = (gamma W) x + gamma b`.

A project's own names are given as a mapping from our word for a part to its name. The words: `norm1`, `norm2`, `norm`,
`probe`, `out`, `fc1`, `fc2`, `scale1`, `scale2` (LayerScale, optional), and for the projections before attention
either `query`, `key` and `value`, or what is stacked in one array: `qkv` or `kv`.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from flexivit_jax import errors
from flexivit_jax.trees import Arrays

Names = Mapping[str, str]

_ATTENTION, _MLP = "MultiHeadDotProductAttention_0", "MlpBlock_0"
# Which of our projections an array of theirs holds, one above the other.
_STACKED = {
  "query": ("query",),
  "key": ("key",),
  "value": ("value",),
  "kv": ("key", "value"),
  "qkv": ("query", "key", "value"),
}


def under(prefix: str, arrays: Arrays) -> Arrays:
  """Returns the arrays whose names start with `prefix`, without it."""
  return {n.removeprefix(prefix): array for n, array in arrays.items() if n.startswith(prefix)}


def block_from_torch(arrays: Arrays, names: Names, heads: int) -> Arrays:
  """Returns a block's parameters in our names, relative to `Transformer/encoderblock_N/`.

  Args:
    arrays: of the block alone, without the prefix that all its names share.
    names: the project's name of each part. LayerScale is folded where `scale1` and `scale2` are in `arrays`.
    heads: of the attention; their features get an axis of their own.
  """
  scale1, scale2 = (arrays.get(names.get(part, "")) for part in ("scale1", "scale2"))
  return (
    norm_from_torch(arrays, names["norm1"], "LayerNorm_0")
    | norm_from_torch(arrays, names["norm2"], "LayerNorm_1")
    | _attention_from_torch(arrays, names, heads, scale1)
    | _mlp_from_torch(arrays, names, scale2)
  )


def block_to_torch(flat: Arrays, names: Names) -> Arrays:
  """The inverse of `block_from_torch`; LayerScale stays folded."""
  return (
    norm_to_torch(flat, "LayerNorm_0", names["norm1"])
    | norm_to_torch(flat, "LayerNorm_1", names["norm2"])
    | _attention_to_torch(flat, names)
    | _mlp_to_torch(flat, names)
  )


def pool_from_torch(arrays: Arrays, names: Names, heads: int) -> Arrays:
  """Returns the parameters of attention pooling in our names, relative to `MAPHead_0/`; arguments as for a block."""
  return (
    {"probe": arrays[names["probe"]]}
    | norm_from_torch(arrays, names["norm"], "LayerNorm_0")
    | _attention_from_torch(arrays, names, heads)
    | _mlp_from_torch(arrays, names)
  )


def pool_to_torch(flat: Arrays, names: Names) -> Arrays:
  """The inverse of `pool_from_torch`."""
  return (
    {names["probe"]: flat["probe"]}
    | norm_to_torch(flat, "LayerNorm_0", names["norm"])
    | _attention_to_torch(flat, names)
    | _mlp_to_torch(flat, names)
  )


def norm_from_torch(arrays: Arrays, name: str, to: str) -> Arrays:
  """Returns their LayerNorm `name` as ours, called `to`."""
  return {f"{to}/scale": arrays[f"{name}.weight"], f"{to}/bias": arrays[f"{name}.bias"]}


def norm_to_torch(flat: Arrays, name: str, to: str) -> Arrays:
  """The inverse of `norm_from_torch`."""
  return {f"{to}.weight": flat[f"{name}/scale"], f"{to}.bias": flat[f"{name}/bias"]}


def dense_from_torch(arrays: Arrays, name: str, to: str, gamma: np.ndarray | None = None) -> Arrays:
  """Returns their linear layer `name` as ours, called `to`, its output times gamma [out]."""
  kernel, bias = arrays[f"{name}.weight"].T, arrays[f"{name}.bias"]
  if gamma is not None:
    kernel, bias = kernel * gamma[None], bias * gamma
  return {f"{to}/kernel": np.ascontiguousarray(kernel), f"{to}/bias": bias}


def dense_to_torch(flat: Arrays, name: str, to: str) -> Arrays:
  """The inverse of `dense_from_torch`, without gamma."""
  return {f"{to}.weight": flat[f"{name}/kernel"].T, f"{to}.bias": flat[f"{name}/bias"]}


def bias_of(arrays: Arrays, name: str) -> np.ndarray:
  """Returns the bias [out] of a layer: zeros where it has none."""
  bias = arrays.get(f"{name}.bias")
  return np.zeros(len(arrays[f"{name}.weight"]), np.float32) if bias is None else bias


def patches_from_torch(kernel: np.ndarray) -> np.ndarray:
  """Returns the kernel [d, c, h, w] of a patch embedding as ours [h, w, c, d]."""
  return np.ascontiguousarray(kernel.transpose(2, 3, 1, 0))


def patches_to_torch(kernel: np.ndarray) -> np.ndarray:
  """The inverse of `patches_from_torch`."""
  return kernel.transpose(3, 2, 0, 1)


def fold_input(flat: Arrays, mean: Sequence[float], std: Sequence[float]) -> Arrays:
  """Lets a model that was trained on `(pixel - mean) / std`, pixels in [0, 1], take pixels in [-1, 1].

  Exact at the kernel's own size and above; where the kernel shrinks, a constant image keeps its token only nearly.

  Args:
    flat: parameters by big_vision's names.
    mean, std: one number for each channel.

  Raises:
    UserError: not one number for each channel, or a standard deviation that is not positive.
  """
  kernel = flat["embedding/kernel"].astype(np.float64)
  channels = kernel.shape[2]
  if len(mean) != channels or len(std) != channels or min(std) <= 0:
    raise errors.UserError(
      f"mean={tuple(mean)}, std={tuple(std)}: expected {channels} numbers each, std positive."
    )
  scale, shift = 0.5 / np.asarray(std), (0.5 - np.asarray(mean)) / np.asarray(std)
  bias = flat["embedding/bias"] + np.einsum("hwcd,c->d", kernel, shift)
  kernel = kernel * scale[None, None, :, None]
  return flat | {
    "embedding/kernel": kernel.astype(np.float32),
    "embedding/bias": bias.astype(np.float32),
  }


def _mlp_from_torch(arrays: Arrays, names: Names, gamma: np.ndarray | None = None) -> Arrays:
  first = dense_from_torch(arrays, names["fc1"], f"{_MLP}/Dense_0")
  return first | dense_from_torch(arrays, names["fc2"], f"{_MLP}/Dense_1", gamma)


def _mlp_to_torch(flat: Arrays, names: Names) -> Arrays:
  first = dense_to_torch(flat, f"{_MLP}/Dense_0", names["fc1"])
  return first | dense_to_torch(flat, f"{_MLP}/Dense_1", names["fc2"])


def _attention_from_torch(
  arrays: Arrays, names: Names, heads: int, gamma: np.ndarray | None = None
) -> Arrays:
  """Returns the four projections of attention; those before it may lack biases, which are zeros."""
  out = f"{_ATTENTION}/out"
  flat = dense_from_torch(arrays, names["out"], out, gamma)
  kernel = flat[f"{out}/kernel"]
  flat[f"{out}/kernel"] = kernel.reshape(heads, -1, kernel.shape[1])
  for word, parts in _STACKED.items():
    if word not in names:
      continue
    weights = np.split(arrays[f"{names[word]}.weight"], len(parts))
    biases = np.split(bias_of(arrays, names[word]), len(parts))
    for part, weight, bias in zip(parts, weights, biases, strict=True):
      kernel = np.ascontiguousarray(weight.T).reshape(weight.shape[1], heads, -1)
      flat[f"{_ATTENTION}/{part}/kernel"] = kernel
      flat[f"{_ATTENTION}/{part}/bias"] = bias.reshape(heads, -1)
  return flat


def _attention_to_torch(flat: Arrays, names: Names) -> Arrays:
  kernel = flat[f"{_ATTENTION}/out/kernel"]
  arrays = {
    f"{names['out']}.weight": kernel.reshape(-1, kernel.shape[-1]).T,
    f"{names['out']}.bias": flat[f"{_ATTENTION}/out/bias"],
  }
  for word, parts in _STACKED.items():
    if word not in names:
      continue
    kernels = [flat[f"{_ATTENTION}/{part}/kernel"] for part in parts]
    biases = [flat[f"{_ATTENTION}/{part}/bias"].reshape(-1) for part in parts]
    stacked = np.concatenate([kernel.reshape(len(kernel), -1).T for kernel in kernels])
    arrays |= {f"{names[word]}.weight": stacked, f"{names[word]}.bias": np.concatenate(biases)}
  return arrays
