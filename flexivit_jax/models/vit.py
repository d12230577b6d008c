"""The Vision Transformer's parts, named as in big_vision so that its published weights load unchanged.

Parameters are float32. Matrix products run in `dtype`; the residual stream, LayerNorm and softmax in float32.
Source of the variants: Scaling Vision Transformers (arXiv 2106.04560), table 2; So400m: arXiv 2305.13035.
"""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Array, Float

from flexivit_jax import errors
from flexivit_jax.devices import sharding
from flexivit_jax.models import attention


class Shape(NamedTuple):
  """Size of a transformer encoder."""

  width: int
  depth: int
  mlp_dim: int
  num_heads: int


VARIANTS = {
  "mu": Shape(32, 1, 128, 2),
  "Ti": Shape(192, 12, 768, 3),
  "S": Shape(384, 12, 1536, 6),
  "M": Shape(512, 12, 2048, 8),
  "B": Shape(768, 12, 3072, 12),
  "L": Shape(1024, 24, 4096, 16),
  "So400m": Shape(1152, 27, 4304, 16),
  "H": Shape(1280, 32, 5120, 16),
  "g": Shape(1408, 40, 6144, 16),
  "G": Shape(1664, 48, 8192, 16),
}


def decode_variant(variant: str) -> dict[str, Any]:
  """Returns width, depth, mlp_dim and num_heads of "B"; of "B/16" also patch_size=(16, 16)."""
  name, slash, patch = variant.partition("/")
  if name not in VARIANTS:
    raise errors.unknown("variant", variant, VARIANTS)
  if slash and not (patch.isdigit() and int(patch)):
    raise errors.UserError(
      f"Variant {variant!r}: after the slash comes the patch size in pixels, as in 'B/16'."
    )
  return VARIANTS[name]._asdict() | ({"patch_size": (int(patch), int(patch))} if patch else {})


GELU = {
  "tanh": nn.gelu,
  "exact": lambda x: nn.gelu(x, approximate=False),
  "quick": lambda x: x * nn.sigmoid(1.702 * x),  # CLIP's
}


class MlpBlock(nn.Module):
  """Two dense layers with a GELU between."""

  mlp_dim: int
  dropout: float = 0.0
  gelu: str = "tanh"
  dtype: str = "float32"

  @nn.compact
  def __call__(self, x: Float[Array, "n l d"], train: bool = False) -> Float[Array, "n l d"]:
    init = dict(
      kernel_init=nn.initializers.xavier_uniform(),
      bias_init=nn.initializers.normal(1e-6),
      dtype=self.dtype,
    )
    width = x.shape[-1]
    x = nn.Dense(self.mlp_dim, **init)(x)
    x = GELU[self.gelu](x)
    x = nn.Dropout(self.dropout)(x, deterministic=not train)
    return nn.Dense(width, **init)(x)


