"""The Vision Transformer's parts, named as in big_vision so that its published weights load unchanged.

Parameters are float32. Matrix products run in `dtype`; the residual stream, LayerNorm and softmax in float32.
Source of the variants: Scaling Vision Transformers (arXiv 2106.04560), table 2; So400m: arXiv 2305.13035.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Array, Float, Key

from flexivit_jax import errors
from flexivit_jax.devices import sharding
from flexivit_jax.models import attention
from flexivit_jax.trees import Json, Params, Tree

Intermediates = dict[
  str, jax.Array
]  # of a block: "sa" and "mlp" before, "+sa" and "+mlp" after the residual; [n, l, d]


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


def decode_variant(variant: str) -> Json:
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


def _with_weights(prim: jax.extend.core.Primitive, *avals: Any, **params: Any) -> bool:
  """Whether an operation multiplies tokens [n, l, ...] and a weight; attention's have batches, or are of [l, e]."""
  if prim.name != "dot_general":
    return False
  _, batch = params["dimension_numbers"]
  return batch == ((), ()) and avals[0].ndim > 2


# What a block keeps for the backward pass where it is recomputed, as arguments of `jax.checkpoint`: nothing but its
# input; or also the products with its weights, so that attention and what goes element by element are computed again.
REMAT: dict[str, Json] = {"blocks": {}, "dots": {"policy": _with_weights}}


def which_remat(remat: bool | str) -> str:
  """The key of `REMAT` that a model's field `remat` means; "" where nothing is recomputed."""
  if isinstance(remat, bool):
    return "blocks" if remat else ""
  return remat


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
  """Multi-head dot-product attention of queries `q` over `kv`; `form`: see `attention.resolve`."""

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
    form = "einsum"  # while it initialises: no parameter depends on the form
    if not self.is_initializing():
      form = attention.resolve(self.form, q.shape[1], kv.shape[1], self.dtype, heads[1])
    x = attention.FORMS[form](query, key, value)
    return nn.DenseGeneral(width, axis=(-2, -1), name="out", **init)(x)


@dataclasses.dataclass(frozen=True)
class BlockConfig:
  """What all blocks of an encoder have in common. Hashable, so that equal blocks share one trace.

  Attributes:
    mlp_dim: width of the MLP's hidden layer.
    num_heads: of the attention; divides the width.
    dropout: probability; after attention, after the GELU and after the MLP.
    gelu: a key of `GELU`.
    dtype: of the matrix products, "float32" or "bfloat16".
    layer_norm_eps: of both LayerNorms.
    attention: a key of `attention.FORMS`, or "auto"; see `attention.resolve`.
  """

  mlp_dim: int
  num_heads: int
  dropout: float = 0.0
  gelu: str = "tanh"
  dtype: str = "float32"
  layer_norm_eps: float = 1e-6
  attention: str = "auto"


class EncoderBlock(nn.Module):
  """Pre-norm transformer block: self-attention, then MLP. Returns the tokens and the named intermediates.

  `drop` is the probability with which an example skips the attention, and independently the MLP (stochastic depth);
  it takes a "dropout" rng.
  """

  config: BlockConfig

  @nn.compact
  def __call__(
    self, x: Float[Array, "n l d"], train: bool = False, drop: Float[Array, ""] | None = None
  ) -> tuple[Float[Array, "n l d"], Intermediates]:
    c, out = self.config, {}
    y = nn.LayerNorm(c.layer_norm_eps, name="LayerNorm_0")(x)
    y = out["sa"] = Attention(
      c.num_heads, c.dtype, c.attention, name="MultiHeadDotProductAttention_0"
    )(y, y)
    x = out["+sa"] = x + self._branch(nn.Dropout(c.dropout)(y, deterministic=not train), drop)
    y = nn.LayerNorm(c.layer_norm_eps, name="LayerNorm_1")(x)
    y = out["mlp"] = MlpBlock(c.mlp_dim, c.dropout, c.gelu, c.dtype, name="MlpBlock_0")(y, train)
    x = out["+mlp"] = x + self._branch(nn.Dropout(c.dropout)(y, deterministic=not train), drop)
    return x, out

  def _branch(
    self, y: Float[Array, "n l d"], drop: Float[Array, ""] | None
  ) -> Float[Array, "n l d"]:
    """A residual branch: 0 for the examples that skip it, divided by the probability to keep it for the others."""
    if drop is None:
      return y
    kept = jax.random.bernoulli(self.make_rng("dropout"), 1.0 - drop, (len(y), 1, 1))
    return jnp.where(kept, y / (1.0 - drop), 0.0)


