"""What the rest of the code asks of a model. A network in `MODELS` that has these methods trains and is evaluated."""

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax.core import FrozenDict

from flexivit_jax.models.grid import Grid
from flexivit_jax.sizes import SizeArgs
from flexivit_jax.specs import Shapes, Specs
from flexivit_jax.trees import Params

# Fields that do not identify the architecture: Flax's own, device placement, how the head's bias begins.
UNNAMED = ("parent", "name", "fsdp", "gather_dtype", "head_bias")


@runtime_checkable
class Model(Protocol):
  """A Flax module from named inputs to named outputs, at a size that its static arguments choose.

  The keyword arguments of `grid` are the static arguments: the keys that a config's `flexi` may draw and the keywords
  that `apply` takes. One of them is `seqhw`, tokens per side of the image; parameters depend on no size.
  Parameters are named after Transformer blocks ("Transformer/encoderblock_0/...", also under a tower's name) where
  `optim.layer_decay` or a number in `optim.freeze` is to work, and a classifier's head is "head/kernel" and
  "head/bias". A module with a field `fsdp` gets the mesh there if the mesh divides parameters; one with a field
  `head_bias` gets `init_head_bias` there.

  Every parameter begins as its initialiser makes it: nothing is filled in afterwards.

  A model made of parts, as two towers are, says which: a class attribute `PARTS`, the class of each by the name of its
  parameters, and a property `parts`, the modules. A run may start from a file for each (`init.image.checkpoint`).

  `weights.load`, so `init` and a teacher's checkpoint, reads the FlexiViT of a file; `weights.tasks.load`, so
  `flexivit inspect` and `eval`, the whole model, of classes of parts that `weights.model_records` knows.

  Attributes:
    num_classes: number of classes of the data that the model is for, a field; 0 if it has no use for them.
    dtype: of the matrix products, "float32" or "bfloat16"; a field: a run sets it to what the device is fast in.
    is_random: optional; whether training draws masks, as for dropout: `accumulate="auto"` is then refused.
  """

  num_classes: int
  dtype: str
  __dataclass_fields__: ClassVar[dict[str, Any]]  # every Flax module is a dataclass

  @property
  def inputs(self) -> Specs:
    """What `apply` takes by name, of one example. "image", (h, w, c), is among them."""
    ...

  @property
  def outputs(self) -> Specs:
    """What `apply` returns by name, of one example; a classifier's "logits" and "pre_logits" among them."""
    ...

  def example(self, shapes: Shapes) -> tuple[dict[str, jax.Array], SizeArgs]:
    """Returns inputs [1, ...] and static arguments with which `init` makes the parameters; `models.base.zeros` helps.

    Args:
      shapes: of the inputs, of one example.
    """
    ...

  def init(self, rngs: jax.Array, *args: Any, **inputs: Any) -> dict[str, Params]:
    """Flax's: returns {"params": ...} of float32 arrays for what `example` returns."""
    ...

  def apply(self, variables: dict[str, Params], *args: Any, **options: Any) -> Any:
    """Flax's, of `(image=[n, h, w, c], ..., *, train=False, **size)`, the inputs by name.

    Returns:
      The main output (a classifier's logits), and a dict of all `outputs` and any intermediates, [n, ...] each.
      "pre_logits" [n, d] is what probes are fitted to.
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

  def gmacs(self, shapes: Shapes, **size: Any) -> float:
    """Returns the multiply-adds of one forward pass for one example of these shapes, in 1e9.

    `counting.gmacs(self, shapes, **size)` counts them in the traced program.
    """
    ...

  def activation_bytes(self, shapes: Shapes, **size: Any) -> float:
    """Returns an estimate of the bytes that one example's activations take until the backward pass has used them.

    `counting.activation_bytes(self, shapes, **size)` counts them in the traced program.
    """
    ...


def vit_part(model: Any) -> str | None:
  """Returns which part of a model, or of its class, is its FlexiViT; None where no part is."""
  parts = getattr(model, "PARTS", {})
  return next((part for part, kind in parts.items() if kind == "FlexiViT"), None)


def hashable(fields: Mapping[str, Any]) -> FrozenDict:
  """Returns the fields of a part as a module can hold them: a module is hashed, and a config gives lists."""
  return FrozenDict({k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})


def zeros(specs: Specs, shapes: Shapes) -> dict[str, jax.Array]:
  """Returns inputs [1, ...] of zeros, for `Model.example`."""
  dtypes = {"int": jnp.int32}
  return {
    name: jnp.zeros((1, *shapes[name]), dtypes.get(one.kind, jnp.float32))
    for name, one in specs.items()
  }
