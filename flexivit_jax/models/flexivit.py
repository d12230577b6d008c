"""FlexiViT: one Vision Transformer for all patch sizes (arXiv 2212.08013).

The weights hold one patch-embedding kernel (32x32 pixels) and one grid of position embeddings (7x7). For the patch
size at hand the kernel is PI-resized and the grid interpolated; everything after that is a plain ViT.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Array, Float

from flexivit_jax import errors, resize
from flexivit_jax.models import attention, base, flops, vit
from flexivit_jax.models.grid import Grid, which_depth, which_grid
from flexivit_jax.sizes import Size, SizeArgs
from flexivit_jax.specs import Shapes, Spec, Specs, image as image_spec


class PatchEmbed(nn.Module):
  """Cuts the image into patches and projects each to a token with a kernel resized to the patch."""

  patch_size: Size
  width: int
  kernel_resize: str = "pi"
  kernel_operator: str = "linear"
  kernel_moment: resize.Moment | None = None
  dtype: str = "float32"

  @nn.compact
  def __call__(
    self, image: Float[Array, "n h w c"], patch_hw: Size, stride_hw: Size
  ) -> Float[Array, "n grid_h grid_w d"]:
    n, h, w, c = image.shape
    (ph, pw), (gh, gw) = patch_hw, (h // patch_hw[0], w // patch_hw[1])
    kernel = self.param(
      "kernel", nn.initializers.normal(self.width**-0.5), (*self.patch_size, c, self.width)
    )
    bias = self.param("bias", nn.initializers.zeros, (self.width,))
    kernel = resized_kernel(self, kernel, patch_hw)
    if stride_hw != patch_hw:  # patches that overlap, or leave gaps
      arrays = image.astype(self.dtype), jnp.asarray(kernel, self.dtype)
      layout = ("NHWC", "HWIO", "NHWC")
      tokens = jax.lax.conv_general_dilated(*arrays, stride_hw, "VALID", dimension_numbers=layout)
      return tokens.astype(jnp.float32) + bias[None, None, None]
    # A convolution whose stride is its size is a reshape and one matrix product.
    patches = (
      image.reshape(n, gh, ph, gw, pw, c)
      .transpose(0, 1, 3, 2, 4, 5)
      .reshape(n, gh, gw, ph * pw * c)
    )
    tokens = patches.astype(self.dtype) @ kernel.reshape(ph * pw * c, self.width).astype(self.dtype)
    return tokens.astype(jnp.float32) + bias[None, None, None]


def resized_kernel(
  fields: "PatchEmbed | FlexiViT", kernel: Float[Array | np.ndarray, "h w c d"], patch_hw: Size
) -> Float[Array | np.ndarray, "ph pw c d"]:
  """The stored kernel at the patch size in use, as the model's fields say."""
  function = resize.KERNEL_RESIZES[fields.kernel_resize]
  moment = {} if fields.kernel_moment is None else {"moment": fields.kernel_moment}
  return function(kernel, patch_hw, fields.kernel_operator, **moment)


class Features(NamedTuple):
  """What `FlexiViT.features` returns; n images, gh x gw patches.

  Attributes:
    tokens: of the patches, after the last LayerNorm.
    pooled: what a head would take, as `pool_type` says.
    blocks: tokens of the patches after the blocks that were asked for, by the numbers that they were asked for by.
  """

  tokens: Float[Array, "n gh gw d"]
  pooled: Float[Array, "n features"]
  blocks: dict[int, Float[Array, "n gh gw d"]]