class Encoder(nn.Module):
  """Stack of blocks and a LayerNorm.

  Attributes:
    depth: number of blocks.
    config: of each block.
    scan: the blocks are one compiled loop. True: their parameters are stacked under "encoderblock" (see
      `stack_blocks`). "by_block": they are stored as without a loop, and stacked while a step runs, which takes memory
      for a copy of them and of their gradients.
    remat: the backward pass recomputes each block instead of storing its activations; a key of `REMAT`, or True for
      "blocks".
    fsdp: the mesh along whose axis "fsdp" the parameters are divided (see `sharding`); each block gathers its own.
      None: every device has all of them.
    gather_dtype: in which a block gathers its divided parameters; "bfloat16" sends half as much.
    stochastic_depth: probability with which an example skips a branch of the last block in training; from the first
      block, which none skips, it grows linearly (arXiv 1603.09382, as in DeiT). A block alone is the first.
  """

  depth: int
  config: BlockConfig
  scan: bool | str = False
  remat: bool | str = False
  fsdp: Mesh | AbstractMesh | None = None
  gather_dtype: str = "float32"
  stochastic_depth: float = 0.0

  @nn.compact
  def __call__(
    self, x: Float[Array, "n l d"], train: bool = False, depth: int | None = None
  ) -> tuple[Float[Array, "n l d"], Json]:
    """Returns the normalised tokens, and {"block00": intermediates, ..., "pre_ln": tokens before the last LayerNorm}.

    Args:
      x: tokens.
      train: applies dropout and stochastic depth, which take a "dropout" rng.
      depth: number of blocks that run, from the first; default: all.
    """
    depth = self.depth if depth is None else depth
    # While it initialises, Flax makes the parameters; nothing is divided over a mesh yet.
    initializing = self.is_initializing()
    if initializing:
      self._init_blocks(x)
    keys = drops = None
    if train and self.stochastic_depth:
      drops = np.linspace(0, self.stochastic_depth, self.depth, dtype=np.float32)[:depth]
    if train and (self.config.dropout or self.stochastic_depth):
      keys = jax.random.split(self.make_rng("dropout"), depth)
    x, out = apply_blocks(
      self.variables["params"],
      x,
      keys,
      drops,
      depth=depth,
      config=self.config,
      train=train,
      scan=self.scan,
      remat=self.remat,
      fsdp=None if initializing else self.fsdp,
      gather_dtype=self.gather_dtype,
    )
    out["pre_ln"] = x
    return nn.LayerNorm(self.config.layer_norm_eps, name="encoder_norm")(x), out

  def _init_blocks(self, x: jax.Array) -> None:
    """Makes the parameters of all blocks; they do not depend on the tokens."""
    block = _block_class(self.remat, bool(self.scan))
    if self.scan is not True:
      for i in range(self.depth):
        block(self.config, name=f"encoderblock_{i}")(x, False)
      return
    loop = nn.scan(
      block,
      variable_axes={"params": 0},
      split_rngs={"params": True},
      in_axes=nn.broadcast,
      length=self.depth,
    )
    loop(self.config, name="encoderblock")(x, False)


