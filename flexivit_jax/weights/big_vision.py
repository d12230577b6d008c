"""big_vision's names, which are ours, and those of the original ViT files: what model the arrays belong to.

The original files (github.com/google-research/vision_transformer, AugReg's too) number a block's parts in one row,
call the position embedding `Transformer/posembed_input/pos_embedding` and give the class token a position.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from flexivit_jax import errors, trees
from flexivit_jax.models import vit
from flexivit_jax.sizes import Size
from flexivit_jax.trees import Arrays, Params

Fields = dict[str, Any]  # of a FlexiViT, by name

ORIGINAL_POSITION = "Transformer/posembed_input/pos_embedding"
_ORIGINAL = {
  "MultiHeadDotProductAttention_1": "MultiHeadDotProductAttention_0",
  "LayerNorm_2": "LayerNorm_1",
  "MlpBlock_3": "MlpBlock_0",
}


class Converted(NamedTuple):
  """Parameters by big_vision's names, the fields of their FlexiViT, and what a user should know about them."""

  flat: Arrays
  fields: Fields
  notes: list[str]


def convert(arrays: Arrays, fields: Fields) -> Converted:
  """Takes arrays in big_vision's own names, as "params/head/bias" or "head/bias".

  Args:
    arrays: of a file.
    fields: those that the caller gives; `posemb_size` is needed where the position grid is no square.

  Raises:
    UserError: an array that tells the architecture is missing.
  """
  flat = plain(arrays)
  inferred = infer_fields(trees.unflatten(flat), fields)
  return Converted(flat, inferred, _assumed(inferred, fields))


def plain(arrays: Arrays) -> Arrays:
  """Returns the arrays below "params/", without it; all where there are none."""
  prefix = "params/"
  return {n.removeprefix(prefix): a for n, a in arrays.items() if n.startswith(prefix)} or arrays


def is_original(arrays: Arrays) -> bool:
  """Tells whether the names are those of an original ViT."""
  return ORIGINAL_POSITION in arrays


def convert_original(arrays: Arrays, fields: Fields) -> Converted:
  """Does what `convert` does, for the names of an original ViT."""
  arrays, notes = without_pre_logits(arrays)
  flat = from_original(arrays, fields.get("posemb_size"))
  inferred = infer_fields(trees.unflatten(flat), fields)
  notes += _assumed(inferred, fields)
  is_bare = "cls" in arrays and arrays[ORIGINAL_POSITION].shape == flat["pos_embedding"].shape
  if is_bare and "posemb_size" not in fields:
    notes += assumed_bare(inferred["posemb_size"])
  return Converted(flat, inferred, notes)


def _assumed(inferred: Fields, fields: Fields) -> list[str]:
  """A note where the position grid is assumed to be square."""
  if "posemb_size" not in inferred or "posemb_size" in fields:
    return []
  return assumed_square(inferred["posemb_size"])


def from_original(arrays: Arrays, posemb_size: Size | None = None) -> Arrays:
  """Returns big_vision's names and arrays for those of an original ViT; the class token takes its position in."""
  flat = {_renamed(name): array for name, array in arrays.items()}
  position = flat.pop(ORIGINAL_POSITION)
  flat["pos_embedding"], cls = split_position(position, flat.get("cls"), posemb_size)
  return flat | ({} if cls is None else {"cls": cls})


def _renamed(name: str) -> str:
  parts = name.split("/")
  if len(parts) > 2 and parts[1].startswith("encoderblock"):
    parts[2] = _ORIGINAL.get(parts[2], parts[2])
  return "/".join(parts)


def split_position(
  position: Float[np.ndarray, "1 l d"],
  cls: Float[np.ndarray, "1 1 d"] | None,
  posemb_size: Size | None = None,
) -> tuple[Float[np.ndarray, "1 cells d"], Float[np.ndarray, "1 1 d"] | None]:
  """Returns (position of the grid, class token plus its position); without such a position both as they are."""
  cells = position.shape[1]
  whole = cells == math.prod(posemb_size) if posemb_size else math.isqrt(cells) ** 2 == cells
  if cls is None or whole:
    return position, cls
  return position[:, 1:], cls + position[:, :1]


