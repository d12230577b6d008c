"""Image and text as points of one space: any FlexiViT beside a text tower (CLIP, LiT, SigLIP).

The patch size is the image tower's; texts have none, so one text embedding serves all sizes.
"""

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Array, Float, Int

from flexivit_jax import errors
from flexivit_jax.models import base
from flexivit_jax.models.counting import Counted
from flexivit_jax.models.flexivit import FlexiViT
from flexivit_jax.models.grid import Grid
from flexivit_jax.models.text import TextTower
from flexivit_jax.sizes import Size
from flexivit_jax.specs import Spec, Specs, image as image_spec, spec
from flexivit_jax.trees import Json

EPS = 1e-8  # added to the norm, as in big_vision's two_towers.py


class TwoTowers(nn.Module, Counted):
  """An image tower and a text tower, whose outputs are made unit vectors; and the scale and bias of their products.

  Attributes:
    image: fields of the `FlexiViT`; its num_classes, if not 0, is the length of a projection ("head").
    text: fields of the `TextTower`; likewise.
    embed_dim: length of both embeddings, for towers whose num_classes is not given: each then has a projection to it.
      None: what each tower gives is compared as it is.
    temperature: 1 / scale of the products at the start; the scale is learned as its logarithm, "t".
    bias: where "b" begins, which is learned and added to the scaled products; "auto": as the batch asks, see
      `with_batch`; None: there is no bias (softmax losses cancel it).
    dtype: of both towers' matrix products.
    fsdp, gather_dtype: see `FlexiViT`.
    num_classes: of the data; without effect, classes are texts.
  """

  PARTS: ClassVar[dict[str, str]] = {"image": "FlexiViT", "text": "TextTower"}

  image: Mapping[str, Any]
  text: Mapping[str, Any]
  embed_dim: int | None = None
  temperature: float = 0.1
  bias: float | str | None = "auto"
  dtype: str = "float32"
  fsdp: Mesh | AbstractMesh | None = None
  gather_dtype: str = "float32"
  num_classes: int = 0

  def __post_init__(self) -> None:
    self.image, self.text = base.hashable(self.image), base.hashable(self.text)
    if isinstance(self.bias, str) and self.bias != "auto":
      raise errors.UserError(f"bias={self.bias!r}; expected a number, 'auto', or None.")
    if not self.temperature > 0:
      raise errors.UserError(f"temperature={self.temperature}; expected more than 0.")
    image, text = (tower.num_classes or tower.num_features for tower in self._towers())
    if image != text:
      raise errors.UserError(
        f"The image tower gives vectors of length {image}, the text tower of {text}; give embed_dim, or num_classes of"
        " one of them."
      )
    super().__post_init__()

  @nn.nowrap
  def _towers(self, **names: str) -> tuple[FlexiViT, TextTower]:
    projected = {} if self.embed_dim is None else {"num_classes": self.embed_dim}
    common = {"dtype": self.dtype, **projected}
    divided = {"fsdp": self.fsdp, "gather_dtype": self.gather_dtype}
    image = FlexiViT(
      **{**common, "head_zeroinit": False, **self.image}, **divided, name=names.get("image")
    )
    return image, TextTower(**{**common, **self.text}, name=names.get("text"))

  @nn.compact
  def __call__(
    self,
    image: Float[Array | np.ndarray, "n h w c"] | None = None,
    tokens: Int[Array | np.ndarray, "m l"] | None = None,
    *,
    embedded: Float[Array | np.ndarray, "n e"] | None = None,
    train: bool = False,
    **size: Any,
  ) -> tuple[Float[Array, "n e"], Json]:
    """Returns the embeddings of the images (of the texts, without images), and a dict of named outputs.

    Args:
      image: pixels in [-1, 1].
      tokens: see `TextTower`; as many as images, or any number.
      embedded: unit vectors of images, in their place: of an image tower that is locked, see `training.locked`.
      train: as for the towers.
      **size: of the image tower, e.g. `seqhw=8`.

    Raises:
      UserError: neither images nor texts.
    """
    towers = self._towers(image="image", text="text")
    out: Json = {}
    if image is not None:
      x, inside = towers[0](image, train=train, **size)
      out |= {"image": unit(x.astype(jnp.float32)), "pre_logits": inside["pre_logits"]}
    if embedded is not None:
      out["image"] = jnp.asarray(embedded)
    if tokens is not None:
      x, _ = towers[1](tokens, train=train)
      out["text"] = unit(x.astype(jnp.float32))
    if not out:
      raise errors.UserError("Two towers got neither images nor tokens; give one of them.")
    n = len(out.get("image", out.get("text")))
    scale = self.param("t", nn.initializers.constant(-math.log(self.temperature)), (1,))
    out["t"] = jnp.repeat(scale, n)
    if self.bias is not None:
      start = 0.0 if self.bias == "auto" else self.bias
      out["b"] = jnp.repeat(self.param("b", nn.initializers.constant(start), (1,)), n)
    return out.get("image", out.get("text")), out

  @nn.nowrap
  def with_batch(self, batch_size: int) -> "TwoTowers":
    """The model with the bias that a batch of this size asks for, where that is "auto".

    One pair in `batch_size` belongs together, so the bias is the log-odds of that, -log(batch_size - 1), with which the
    loss of the first step is smallest before anything is learned (open_clip issue 650; arXiv 2303.15343 takes -10 at
    32,768).
    """
    if self.bias != "auto":
      return self
    return self.clone(bias=-math.log(max(batch_size - 1, 1)))

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
    """See `FlexiViT.grid`."""
    size = dict(seqhw=seqhw, grid_hw=grid_hw, patch_hw=patch_hw, stride=stride, depth=depth)
    return self._towers()[0].grid(image_hw, **size)

  @property
  def parts(self) -> dict[str, nn.Module]:
    """See `Model.parts`."""
    return dict(zip(self.PARTS, self._towers(), strict=True))

  @property
  def is_random(self) -> bool:
    """Whether training draws masks."""
    return self._towers()[0].is_random

  @property
  def num_features(self) -> int:
    """Length of the image tower's "pre_logits"."""
    return self._towers()[0].num_features

  @property
  def inputs(self) -> Specs:
    """See `Model.inputs`."""
    return {"image": image_spec(), "tokens": spec("l", "int")}

  @property
  def outputs(self) -> Specs:
    """See `Model.outputs`: unit vectors, what the image tower pools, log of the scale, and the bias if there is one."""
    image, _ = self._towers()
    length = image.num_classes or image.num_features
    out = {"image": Spec((length,)), "text": Spec((length,)), "t": spec("")}
    out["pre_logits"] = Spec((image.num_features,))
    return out | ({} if self.bias is None else {"b": spec("")})


def unit(x: Float[Array, "n e"]) -> Float[Array, "n e"]:
  """Vectors of length 1; one of zeros stays so, and its gradient is finite."""
  norm = jnp.sqrt(jnp.maximum((x * x).sum(-1, keepdims=True), 1e-30))
  return x / (norm + EPS)
