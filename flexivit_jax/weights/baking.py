"""A FlexiViT at one patch size as a plain ViT: kernel and position grid resampled once, nothing resized afterwards."""

from typing import Any

from flexivit_jax import resize
from flexivit_jax.models import FlexiViT, vit_part
from flexivit_jax.models.flexivit import resized_kernel
from flexivit_jax.models.grid import which_patch
from flexivit_jax.sizes import Size, SizeArgs
from flexivit_jax.trees import Params

RESAMPLED = ("embedding/kernel", "pos_embedding")  # the parameters that `bake` changes


def resampled(model: Any) -> tuple[str, ...]:
  """Returns the names of the parameters that `bake_whole` changes, of a FlexiViT or a model with one."""
  if getattr(model, "fuse", 0):
    return ()
  part = vit_part(model)
  return tuple(f"{part}/{name}" if part else name for name in RESAMPLED)


def bake_whole(
  model: Any, params: Params, *, image_hw: Size, **size: Any
) -> tuple[Any, Params, SizeArgs]:
  """Returns (model, params, static arguments) that give the same for images of `image_hw` at this size.

  A Segmenter pads images to whole patches. With `fuse` its two passes have two sizes, so it is left as it is, and runs
  with the size as its argument.

  Args:
    model: a FlexiViT, a Segmenter, or a detector.
    params, image_hw: as for `bake`.
    **size: a static argument of the model.

  Raises:
    UserError: see `bake`, and the model's `grid`.
  """
  part = vit_part(model)
  if part is None:
    return *bake(model, params, image_hw=image_hw, **size), {}
  patch_hw, _, grid_hw = model.grid(image_hw, **size)
  if getattr(model, "fuse", 0):
    return model, params, {"patch_hw": patch_hw}
  padded = patch_hw[0] * grid_hw[0], patch_hw[1] * grid_hw[1]
  fixed, own = bake(model.parts[part], params[part], image_hw=padded, patch_hw=patch_hw)
  fields = {**getattr(model, part)}
  for name in ("patch_size", "posemb_size", "kernel_moment"):
    fields[name] = getattr(fixed, name)
  return model.clone(**{part: fields}), {**params, part: own}, {}


def bake(
  model: FlexiViT,
  params: Params,
  *,
  image_hw: Size,
  seqhw: int | None = None,
  grid_hw: Size | None = None,
  patch_hw: Size | None = None,
) -> tuple[FlexiViT, Params]:
  """Returns (model, params) of the fixed ViT that gives the same logits for images of `image_hw` at this size.

  Its `patch_size` and `posemb_size` are those in use, so its forward pass resizes nothing. Bitwise the identity at
  the size that is stored. Arrays that no size changes are shared, not copied.

  Args:
    model: of any pool type and position embedding; sincos2d stays computed and has no grid to resample.
    params: its parameters, NumPy or JAX.
    image_hw: pixels of the images that the fixed model is for.
    seqhw, grid_hw, patch_hw: at most one, as in `FlexiViT`; with none, the kernel's own size.

  Raises:
    UserError: if the size does not divide the image, or more than one is given.
  """
  patch_hw = which_patch(
    image_hw, model.patch_size, seqhw=seqhw, grid_hw=grid_hw, patch_hw=patch_hw
  )
  grid_hw = image_hw[0] // patch_hw[0], image_hw[1] // patch_hw[1]
  kernel = resized_kernel(model, params["embedding"]["kernel"], patch_hw)
  baked = params | {"embedding": params["embedding"] | {"kernel": kernel}}
  if model.posemb == "learn":
    buffer = params["pos_embedding"].reshape(*model.posemb_size, model.width)
    grid = resize.resize_grid(buffer, grid_hw, model.grid_operator)
    baked["pos_embedding"] = grid.reshape(1, -1, model.width)
  # The moment is of the kernel that was; this one is not resized any more.
  moment = model.kernel_moment if patch_hw == model.patch_size else None
  return model.clone(patch_size=patch_hw, posemb_size=grid_hw, kernel_moment=moment), baked