class FlexiViT(nn.Module):
  """Vision Transformer that runs at any patch size that divides the image.

  Attributes:
    num_classes: length of the logits; 0 for a model without a head, whose output is then the pre-logits.
    variant: "B" or "B/16": gives width, depth, mlp_dim, num_heads (and patch_size) where these are not given.
    patch_size: pixels (h, w) of the stored kernel: the buffer that is resized, not the patch size in use.
    posemb_size: cells (h, w) of the stored grid of position embeddings.
    pool_type: "tok" (class token), "gap" (mean of the patches' tokens) or "map" (attention pooling); "tok+gap" and
      "tok+reg" concatenate two (DINOv2's linear head; DeiT's class and distillation token).
    registers: number of learned tokens without a position, between the class token and the patches (DINOv2's).
    pre_norm: a LayerNorm before the first block (CLIP's).
    layer_norm_eps: of every LayerNorm.
    dropout: probability, of the first tokens and in all blocks.
    stochastic_depth: probability with which an example skips a branch of the last block in training, see `vit.Encoder`.
    posemb: "learn" or "sincos2d" (computed for the grid at hand).
    kernel_resize: "pi" (the paper's) or a competitor: "plain", "area", "norm".
    kernel_operator: resize operator of the patches that "pi" undoes; see `resize.OPERATORS`.
    kernel_moment: what patches look like, for which "pi" is best where the kernel shrinks; see `resize.second_moment`.
      None: white noise, as in the paper.
    grid_operator: resize operator of the position grid; timm's is "cubic_antialias".
    dtype: of the matrix products, "float32" or "bfloat16".
    scan: one compiled loop over the blocks; True stores their parameters stacked, "by_block" as without (see
      `vit.Encoder`). Same numbers.
    remat: recompute blocks in the backward pass: True or "blocks" keeps only their inputs, "dots" also the products
      with weights (see `vit.REMAT`). Same numbers, less memory, more FLOPs (`flops.recomputed`).
    attention: a form of `models/attention.py`: the same numbers, faster or slower; "auto" by device, tokens, dtype and
      width of a head. "auto:tpu": as on that platform, for programs that are lowered but not run here.
    fsdp: the mesh along whose axis "fsdp" the parameters are divided (see `sharding`); None: none are.
    gather_dtype: in which blocks gather what is divided, an option of a config's mesh; "bfloat16" only where `dtype` is
      that, so that products take the same numbers.
    head_bias: with which the head's bias begins; -10 for sigmoid losses over many classes.
  """

  num_classes: int = 0
  variant: str = "B"
  patch_size: Size | None = None
  posemb_size: Size = (7, 7)
  width: int | None = None
  depth: int | None = None
  mlp_dim: int | None = None
  num_heads: int | None = None
  posemb: str = "learn"
  pool_type: str = "tok"
  registers: int = 0
  pre_norm: bool = False
  layer_norm_eps: float = 1e-6
  dropout: float = 0.0
  stochastic_depth: float = 0.0
  head_zeroinit: bool = True
  gelu: str = "tanh"
  kernel_resize: str = "pi"
  kernel_operator: str = "linear"
  kernel_moment: resize.Moment | None = None
  grid_operator: str = "linear_antialias"
  dtype: str = "float32"
  scan: bool | str = False
  remat: bool | str = False
  attention: str = "auto"
  fsdp: Mesh | AbstractMesh | None = None
  gather_dtype: str = "float32"
  head_bias: float = 0.0

  def __post_init__(self) -> None:
    for name, value in ({"patch_size": (32, 32)} | vit.decode_variant(self.variant)).items():
      if getattr(self, name) is None:
        setattr(self, name, value)
    for name in ("patch_size", "posemb_size", "kernel_moment"):  # a config may give lists
      if getattr(self, name) is not None:
        setattr(self, name, tuple(getattr(self, name)))
    check_fields(self)
    super().__post_init__()

  @nn.compact
  def __call__(
    self,
    image: Float[Array | np.ndarray, "n h w c"],
    *,
    seqhw: int | None = None,
    grid_hw: Size | None = None,
    patch_hw: Size | None = None,
    stride: int | None = None,
    depth: int | None = None,
    train: bool = False,
  ) -> tuple[Float[Array, "n k"], dict]:
    """Returns the logits and a dict of named intermediates (big_vision's names).

    Args:
      image: pixels in [-1, 1].
      seqhw: tokens per side; the patch size is then (h // seqhw, w // seqhw).
      grid_hw: tokens (per column, per row): as `seqhw` for rectangular grids.
      patch_hw: the patch size itself in pixels. At most one of the three; with none, the kernel's own size.
      stride: pixels from one patch to the next, so that patches overlap (or leave gaps); default: the patch size. The
        grid is then what fits: (h - patch) / stride + 1 a side.
      depth: run only the first so many blocks, then the last LayerNorm and the head; default: all.
      train: applies dropout and stochastic depth, which take a "dropout" rng.

    Raises:
      UserError: if the size does not divide the image, or more than one is given; more blocks than there are.
    """
    out = {}
    patch_hw, stride_hw, _ = self.grid(
      image.shape[1:3], seqhw=seqhw, grid_hw=grid_hw, patch_hw=patch_hw, stride=stride
    )
    depth = which_depth(self.depth, depth)
    x = out["stem"] = PatchEmbed(
      self.patch_size,
      self.width,
      self.kernel_resize,
      self.kernel_operator,
      self.kernel_moment,
      self.dtype,
      name="embedding",
    )(jnp.asarray(image), patch_hw, stride_hw)
    n, gh, gw, d = x.shape

    if self.posemb == "learn":
      shape = (1, self.posemb_size[0] * self.posemb_size[1], d)
      buffer = self.param("pos_embedding", nn.initializers.normal(d**-0.5), shape)
      grid = resize.resize_grid(buffer.reshape(*self.posemb_size, d), (gh, gw), self.grid_operator)
    else:
      grid = vit.sincos2d((gh, gw), d)
    x = out["with_posemb"] = (x + grid[None]).reshape(n, gh * gw, d)

    if self.registers:
      shape = (1, self.registers, d)
      registers = self.param("registers", nn.initializers.normal(d**-0.5), shape)
      x = jnp.concatenate([jnp.tile(registers, (n, 1, 1)), x], axis=1)
    if "tok" in self.pool_type:
      cls = self.param("cls", nn.initializers.zeros, (1, 1, d))
      x = jnp.concatenate([jnp.tile(cls, (n, 1, 1)), x], axis=1)
    if self.pre_norm:
      x = nn.LayerNorm(self.layer_norm_eps, name="pre_norm")(x)
    x = nn.Dropout(self.dropout)(x, deterministic=not train)

    x, out["encoder"] = vit.Encoder(
      self.depth,
      self.block,
      scan=self.scan,
      remat=self.remat,
      fsdp=self.fsdp,
      gather_dtype=self.gather_dtype,
      stochastic_depth=self.stochastic_depth,
      name="Transformer",
    )(x, train, depth)
    out["encoded"] = x

    tokens = x[:, self.prefix_length :]
    x = self._pool(x, tokens)
    out["head_input"] = out["pre_logits"] = x
    out["pre_logits_2d"] = tokens = tokens.reshape(n, gh, gw, d)

    if self.num_classes:
      init = nn.initializers.zeros if self.head_zeroinit else nn.initializers.lecun_normal()
      bias = nn.initializers.constant(self.head_bias)
      head = nn.Dense(self.num_classes, kernel_init=init, bias_init=bias, name="head")
      if x.shape[-1] == d:  # a head on two tokens has no logits for one
        out["logits_2d"] = head(tokens)
      x = out["logits"] = head(x)
    return x, out

  def features(
    self,
    image: Float[Array | np.ndarray, "n h w c"],
    *,
    blocks: Sequence[int] = (),
    train: bool = False,
    **size: Any,
  ) -> Features:
    """Returns the grid of tokens, what is pooled from it, and on request the tokens after single blocks.

    With num_classes=0 the model makes no parameters of a head.

    Args:
      image: pixels in [-1, 1].
      blocks: numbers of blocks, 0 the first, -1 the last that runs.
      train: as for `__call__`.
      **size: static arguments of `__call__`, e.g. `seqhw=8`.

    Raises:
      UserError: as `__call__`; a block that does not run.
    """
    depth = which_depth(self.depth, size.get("depth"))
    for i in blocks:
      if not -depth <= i < depth:
        raise errors.UserError(
          f"blocks={tuple(blocks)}: {depth} blocks run; expected numbers from {-depth} to {depth - 1}."
        )
    _, out = self(image, train=train, **size)
    tokens = out["pre_logits_2d"]
    after = {i: out["encoder"][f"block{i % depth:02d}"]["+mlp"] for i in blocks}
    grids = {i: x[:, self.prefix_length :].reshape(tokens.shape) for i, x in after.items()}
    return Features(tokens, out["pre_logits"], grids)

  @nn.nowrap
  def _pool(
    self, x: Float[Array, "n l d"], tokens: Float[Array, "n p d"]
  ) -> Float[Array, "n features"]:
    """Returns the head's input from all tokens and those of the patches."""
    if self.pool_type == "tok":
      return x[:, 0]
    if self.pool_type == "gap":
      return tokens.mean(axis=1)
    if self.pool_type == "tok+gap":
      return jnp.concatenate([x[:, 0], tokens.mean(axis=1)], axis=-1)
    if self.pool_type == "tok+reg":
      return jnp.concatenate([x[:, 0], x[:, 1]], axis=-1)
    return vit.MAPHead(self.block, name="MAPHead_0")(x)

  @property
  def block(self) -> vit.BlockConfig:
    """What all blocks and the pooling head have in common."""
    return vit.BlockConfig(
      mlp_dim=self.mlp_dim,
      num_heads=self.num_heads,
      dropout=self.dropout,
      gelu=self.gelu,
      dtype=self.dtype,
      layer_norm_eps=self.layer_norm_eps,
      attention=self.attention,
    )

  @property
  def is_random(self) -> bool:
    """Whether training draws masks: gradients then depend on how a batch is divided."""
    return bool(self.dropout or self.stochastic_depth)

  @property
  def prefix_length(self) -> int:
    """Tokens before those of the patches."""
    return ("tok" in self.pool_type) + self.registers

  @property
  def num_features(self) -> int:
    """Length of the pre-logits."""
    return self.width * (1 + ("+" in self.pool_type))

  @property
  def inputs(self) -> Specs:
    """See `Model.inputs`."""
    return {"image": image_spec()}

  @property
  def outputs(self) -> Specs:
    """See `Model.outputs`: the main ones of what `__call__` returns."""
    tokens = {
      "pre_logits": Spec((self.num_features,)),
      "pre_logits_2d": Spec(("gh", "gw", self.width)),
    }
    return tokens | ({"logits": Spec((self.num_classes,))} if self.num_classes else {})

  @nn.nowrap
  def example(self, shapes: Shapes) -> tuple[dict[str, jax.Array], SizeArgs]:
    """See `Model.example`. The kernel's own size need not divide the image, so there is one token."""
    return base.zeros(self.inputs, shapes), {"seqhw": 1}

  @nn.nowrap
  def grid(
    self,
    image_hw: tuple[int, ...],
    *,
    seqhw: int | None = None,
    grid_hw: Size | None = None,
    patch_hw: Size | None = None,
    stride: int | None = None,
    depth: int | None = None,
  ) -> Grid:
    """Returns how an image of these pixels is cut into patches; the static arguments are those of `__call__`.

    Raises:
      UserError: as `__call__`.
    """
    grid = which_grid(
      image_hw, self.patch_size, seqhw=seqhw, grid_hw=grid_hw, patch_hw=patch_hw, stride=stride
    )
    which_depth(self.depth, depth)
    return grid

  @nn.nowrap
  def gmacs(self, shapes: Shapes, **size: Any) -> float:
    """See `flops.gmacs`."""
    return flops.gmacs(self, shapes, **size)

  @nn.nowrap
  def activation_bytes(self, shapes: Shapes, **size: Any) -> float:
    """See `flops.activation_bytes`."""
    return flops.activation_bytes(self, shapes, **size)


