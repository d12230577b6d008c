"""A text tower: tokens to one vector, as big_vision, BERT, CLIP or SigLIP do it.

The kinds differ in a handful of fields (`KINDS`); the blocks are those of a ViT with a mask, or with the LayerNorms
after the branches, as in BERT.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from flexivit_jax import errors
from flexivit_jax.models import vit
from flexivit_jax.specs import Spec, Specs, spec
from flexivit_jax.trees import Json, Params

KINDS: dict[str, Json] = {
  # big_vision's text_transformer.py, read at 0127fb6: every position attends to every other, also to padding.
  "big_vision": {},
  # Post-LN, token types (their row 0 is part of the positions here), LayerNorm on the embeddings (arXiv 1810.04805).
  "bert": dict(norm_first=False, pad_token=0, gelu="exact", layer_norm_eps=1e-12, pool_type="mean"),
  # Causal; the first end token is pooled (arXiv 2103.00020).
  "clip": dict(causal=True, pool_type="eos", gelu="quick", layer_norm_eps=1e-5, head_bias=False),
  # As big_vision's, with tokens that end in padding which is attended to (arXiv 2303.15343).
  "siglip": {},
}
POOLS = ("last", "first", "mean", "eos", "max")


class TextTower(nn.Module):
  """Transformer over tokens.

  Attributes:
    kind: a key of `KINDS`, which gives the fields that are None here.
    num_classes: length of the output, a projection named "head"; 0: none, the output is what is pooled.
    vocab_size: number of tokens.
    max_length: positions; a text may have fewer tokens, not more.
    variant: as of a ViT ("B"): width, depth, mlp_dim, num_heads, where these are not given.
    causal: a token attends to itself and those before it.
    norm_first: LayerNorm before each branch and after the last block (GPT, CLIP, big_vision); False: after each branch,
      and on the embeddings (BERT).
    pad_token: to which no token attends, and which "mean" and "max" leave out; None: padding is a token like others.
    pool_type: "last" or "first" position, "mean" or "max" over tokens, or "eos": the first `eos_token`.
    eos_token: see `pool_type`.
    gelu, layer_norm_eps, dtype: as in a `FlexiViT`.
    head_bias: whether the head has a bias.
    remat: the backward pass recomputes each block.
  """

  kind: str = "big_vision"
  num_classes: int = 0
  vocab_size: int = 32_000
  max_length: int = 16
  variant: str = "B"
  width: int | None = None
  depth: int | None = None
  mlp_dim: int | None = None
  num_heads: int | None = None
  causal: bool | None = None
  norm_first: bool | None = None
  pad_token: int | None = None
  pool_type: str | None = None
  eos_token: int | None = None
  gelu: str | None = None
  layer_norm_eps: float | None = None
  head_bias: bool | None = None
  dtype: str = "float32"
  remat: bool = False

  def __post_init__(self) -> None:
    if self.kind not in KINDS:
      raise errors.unknown("kind of a text tower", self.kind, KINDS)
    shape = {k: v for k, v in vit.decode_variant(self.variant).items() if k != "patch_size"}
    common = dict(
      causal=False, norm_first=True, pool_type="last", gelu="tanh", layer_norm_eps=1e-6, head_bias=True
    )  # fmt: skip
    for name, value in (shape | common | KINDS[self.kind]).items():
      if getattr(self, name) is None:
        setattr(self, name, value)
    _check(self)
    super().__post_init__()

  @nn.compact
  def __call__(
    self, tokens: Int[Array | np.ndarray, "n l"], *, train: bool = False
  ) -> tuple[Float[Array, "n k"], Json]:
    """Returns the projection of what is pooled, and a dict of named intermediates.

    Args:
      tokens: numbers below `vocab_size`; with pool_type="eos" each row has an `eos_token`.
      train: nothing is drawn in this tower.

    Raises:
      UserError: more tokens than positions.
    """
    del train
    out: Json = {}
    tokens = jnp.asarray(tokens)
    length = tokens.shape[1]
    if length > self.max_length:
      raise errors.UserError(
        f"Got {length} tokens, the text tower has {self.max_length} positions; cut the text (tokenize's length)."
      )
    init = nn.initializers.normal(self.width**-0.5)
    x = nn.Embed(self.vocab_size, self.width, embedding_init=init, name="embedding")(tokens)
    positions = self.param("pos_embedding", init, (1, self.max_length, self.width))
    x = x + positions[:, :length]
    if not self.norm_first:
      x = nn.LayerNorm(self.layer_norm_eps, name="pre_norm")(x)
    out["with_posemb"] = x
    counted = jnp.ones(tokens.shape, bool) if self.pad_token is None else tokens != self.pad_token
    mask = counted[:, None, None, :]
    if self.causal:
      mask = mask & jnp.tril(jnp.ones((length, length), bool))[None, None]
    x = TextEncoder(self.depth, self.block, self.norm_first, self.remat, name="Transformer")(
      x, mask
    )
    out["encoded"] = x
    x = out["pre_logits"] = self._pool(x, tokens, counted)
    if self.num_classes:
      x = nn.Dense(self.num_classes, use_bias=self.head_bias, name="head")(x)
      out["logits"] = x
    return x, out

  @nn.nowrap
  def _pool(
    self, x: Float[Array, "n l d"], tokens: Int[Array, "n l"], counted: Bool[Array, "n l"]
  ) -> Float[Array, "n d"]:
    if self.pool_type in ("last", "first"):
      return x[:, -1 if self.pool_type == "last" else 0]
    if self.pool_type == "eos":
      ends = (tokens == self.eos_token).argmax(-1)
      return jnp.take_along_axis(x, ends[:, None, None], axis=1)[:, 0]
    if self.pool_type == "max":
      return jnp.where(counted[..., None], x, -jnp.inf).max(1)
    # A text of padding alone is the mean of all of it.
    weight = jnp.where(counted.any(-1, keepdims=True), counted, True).astype(x.dtype)[..., None]
    return (x * weight).sum(1) / weight.sum(1)

  @property
  def block(self) -> vit.BlockConfig:
    """What all blocks have in common."""
    return vit.BlockConfig(
      mlp_dim=self.mlp_dim,
      num_heads=self.num_heads,
      gelu=self.gelu,
      dtype=self.dtype,
      layer_norm_eps=self.layer_norm_eps,
    )

  @property
  def num_features(self) -> int:
    """Length of what is pooled."""
    return self.width

  @property
  def inputs(self) -> Specs:
    """What `__call__` takes, of one example."""
    return {"tokens": spec("l", "int")}

  @property
  def outputs(self) -> Specs:
    """The main ones of what `__call__` returns."""
    out = {"pre_logits": Spec((self.width,))}
    return out | ({"logits": Spec((self.num_classes,))} if self.num_classes else {})


def _check(tower: TextTower) -> None:
  """Raises a UserError for a field that no tower can have."""
  choices = {"pool_type": POOLS, "gelu": tuple(vit.GELU), "dtype": ("float32", "bfloat16")}
  for name, known in choices.items():
    if getattr(tower, name) not in known:
      raise errors.unknown(f"{name} of a text tower", getattr(tower, name), known)
  if (tower.pool_type == "eos") != (tower.eos_token is not None):
    raise errors.UserError(
      f"A text tower has pool_type={tower.pool_type!r} and eos_token={tower.eos_token}; expected a token with 'eos',"
      " and None with the others."
    )
  for name, token in {"pad_token": tower.pad_token, "eos_token": tower.eos_token}.items():
    if token is not None and not 0 <= token < tower.vocab_size:
      raise errors.UserError(f"{name}={token}; expected 0 to {tower.vocab_size - 1} (vocab_size).")
  if tower.vocab_size < 1 or tower.max_length < 1 or tower.width % tower.num_heads:
    raise errors.UserError(
      f"A text tower of vocab_size={tower.vocab_size}, max_length={tower.max_length}, width={tower.width},"
      f" num_heads={tower.num_heads}; expected at least 1 of each, and heads that divide the width."
    )


class TextBlock(nn.Module):
  """Transformer block over tokens with a mask [n, 1, l or 1, l] of what is attended to; parameters named as a ViT's."""

  config: vit.BlockConfig
  norm_first: bool = True

  @nn.compact
  def __call__(
    self, x: Float[Array, "n l d"], mask: Bool[Array, "n 1 q l"]
  ) -> Float[Array, "n l d"]:
    c = self.config
    attention = nn.MultiHeadDotProductAttention(
      c.num_heads,
      dtype=c.dtype,
      kernel_init=nn.initializers.xavier_uniform(),
      force_fp32_for_softmax=True,
      name="MultiHeadDotProductAttention_0",
    )
    norms = [nn.LayerNorm(c.layer_norm_eps, name=f"LayerNorm_{i}") for i in range(2)]
    mlp = vit.MlpBlock(c.mlp_dim, gelu=c.gelu, dtype=c.dtype, name="MlpBlock_0")
    branches: list[Callable[..., Array]] = [lambda y: attention(y, mask=mask), mlp]
    for norm, branch in zip(norms, branches, strict=True):
      x = x + branch(norm(x)) if self.norm_first else norm(x + branch(x))
    return x


