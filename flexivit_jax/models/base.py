"""What the rest of the code asks of a model. A network in `MODELS` that has these methods trains and is evaluated."""

from typing import Any, ClassVar, Protocol, runtime_checkable

import jax

from flexivit_jax.models.grid import Grid
from flexivit_jax.trees import Params

# Fields that do not identify the architecture: Flax's own, and device placement.
UNNAMED = ("parent", "name", "fsdp")


@runtime_checkable
class Model(Protocol):
  """A Flax module from images to logits, at a size that its static arguments choose.

  The keyword arguments of `grid` are the static arguments: the keys that a config's `flexi` may draw and the keywords
  that `apply` takes. One of them is `seqhw`, tokens per side; parameters are made with seqhw=1 and depend on no size.
  Parameters are named after Transformer blocks ("Transformer/encoderblock_0/...") where `optim.layer_decay` or a
  number in `optim.freeze` is to work, and the head's are "head/kernel" and "head/bias". A module with a field `fsdp`
  gets the mesh there if the mesh divides parameters.

  Files of weights (`weights.load`, so `init`, a teacher's checkpoint, `flexivit eval` and `predict`) hold a FlexiViT.

  Attributes:
    num_classes: length of the logits; a field of the module.
    dtype: of the matrix products, "float32" or "bfloat16"; a field: a run sets it to what the device is fast in.
    is_random: optional; whether training draws masks, as for dropout: `accumulate="auto"` is then refused.
  """

  num_classes: int
  dtype: str
  __dataclass_fields__: ClassVar[dict[str, Any]]  # every Flax module is a dataclass

  def init(self, rngs: jax.Array, image: jax.Array, *args: Any, **size: Any) -> dict[str, Params]:
    """Flax's: returns {"params": ...} of float32 arrays for `image` [1, h, w, c]."""
    ...

  def apply(self, variables: dict[str, Params], *args: Any, **options: Any) -> Any:
    """Flax's, of `(image [n, h, w, c], *, train=False, **size)`.

    Returns:
      The logits [n, k], and a dict of intermediates: "pre_logits" [n, d] is what probes are fitted to.
    """
    ...

  def clone(self, *args: Any, **fields: Any) -> Any:
    """Flax's: a copy with other fields; probes ask for num_classes=0, a model without a head."""
    ...

  def grid(self, image_hw: tuple[int, ...], *args: Any, **size: Any) -> Grid:
    """Returns the patches that an image of these pixels is cut into.

    Raises:
      UserError: static arguments with which the model cannot run such an image.
    """
    ...

  def gmacs(self, image_hw: tuple[int, ...], channels: int = 3, **size: Any) -> float:
    """Returns the multiply-adds of one forward pass for one image, in 1e9."""
    ...

  def activation_bytes(self, image_hw: tuple[int, ...], **size: Any) -> float:
    """Returns an estimate of the bytes that one image's activations take until the backward pass has used them."""
    ...
