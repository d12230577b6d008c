"""What a Vision Transformer costs, from its sizes: multiply-adds, FLOPs of a training step, bytes of activations."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from flexivit_jax.models import attention, counting
from flexivit_jax.models.base import Model
from flexivit_jax.models.grid import Grid, which_depth
from flexivit_jax.objectives.distill import Teacher
from flexivit_jax.sizes import SizeArgs
from flexivit_jax.specs import Shapes
from flexivit_jax.trees import Tree


@runtime_checkable
class Transformer(Protocol):
  """The fields of `FlexiViT` that its costs follow from."""

  num_classes: int
  width: int
  depth: int
  mlp_dim: int
  num_heads: int
  pool_type: str
  dtype: str
  attention: str
  gelu: str
  scan: bool | str
  remat: bool | str

  @property
  def prefix_length(self) -> int:
    """Tokens before those of the patches."""
    ...

  @property
  def num_features(self) -> int:
    """Length of the pre-logits."""
    ...

  def grid(self, image_hw: tuple[int, ...], *args: Any, **size: Any) -> Grid:
    """See `Model.grid`."""
    ...


def gmacs(model: Transformer, shapes: Shapes, **size: Any) -> float:
  """Multiply-adds of one forward pass for one image, in 1e9: matrix products only, PI-resize not counted.

  The paper's GFLOPs are twice this (its ViT-B/8 at 224 px: 156).

  Args:
    model: the model.
    shapes: (h, w, c) of "image".
    **size: static arguments of the model, e.g. `seqhw=15`.

  Raises:
    UserError: the size does not fit the image.
  """
  *image_hw, channels = shapes["image"]
  (ph, pw), _, (gh, gw) = model.grid(tuple(image_hw), **size)
  d, tokens = model.width, gh * gw
  length = tokens + model.prefix_length
  block = 4 * length * d * d + 2 * length * length * d + 2 * length * d * model.mlp_dim
  pool = (
    2 * length * d * d + 2 * length * d + 2 * d * d + 2 * d * model.mlp_dim
    if model.pool_type == "map"
    else 0
  )
  return (
    tokens * ph * pw * channels * d
    + which_depth(model.depth, size.get("depth")) * block
    + pool
    + model.num_features * model.num_classes
  ) / 1e9


def recomputed(model: Transformer, shapes: Shapes, **size: Any) -> float:
  """Multiply-adds in 1e9 for one image besides those of a forward and a plain backward pass.

  What the model's `remat` makes the backward pass do again: with "blocks" all products of the blocks but the MLP's
  second, whose result nothing needs; with "dots" the two of attention. And what the form of attention adds: scores that
  it computes again because it does not store them, and the padding of kernels.

  Args:
    model: the model.
    shapes: (h, w, c) of "image".
    **size: static arguments of the model.

  Raises:
    UserError: the size does not fit the image.
  """
  rows, columns = model.grid(shapes["image"][:2], **size).grid_hw
  length, d = rows * columns + model.prefix_length, model.width
  heads = (model.dtype, d // model.num_heads)
  padded, products = attention.products(model.attention, length, *heads)
  block = (products * padded**2 - 6 * length**2) * d
  if model.remat:
    block += 2 * padded**2 * d
  if model.remat and model.remat != "dots":
    block += 4 * length * d * d + length * d * model.mlp_dim
  return which_depth(model.depth, size.get("depth")) * block / 1e9


def activation_bytes(model: Transformer, shapes: Shapes, **size: Any) -> float:
  """Estimate of the bytes that one image's activations take until the backward pass has used them.

  What is kept, see `kept_bytes`, and the block that the backward pass works on: what `remat` makes it compute again,
  or in a loop half a block. Within a factor of 1.3 of what XLA's CPU compiler allocates (results/activations.csv).

  Args:
    model: the model.
    shapes: (h, w, c) of "image".
    **size: static arguments of the model.

  Raises:
    UserError: the size does not fit the image.
  """
  grid = model.grid(shapes["image"][:2], **size)
  whole, stored = _block_bytes(model, grid)
  working = whole - stored if model.remat else whole / 2 if model.scan else 0
  return kept_bytes(model, shapes, **size) + working


def kept_bytes(model: Transformer, shapes: Shapes, **size: Any) -> float:
  """Bytes that the forward pass of one image keeps for the backward pass, with attention's weights.

  In a loop over the blocks this is what JAX asks for, array by array; without a loop XLA computes again what a GELU
  keeps beside its input, output and gradient (measured). Arguments and errors: as `activation_bytes`.
  """
  *image_hw, channels = shapes["image"]
  grid = model.grid(tuple(image_hw), **size)
  (ph, pw), _, (gh, gw) = grid
  _, stored = _block_bytes(model, grid)
  around = gh * gw * ph * pw * channels * _itemsize(model)
  around += 3 * 4 * model.width * (gh * gw + model.prefix_length)
  return around + which_depth(model.depth, size.get("depth")) * stored


def forward_bytes(model: Transformer, shapes: Shapes, **size: Any) -> float:
  """Estimate of the bytes that a forward pass of one image takes, of which nothing is kept: a teacher's.

  The residual stream, and the larger of two parts of a block: the MLP's hidden layer before and after its GELU; or
  query, key, value, the result, and attention's scores and weights where the form has them. Within a factor of 1.3 of
  what XLA's CPU compiler allocates (results/teachers.csv). Arguments and errors: as `activation_bytes`.
  """
  rows, columns = model.grid(shapes["image"][:2], **size).grid_hw
  length, d, b = rows * columns + model.prefix_length, model.width, _itemsize(model)
  scores = 0
  if attention.keeps_scores(model.attention, length, model.dtype, d // model.num_heads):
    scores = (4 + b) * model.num_heads * length
  return length * (4.0 * d + max(2 * b * model.mlp_dim, 4 * b * d + scores))


# Arrays [tokens, mlp_dim] that the MLP keeps: in a loop by its GELU; without one XLA makes the rest again.
_HIDDEN_IN_LOOP = {"tanh": 6, "exact": 4, "quick": 4}
_HIDDEN = 3


def _block_bytes(model: Transformer, grid: Grid) -> tuple[float, float]:
  """What a block makes for one image, and what of it is kept as `remat` says.

  Of each token in float32: the residual stream and LayerNorms (6 d), their statistics, a row of attention for each
  head; in the compute dtype: query, key, value, what goes in and comes out of each product, and attention again.
  """
  rows, columns = grid.grid_hw
  length, d, m, b = (
    rows * columns + model.prefix_length,
    model.width,
    model.mlp_dim,
    _itemsize(model),
  )
  hidden = _HIDDEN_IN_LOOP[model.gelu] if model.scan else _HIDDEN
  scores = 0
  if attention.keeps_scores(model.attention, length, model.dtype, d // model.num_heads):
    scores = (4 + b) * model.num_heads * length
  products = 8 * d if b == 2 else 6 * d  # in float32 two of them are the stream itself
  statistics = 4 * (8 + 2 * model.num_heads)
  whole = length * (4 * 6 * d + b * products + b * hidden * m + scores + statistics)
  if not model.remat:
    return whole, whole
  stored = 4 * d + (b * (4 * d + m) if model.remat == "dots" else 0)
  return whole, length * stored


def _itemsize(model: Transformer) -> int:
  return 2 if model.dtype == "bfloat16" else 4


def step_flops(
  model: Model,
  shapes: Shapes,
  teachers: Mapping[str, Teacher],
  also: Sequence[Mapping[str, Any]],
  size: SizeArgs,
  *,
  batch_size: int,
  passes: int = 3,
  frozen: Tree | None = None,
) -> float:
  """FLOPs of a training step: passes at the size, a forward pass for each teacher and for each size in `also`.

  Args:
    model: the student.
    shapes: of each input in the batch, of one example; those of the student's inputs are among them.
    teachers: by name.
    also: see `Objective.also`.
    size: static arguments of the student.
    batch_size: examples in a step.
    passes: forward passes that forward and backward are worth; one more where embeddings are made twice.
    frozen: of a model of parts, the parameters that do not move, for which the traced program is counted.
  """
  if frozen is None:
    macs = passes * model.gmacs(shapes, **size)
  else:
    macs = counting.step_gmacs(model, shapes, frozen, **size)
    macs += (passes - 3) * model.gmacs(shapes, **size)
  macs += sum(model.gmacs(shapes, **s) for s in also)
  for teacher in teachers.values():
    macs += teacher.model.gmacs({"image": shapes[teacher.image]}, **teacher.size)
  return 2e9 * macs * batch_size