def infer_fields(params: Params, fields: Fields) -> Fields:
  """Returns the fields of the FlexiViT that parameters with big_vision's names belong to.

  Raises:
    UserError: if an array that tells the architecture is missing.
  """
  flat = trees.flatten(vit.unstack_blocks(params) if "Transformer" in params else params)
  block = "Transformer/encoderblock_0"
  query = f"{block}/MultiHeadDotProductAttention_0/query/kernel"
  dense = f"{block}/MlpBlock_0/Dense_0/kernel"
  require(flat, {"embedding/kernel": 4, query: 3, dense: 2}, "a FlexiViT or ViT in big_vision's")
  *patch_size, _, width = flat["embedding/kernel"].shape
  blocks = {name.split("/")[1] for name in flat if name.startswith("Transformer/encoderblock_")}
  found = dict(
    patch_size=tuple(patch_size),
    width=width,
    depth=len(blocks),
    mlp_dim=flat[dense].shape[1],
    num_heads=flat[query].shape[1],
    pool_type="tok" if "cls" in flat else "map" if "MAPHead_0/probe" in flat else "gap",
    registers=flat["registers"].shape[1] if "registers" in flat else 0,
    pre_norm="pre_norm/scale" in flat,
    num_classes=flat["head/bias"].shape[0] if "head/bias" in flat else 0,
  )
  if "pos_embedding" not in flat:
    return found | {"posemb": "sincos2d"}
  return found | {
    "posemb_size": fields.get("posemb_size") or square(flat["pos_embedding"].shape[1])
  }


def assumed_square(grid: tuple[int, int]) -> list[str]:
  """Returns a note if an image of usual proportions, not square, has as many patches as this square grid."""
  cells = math.prod(grid)
  if not (others := _rectangles(cells)):
    return []
  return [
    f"The {cells} positions are taken to be a grid of {grid[0]}x{grid[1]}; if the images were not square, give"
    f" --posemb_size={others[-1]} (in Python posemb_size=({others[-1]})) or what it was."
  ]


def assumed_bare(grid: tuple[int, int]) -> list[str]:
  """Returns a note if one position of this square grid may be the class token's, which is assumed to have none."""
  cells = math.prod(grid)
  if not (others := _rectangles(cells - 1)):
    return []
  return [
    f"The {cells} positions are taken to be a grid of {grid[0]}x{grid[1]}, and the class token to have none; if one is"
    f" the class token's, give --posemb_size={others[-1]} (in Python posemb_size=({others[-1]})) or what it was."
  ]


def _rectangles(cells: int) -> list[str]:
  """Grids "h,w" of so many cells that are not square, with sides of up to 1 : 2."""
  heights = (h for h in range(1, math.isqrt(max(cells, 0)) + 1) if cells % h == 0)
  return [f"{h},{cells // h}" for h in heights if h * h < cells <= 2 * h * h]


PRE_LOGITS = ("pre_logits/", "pre_logits.")  # the original ViT's; timm's before 0.6


def without_pre_logits(arrays: Arrays) -> tuple[Arrays, list[str]]:
  """Leaves out the dense layer and tanh before the head of the ImageNet-21k files, and the head that needs them."""
  if not any(name.startswith(PRE_LOGITS) for name in arrays):
    return dict(arrays), []
  others = (*PRE_LOGITS, "head/", "head.")
  return {name: a for name, a in arrays.items() if not name.startswith(others)}, [
    "pre_logits (a dense layer and tanh before the head) and the head behind it are left out: a FlexiViT has no such"
    " layer. The model gives features; to fine-tune it, give it a new head (init.new_head=True)."
  ]


def require(flat: Arrays, names: Mapping[str, int], what: str) -> None:
  """Raises a UserError unless the names are there with so many axes: the arrays that tell the architecture."""
  missing = [name for name in names if name not in flat]
  if len(missing) == len(names):  # nothing is alike: the nearest names would mislead
    first = ", ".join(list(flat)[:3])
    raise errors.UserError(
      f"These are not the parameters of {what} names: none of {', '.join(missing)} is there; the first names are"
      f" {first}."
    )
  if missing:
    hints = "".join(f"{name}.{errors.nearest(name, flat)} " for name in missing)
    raise errors.UserError(f"These are not the parameters of {what} names; missing {hints}")
  for name, axes in names.items():
    if flat[name].ndim != axes:
      raise errors.UserError(f"{name}: expected {axes} axes, got shape {flat[name].shape}.")


def square(cells: int) -> Size:
  """Returns (side, side) of a square position grid; a UserError for another one."""
  side = math.isqrt(cells)
  if side * side != cells:
    raise errors.UserError(
      f"The position grid has {cells} cells, which is no square; give posemb_size=(h, w)."
    )
  return side, side
