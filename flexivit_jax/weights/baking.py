"""A FlexiViT at one patch size as a plain ViT: kernel and position grid resampled once, nothing resized afterwards."""

from flexivit_jax import resize
from flexivit_jax.models import FlexiViT
from flexivit_jax.models.flexivit import resized_kernel
from flexivit_jax.models.grid import which_patch
from flexivit_jax.sizes import Size
from flexivit_jax.trees import Params

RESAMPLED = ("embedding/kernel", "pos_embedding")  # the parameters that `bake` changes


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