class TextEncoder(nn.Module):
  """Stack of `TextBlock`s, and with `norm_first` a LayerNorm; see `vit.apply_blocks` on one trace for all blocks."""

  depth: int
  config: vit.BlockConfig
  norm_first: bool = True
  remat: bool = False

  @nn.compact
  def __call__(
    self, x: Float[Array, "n l d"], mask: Bool[Array, "n 1 q l"]
  ) -> Float[Array, "n l d"]:
    if self.is_initializing():
      for i in range(self.depth):
        TextBlock(self.config, self.norm_first, name=f"encoderblock_{i}")(x, mask)
    run = _traced_block(self.config, self.norm_first, self.remat)
    params = self.variables["params"]
    for i in range(self.depth):
      x = run(params[f"encoderblock_{i}"], x, mask)
    if not self.norm_first:
      return x
    return nn.LayerNorm(self.config.layer_norm_eps, name="encoder_norm")(x)


@functools.cache
def _traced_block(config: vit.BlockConfig, norm_first: bool, remat: bool) -> Callable[..., Any]:
  module = TextBlock(config, norm_first)

  def run(params: Params, x: jax.Array, mask: jax.Array) -> jax.Array:
    return module.apply({"params": params}, x, mask)

  return jax.jit(jax.checkpoint(run) if remat else run)


FIELDS = tuple(f.name for f in dataclasses.fields(TextTower) if f.name not in ("parent", "name"))