CHOICES: dict[str, tuple[Any, ...]] = {
  "pool_type": ("tok", "gap", "map", "tok+gap", "tok+reg"),
  "posemb": ("learn", "sincos2d"),
  "gelu": tuple(vit.GELU),
  "kernel_resize": tuple(resize.KERNEL_RESIZES),
  "kernel_operator": tuple(resize.OPERATORS),
  "grid_operator": tuple(resize.OPERATORS),
  "dtype": ("float32", "bfloat16"),
  "gather_dtype": ("float32", "bfloat16"),
  "scan": (False, True, "by_block"),
  "remat": (False, True, *vit.REMAT),
}


def check_fields(model: FlexiViT) -> None:
  """Raises a UserError for a field that no model can have."""
  for name, known in CHOICES.items():
    if getattr(model, name) not in known:
      raise errors.unknown(name, getattr(model, name), known)
  form, colon, platform = model.attention.partition(":")
  if form not in ("auto", *attention.FORMS):
    raise errors.unknown("attention", form, ("auto", *attention.FORMS))
  if colon and platform not in attention.PLATFORMS:
    raise errors.unknown("attention's platform", platform, attention.PLATFORMS)
  for name, least in (("width", 1), ("depth", 1), ("mlp_dim", 1), ("num_classes", 0)):
    if getattr(model, name) < least:
      raise errors.UserError(f"{name}={getattr(model, name)}: expected {least} or more.")
  for name in ("dropout", "stochastic_depth"):
    if not 0 <= getattr(model, name) < 1:
      raise errors.UserError(
        f"{name}={getattr(model, name)}: expected a probability, from 0 to below 1."
      )
  if model.num_heads < 1 or model.width % model.num_heads:
    raise errors.UserError(
      f"width={model.width} must be a multiple of num_heads={model.num_heads}."
    )
  if model.gather_dtype == "bfloat16" != model.dtype:
    raise errors.UserError(
      f"mesh.gather_dtype='bfloat16' with model.dtype={model.dtype!r} would round the weights of every product; set"
      " model.dtype='bfloat16', or leave gather_dtype out."
    )
  if model.registers < (model.pool_type == "tok+reg"):
    raise errors.UserError(
      f"registers={model.registers}: expected 0 or more, and 1 or more with pool_type='tok+reg'."
    )
  if not model.layer_norm_eps > 0:
    raise errors.UserError(f"layer_norm_eps={model.layer_norm_eps}: expected a number > 0.")
  moment = model.kernel_moment
  if moment is not None and (model.kernel_resize != "pi" or len(moment) < max(model.patch_size)):
    raise errors.UserError(
      f"kernel_moment has {len(moment)} values; expected one for each of the {max(model.patch_size)}"
      f" pixels of the kernel, and kernel_resize='pi' (here {model.kernel_resize!r})."
    )
  for name in ("patch_size", "posemb_size"):
    size = getattr(model, name)
    if len(size) != 2 or min(size) < 1:
      raise errors.UserError(f"{name}={size} must be two positive integers (height, width).")
