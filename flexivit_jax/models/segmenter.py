"""Segmenter on a FlexiViT: the class of each pixel, at any patch size (arXiv 2105.05633).

The patch size is the resolution of the answer: one vector of scores for each patch, resized to the pixels. Nothing in
the decoders depends on it.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import FrozenDict
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Array, Float

from flexivit_jax import errors
from flexivit_jax.models import base, vit
from flexivit_jax.models.counting import Counted
from flexivit_jax.models.flexivit import FlexiViT
from flexivit_jax.models.grid import Grid, padded_grid
from flexivit_jax.sizes import Size
from flexivit_jax.specs import Specs, image as image_spec, spec
from flexivit_jax.trees import Json

EPS = 1e-12  # of the norm of a vector that is made a unit vector, as in PyTorch's


class Segmenter(nn.Module, Counted):
  """A FlexiViT, and a decoder of its patches' tokens.

  An image whose sides the patch does not divide is padded with zeros (grey, after normalisation) at the bottom and at
  the right, and the answer is cut to the image.

  Attributes:
    num_classes: number of classes.
    backbone: fields of the `FlexiViT`. Its class token, if it has one, takes part in attention and is then dropped.
    decoder: "linear", one dense layer on each token; or "mask", the mask transformer: learned embeddings of the classes
      attend to the tokens and to each other, and a score is the product of a token and a class.
    decoder_depth: number of blocks of the mask transformer.
    decoder_dropout: probability in these blocks.
    fuse: 0, or how many times larger the patches of a second, coarse pass of the same weights are; its tokens, resized
      to the fine grid, are added to the fine ones through a dense layer that begins at zero. Ours: no published
      Segmenter has it.
    dtype: of the matrix products, "float32" or "bfloat16".
    fsdp, gather_dtype: see `FlexiViT`.
  """

  PARTS: ClassVar[dict[str, str]] = {"backbone": "FlexiViT"}

  num_classes: int = 0
  backbone: Mapping[str, Any] = FrozenDict()
  decoder: str = "mask"
  decoder_depth: int = 2
  decoder_dropout: float = 0.1
  fuse: int = 0
  dtype: str = "float32"
  fsdp: Mesh | AbstractMesh | None = None
  gather_dtype: str = "float32"

  def __post_init__(self) -> None:
    self.backbone = base.hashable(self.backbone)
    if self.decoder not in DECODERS:
      raise errors.unknown("decoder", self.decoder, DECODERS)
    if self.fuse == 1 or self.fuse < 0:
      raise errors.UserError(
        f"fuse={self.fuse}; expected 0 for one pass, or 2 or more: how many times larger the patches of the coarse pass"
        " are."
      )
    if self.decoder_depth < 1:
      raise errors.UserError(
        f"decoder_depth={self.decoder_depth}; expected 1 or more, or decoder='linear', which has no blocks."
      )
    if not 0 <= self.decoder_dropout < 1:
      raise errors.UserError(
        f"decoder_dropout={self.decoder_dropout}; expected 0 or more and below 1."
      )
    super().__post_init__()

  @nn.nowrap
  def _backbone(self, name: str | None = None) -> FlexiViT:
    given = {"pool_type": "gap", "dtype": self.dtype, **self.backbone, "num_classes": 0}
    return FlexiViT(**given, fsdp=self.fsdp, gather_dtype=self.gather_dtype, name=name)

  @nn.compact
  def __call__(
    self, image: Float[Array | np.ndarray, "n h w c"], *, train: bool = False, **size: Any
  ) -> tuple[Float[Array, "n h w k"], Json]:
    """Returns the scores (logits) of the pixels, and a dict of named outputs.

    Args:
      image: pixels in [-1, 1].
      train: applies dropout and stochastic depth, which take a "dropout" rng.
      **size: one of seqhw, grid_hw and patch_hw, as for `FlexiViT`, and depth.

    Raises:
      UserError: see `grid`; fewer than one class.
    """
    if self.num_classes < 1:
      raise errors.UserError(
        f"A Segmenter has {self.num_classes} classes; expected 1 or more. Name them in the data (classes.txt), or give"
        " num_classes."
      )
    h, w = image.shape[1:3]
    patch_hw, _, grid_hw = self.grid((h, w), **_without_depth(size))
    depth = {"depth": size["depth"]} if size.get("depth") is not None else {}
    padded_hw = (grid_hw[0] * patch_hw[0], grid_hw[1] * patch_hw[1])
    x = pad_to(jnp.asarray(image), padded_hw)
    backbone = self._backbone("backbone")
    tokens = backbone.features(x, patch_hw=patch_hw, train=train, **depth).tokens
    if self.fuse:
      coarse_hw = (patch_hw[0] * self.fuse, patch_hw[1] * self.fuse)
      coarse = backbone.features(x, patch_hw=coarse_hw, train=train, **depth).tokens
      coarse = upsampled(coarse.astype(jnp.float32), grid_hw)
      zeros = nn.initializers.zeros
      fusion = nn.Dense(tokens.shape[-1], kernel_init=zeros, dtype=self.dtype, name="fusion")
      tokens = tokens + fusion(coarse).astype(jnp.float32)
    scores = self._decoded(tokens, backbone, train).astype(jnp.float32)
    pixels = upsampled(scores, padded_hw)[:, :h, :w]
    return pixels, {"pixel_logits": pixels, "patch_logits": scores, "tokens": tokens}

  def _decoded(
    self, tokens: Float[Array, "n gh gw d"], backbone: FlexiViT, train: bool
  ) -> Float[Array, "n gh gw k"]:
    if self.decoder == "linear":
      return nn.Dense(self.num_classes, kernel_init=_normal(0.02), dtype=self.dtype, name="head")(
        tokens
      )
    n, gh, gw, d = tokens.shape
    decoder = MaskDecoder(
      self.num_classes,
      self.decoder_depth,
      # 64 channels a head, as in the published one; at least one head.
      vit.BlockConfig(
        mlp_dim=4 * d,
        num_heads=max(1, d // 64),
        dropout=self.decoder_dropout,
        gelu=backbone.gelu,
        dtype=self.dtype,
        layer_norm_eps=backbone.layer_norm_eps,
        attention=backbone.attention,
      ),
      name="decoder",
    )
    return decoder(tokens.reshape(n, gh * gw, d), train).reshape(n, gh, gw, -1)

  @nn.nowrap
  def grid(
    self,
    image_hw: tuple[int, ...],
    *,
    seqhw: int | None = None,
    grid_hw: Size | None = None,
    patch_hw: Size | None = None,
    depth: int | None = None,
  ) -> Grid:
    """Returns how an image of these pixels is cut into patches, those included that are padded.

    Raises:
      UserError: more than one of seqhw, grid_hw and patch_hw; a grid so fine that patches would be nothing but padding.
    """
    del depth
    default, multiple = self._backbone().patch_size, max(1, self.fuse)
    return padded_grid(
      image_hw, default, multiple=multiple, seqhw=seqhw, grid_hw=grid_hw, patch_hw=patch_hw
    )

  @property
  def parts(self) -> dict[str, nn.Module]:
    """See `Model.parts`."""
    return {"backbone": self._backbone()}

  @property
  def is_random(self) -> bool:
    """Whether training draws masks."""
    return self._backbone().is_random or (self.decoder == "mask" and self.decoder_dropout > 0)

  @property
  def inputs(self) -> Specs:
    """See `Model.inputs`."""
    return {"image": image_spec()}

  @property
  def outputs(self) -> Specs:
    """See `Model.outputs`: scores of the pixels, scores of the patches, and the tokens that they come from."""
    width = self._backbone().width
    return {
      "pixel_logits": spec("h w classes"),
      "patch_logits": spec("gh gw classes"),
      "tokens": spec(f"gh gw {width}"),
    }


class MaskDecoder(nn.Module):
  """The mask transformer: scores of tokens, as products with embeddings of the classes that have seen them.

  Both are made unit vectors, and the scores of a token go through a LayerNorm over the classes: the published weights
  were trained so, though the paper's text has neither.

  Attributes:
    num_classes: number of classes.
    depth: number of blocks.
    config: of each block.
  """

  num_classes: int
  depth: int
  config: vit.BlockConfig

  @nn.compact
  def __call__(self, tokens: Float[Array, "n l d"], train: bool = False) -> Float[Array, "n l k"]:
    n, length, d = tokens.shape
    x = nn.Dense(d, kernel_init=_normal(0.02), dtype=self.config.dtype, name="projection")(tokens)
    classes = self.param("classes", _normal(0.02), (1, self.num_classes, d))
    x = jnp.concatenate([x.astype(jnp.float32), jnp.tile(classes, (n, 1, 1))], axis=1)
    x, _ = vit.Encoder(self.depth, self.config, name="blocks")(x, train)
    init = nn.initializers.normal(d**-0.5)
    maps = [self.param(name, init, (d, d)) for name in ("patch_kernel", "class_kernel")]
    parts = (x[:, :length], x[:, length:])
    patches, named = (_unit(part @ kernel) for part, kernel in zip(parts, maps, strict=True))
    scores = jnp.einsum("nld,nkd->nlk", patches, named)
    # PyTorch's default, whatever the blocks have.
    return nn.LayerNorm(1e-5, name="mask_norm")(scores)


DECODERS = ("linear", "mask")


def pad_to(image: Float[Array, "n h w c"], hw: Size) -> Float[Array, "n new_h new_w c"]:
  """Adds zeros at the bottom and at the right."""
  below, right = (new - old for new, old in zip(hw, image.shape[1:3], strict=True))
  return jnp.pad(image, ((0, 0), (0, below), (0, right), (0, 0)))


def upsampled(x: Float[Array, "n gh gw k"], hw: Size) -> Float[Array, "n h w k"]:
  """Resizes bilinearly between the centres of patches (PyTorch's align_corners=False); beyond them is the nearest."""
  return jax.image.resize(x, (x.shape[0], *hw, x.shape[-1]), "linear", antialias=False)


def _without_depth(size: Mapping[str, Any]) -> Json:
  return {k: v for k, v in size.items() if k != "depth"}


def _normal(stddev: float) -> nn.initializers.Initializer:
  return nn.initializers.truncated_normal(stddev)


def _unit(x: Float[Array, "n l d"]) -> Float[Array, "n l d"]:
  """Vectors of length 1; the gradient of one of zeros is finite."""
  return x / jnp.sqrt(jnp.maximum((x * x).sum(-1, keepdims=True), EPS**2))