def apply_blocks(
  params: Params,
  x: Float[Array, "n l d"],
  keys: Key[Array, "depth"] | None,
  drops: Float[np.ndarray, "depth"] | None,
  *,
  depth: int,
  config: BlockConfig,
  train: bool,
  scan: bool | str,
  remat: bool | str,
  fsdp: Mesh | AbstractMesh | None,
  gather_dtype: str = "float32",
) -> tuple[Float[Array, "n l d"], Json]:
  """Runs the first blocks of an encoder, one after the other, with one traced function for all of them.

  A Flax module that calls its blocks one by one has each of them traced and differentiated anew: the time to trace and
  compile then grows with the depth (docs/performance.md). Here a block is a pure function of its parameters, cached by
  its configuration, so JAX traces and differentiates it once for each shape.

  The price: Flax sees no module below the encoder, so `capture_intermediates` does not reach into blocks and
  `nn.intercept_methods` sees only the first one that is traced. Blocks return their intermediates instead, and
  `analyses/relevance.py`, which changes attention in each block, runs the blocks itself.

  Args:
    params: the encoder's: "encoderblock_0", ..., or with `scan=True` "encoderblock", stacked.
    x: tokens.
    keys: of the dropout and stochastic depth in each block; None: neither.
    drops: in each block, the probability with which an example skips a branch; None: no stochastic depth.
    depth: number of blocks to run.
    config: of each block.
    train: whether dropout applies.
    scan, remat, fsdp, gather_dtype: see `Encoder`.

  Returns:
    The tokens, and the intermediates of each block under "block00", "block01", ...
  """
  block = _traced_block(config, train, bool(scan), which_remat(remat), fsdp, gather_dtype)
  if scan:
    if scan is True:
      first = jax.tree.map(lambda a: a[:depth], params["encoderblock"])
    else:
      blocks = [params[f"encoderblock_{i}"] for i in range(depth)]
      first = jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)
    x, stacked = jax.lax.scan(lambda x, xs: block(xs[0], x, *xs[1:]), x, (first, keys, drops))
    each = {k: jnp.unstack(a) for k, a in stacked.items()}
    return x, {f"block{i:02d}": {k: a[i] for k, a in each.items()} for i in range(depth)}
  out: Json = {}
  for i in range(depth):
    key, drop = (None if array is None else array[i] for array in (keys, drops))
    x, out[f"block{i:02d}"] = block(params[f"encoderblock_{i}"], x, key, drop)
  return x, out


@functools.cache
def _traced_block(
  config: BlockConfig,
  train: bool,
  scan: bool,
  remat: str,
  fsdp: Mesh | AbstractMesh | None,
  gather_dtype: str,
) -> Callable[..., Tree]:
  """One jitted function `(params, x, key, drop) -> (x, intermediates)` for all blocks of a configuration."""
  # Where parameters are divided, one checkpoint is around a block and what it gathers.
  module = _block_class(remat if fsdp is None else False, scan)(config)

  def run(params: Params, x: jax.Array, key: jax.Array | None, drop: jax.Array | None) -> Tree:
    rngs = None if key is None else {"dropout": key}
    return module.apply({"params": params}, x, train, drop, rngs=rngs)

  if fsdp is None:
    return jax.jit(run)

  kept = REMAT[remat] if remat else None

  def divided(params: Params, x: jax.Array, key: jax.Array | None, drop: jax.Array | None) -> Tree:
    if key is not None:
      return sharding.over_gathered(run, fsdp, kept)(params, x, key, drop)
    length = attention.kernel_length(
      config.attention, x.shape[1], config.dtype, x.shape[2] // config.num_heads
    )
    over = sharding.over_divided(
      lambda params, x: run(params, x, None, None), fsdp, kept, length, gather_dtype
    )
    return over(params, x)

  return jax.jit(divided)


def _block_class(remat: bool | str, scan: bool) -> Callable[..., Tree]:
  # In a loop XLA merges nothing across iterations, so the barriers against CSE would only cost time.
  if policy := which_remat(remat):
    return nn.remat(EncoderBlock, static_argnums=(2,), prevent_cse=not scan, **REMAT[policy])
  return EncoderBlock


class MAPHead(nn.Module):
  """Multi-head attention pooling: one learned probe attends to all tokens (arXiv 2106.04560). No dropout."""

  config: BlockConfig

  @nn.compact
  def __call__(self, x: Float[Array, "n l d"]) -> Float[Array, "n d"]:
    n, _, d = x.shape
    c = self.config
    probe = self.param("probe", nn.initializers.xavier_uniform(), (1, 1, d))
    x = Attention(c.num_heads, c.dtype, c.attention, name="MultiHeadDotProductAttention_0")(
      jnp.tile(probe, (n, 1, 1)), x
    ).astype(jnp.float32)
    y = nn.LayerNorm(c.layer_norm_eps, name="LayerNorm_0")(x)
    x = x + MlpBlock(c.mlp_dim, gelu=c.gelu, dtype=c.dtype, name="MlpBlock_0")(y)
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


def stack_blocks(params: Params) -> Params:
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


def unstack_blocks(params: Params) -> Params:
  """The inverse of `stack_blocks`."""
  encoder = dict(params["Transformer"])
  if "encoderblock" not in encoder:
    return params
  stacked = encoder.pop("encoderblock")
  depth = len(jax.tree.leaves(stacked)[0])
  blocks = {f"encoderblock_{i}": jax.tree.map(lambda a, i=i: a[i], stacked) for i in range(depth)}
  return {**params, "Transformer": {**encoder, **blocks}}