class Attention(nn.Module):
  """Multi-head dot-product attention of queries `q` over `kv`; `form` is a key of `attention.FORMS`, or "auto"."""

  num_heads: int
  dtype: str = "float32"
  form: str = "auto"

  @nn.compact
  def __call__(self, q: Float[Array, "n q d"], kv: Float[Array, "n k d"]) -> Float[Array, "n q d"]:
    width = q.shape[-1]
    init = dict(kernel_init=nn.initializers.xavier_uniform(), dtype=self.dtype)
    heads = (self.num_heads, width // self.num_heads)
    query = nn.DenseGeneral(heads, name="query", **init)(q)
    key = nn.DenseGeneral(heads, name="key", **init)(kv)
    value = nn.DenseGeneral(heads, name="value", **init)(kv)
    form = self.form
    if form == "auto":
      form = attention.choose(jax.default_backend(), q.shape[1], kv.shape[1], self.dtype)
    x = attention.FORMS[form](query, key, value)
    return nn.DenseGeneral(width, axis=(-2, -1), name="out", **init)(x)


class EncoderBlock(nn.Module):
  """Pre-norm transformer block: self-attention, then MLP. Returns the tokens and the named intermediates."""

  mlp_dim: int
  num_heads: int
  dropout: float = 0.0
  gelu: str = "tanh"
  dtype: str = "float32"
  layer_norm_eps: float = 1e-6
  attention: str = "auto"

  @nn.compact
  def __call__(
    self, x: Float[Array, "n l d"], train: bool = False
  ) -> tuple[Float[Array, "n l d"], dict]:
    out = {}
    y = nn.LayerNorm(self.layer_norm_eps, name="LayerNorm_0")(x)
    y = out["sa"] = Attention(
      self.num_heads, self.dtype, self.attention, name="MultiHeadDotProductAttention_0"
    )(y, y)
    x = out["+sa"] = x + nn.Dropout(self.dropout)(y, deterministic=not train)
    y = nn.LayerNorm(self.layer_norm_eps, name="LayerNorm_1")(x)
    y = out["mlp"] = MlpBlock(self.mlp_dim, self.dropout, self.gelu, self.dtype, name="MlpBlock_0")(
      y, train
    )
    x = out["+mlp"] = x + nn.Dropout(self.dropout)(y, deterministic=not train)
    return x, out


class Encoder(nn.Module):
  """Stack of blocks and a LayerNorm.

  With `scan` the blocks are one compiled loop and their parameters are stacked under "encoderblock" (see
  `stack_blocks`); `remat` recomputes each block in the backward pass instead of storing its activations. `fsdp` is a
  mesh along whose axis of this name the parameters are divided (see `sharding`); each block gathers its own.
  """

  depth: int
  mlp_dim: int
  num_heads: int
  dropout: float = 0.0
  gelu: str = "tanh"
  dtype: str = "float32"
  scan: bool = False
  remat: bool = False
  layer_norm_eps: float = 1e-6
  attention: str = "auto"
  fsdp: Mesh | AbstractMesh | None = None

  @nn.compact
  def __call__(
    self, x: Float[Array, "n l d"], train: bool = False, depth: int | None = None
  ) -> tuple[Float[Array, "n l d"], dict]:
    out: dict[str, Any] = {}
    depth = self.depth if depth is None else depth  # of the blocks, the first so many run
    fields = (
      self.mlp_dim, self.num_heads, self.dropout, self.gelu, self.dtype, self.layer_norm_eps, self.attention
    )  # fmt: skip
    block = (
      nn.remat(EncoderBlock, static_argnums=(2,), prevent_cse=not self.scan)
      if self.remat
      else EncoderBlock
    )
    if self.is_initializing():
      self._init_blocks(block, fields, x)
    params = self.variables["params"]
    once = traced_once(block, fields, train, None if self.is_initializing() else self.fsdp)
    keys = None
    if train and self.dropout:
      keys = jax.random.split(self.make_rng("dropout"), depth)
    if self.scan:
      first = jax.tree.map(lambda a: a[:depth], params["encoderblock"])
      x, stacked = jax.lax.scan(lambda x, xs: once(xs[0], x, xs[1]), x, (first, keys))
      each = {k: jnp.unstack(a) for k, a in stacked.items()}
      out |= {f"block{i:02d}": {k: a[i] for k, a in each.items()} for i in range(depth)}
    else:
      for i in range(depth):
        key = None if keys is None else keys[i]
        x, out[f"block{i:02d}"] = once(params[f"encoderblock_{i}"], x, key)
    out["pre_ln"] = x
    return nn.LayerNorm(self.layer_norm_eps, name="encoder_norm")(x), out

  def _init_blocks(self, block: Any, fields: tuple, x: jax.Array) -> None:
    """Makes the parameters of all blocks; they do not depend on the tokens."""
    if not self.scan:
      for i in range(self.depth):
        block(*fields, name=f"encoderblock_{i}")(x, False)
      return
    rngs = {"params": True}
    loop = nn.scan(
      block,
      variable_axes={"params": 0},
      split_rngs=rngs,
      in_axes=nn.broadcast,
      length=self.depth,
    )
    loop(*fields, name="encoderblock")(x, False)


@functools.cache
def traced_once(
  block: Any, fields: tuple, train: bool, fsdp: Mesh | AbstractMesh | None = None
) -> Any:
  """One function `(params, x, dropout key) -> (x, intermediates)` for all blocks of these fields.

  Traced and differentiated once for each shape, not once a block.
  """

  def run(params: Any, x: jax.Array, key: jax.Array | None) -> Any:
    rngs = None if key is None else {"dropout": key}
    return block(*fields).apply({"params": params}, x, train, rngs=rngs)

  if fsdp is None:
    return jax.jit(run)
  over = sharding.over_divided(lambda params, x: run(params, x, None), fsdp)
  return jax.jit(lambda params, x, key: over(params, x))


class MAPHead(nn.Module):
  """Multi-head attention pooling: one learned probe attends to all tokens (arXiv 2106.04560)."""

  mlp_dim: int
  num_heads: int
  gelu: str = "tanh"
  dtype: str = "float32"
  layer_norm_eps: float = 1e-6
  attention: str = "auto"

  @nn.compact
  def __call__(self, x: Float[Array, "n l d"]) -> Float[Array, "n d"]:
    n, _, d = x.shape
    probe = self.param("probe", nn.initializers.xavier_uniform(), (1, 1, d))
    x = Attention(
      self.num_heads, self.dtype, self.attention, name="MultiHeadDotProductAttention_0"
    )(jnp.tile(probe, (n, 1, 1)), x).astype(jnp.float32)
    y = nn.LayerNorm(self.layer_norm_eps, name="LayerNorm_0")(x)
    x = x + MlpBlock(self.mlp_dim, gelu=self.gelu, dtype=self.dtype, name="MlpBlock_0")(y)
    return x[:, 0]


def sincos2d(
  hw: tuple[int, int], width: int, temperature: float = 10_000.0
) -> Float[np.ndarray, "h w d"]:
  """Fixed 2-D sine-cosine position embedding (MoCo v3, arXiv 2104.02057); width must be a multiple of 4, from 8."""
  if width % 4 or width < 8:
    raise errors.UserError(
      f"posemb='sincos2d' needs a width that is a multiple of 4 and at least 8, got {width}."
    )
  frequency = temperature ** -(np.arange(width // 4) / (width // 4 - 1))
  y, x = np.mgrid[: hw[0], : hw[1]][..., None] * frequency
  return np.concatenate([np.sin(x), np.cos(x), np.sin(y), np.cos(y)], axis=-1).astype(np.float32)


def stack_blocks(params: dict) -> dict:
  """Parameters with `Transformer/encoderblock_0..L-1` stacked into `Transformer/encoderblock`, as `scan` wants them."""
  encoder = dict(params["Transformer"])
  names = sorted(
    (k for k in encoder if k.startswith("encoderblock_")), key=lambda k: int(k.rpartition("_")[2])
  )
  if not names:
    return params
  blocks = [encoder.pop(k) for k in names]
  stacked = jax.tree.map(
    lambda *leaves: (np if isinstance(leaves[0], np.ndarray) else jnp).stack(leaves), *blocks
  )
  return {**params, "Transformer": {**encoder, "encoderblock": stacked}}


def unstack_blocks(params: dict) -> dict:
  """The inverse of `stack_blocks`."""
  encoder = dict(params["Transformer"])
  if "encoderblock" not in encoder:
    return params
  stacked = encoder.pop("encoderblock")
  depth = len(jax.tree.leaves(stacked)[0])
  blocks = {f"encoderblock_{i}": jax.tree.map(lambda a, i=i: a[i], stacked) for i in range(depth)}
  return {**params, "Transformer": {**encoder, **blocks}}
