"""How an image is cut into patches: the grid that follows from a model's static arguments, or why none does.

Plain integers, no JAX: a size that does not fit is an error before anything is traced.
"""

from typing import NamedTuple

from flexivit_jax import errors
from flexivit_jax.sizes import Size


class Grid(NamedTuple):
  """Pixels (h, w) of a patch, pixels from one patch to the next, and the number of patches (rows, columns)."""

  patch_hw: Size
  stride_hw: Size
  grid_hw: Size


def which_grid(
  image_hw: tuple[int, ...],
  default: Size,
  *,
  seqhw: int | None = None,
  grid_hw: Size | None = None,
  patch_hw: Size | None = None,
  stride: int | None = None,
  depth: int | None = None,
) -> Grid:
  """Returns the grid for the static arguments of a model.

  Args:
    image_hw: pixels of the image.
    default: pixels of the stored kernel, the patch size where no argument gives one.
    seqhw: tokens per side.
    grid_hw: tokens (per column, per row).
    patch_hw: pixels of a patch.
    stride: pixels from one patch to the next.
    depth: ignored here; it is a static argument like the others, so callers can pass all of them.

  Raises:
    UserError: see `which_patch`; or the patches, `stride` pixels apart, do not reach the image's edge exactly.
  """
  if stride is None:
    patch = which_patch(image_hw, default, seqhw=seqhw, grid_hw=grid_hw, patch_hw=patch_hw)
    return Grid(patch, patch, (image_hw[0] // patch[0], image_hw[1] // patch[1]))
  if seqhw is not None or grid_hw is not None:
    raise errors.UserError("With stride the grid is what fits; give no seqhw and no grid_hw.")
  patch = default if patch_hw is None else patch_hw
  spans = [side - p for side, p in zip(image_hw, patch, strict=True)]
  if min(patch) < 1 or min(spans) < 0:
    raise errors.UserError(
      f"Patches of {tuple(patch)} pixels do not fit into the image {tuple(image_hw)}; with stride the patch is"
      " patch_hw, or the kernel's own size."
    )
  if stride < 1 or any(span % stride for span in spans):
    exact = common_divisors(tuple(s for s in spans if s > 0) or (1,))
    raise errors.UserError(
      f"stride={stride}: patches of {tuple(patch)} pixels do not end at the edge of the image {tuple(image_hw)};"
      f" strides with which they do: {', '.join(map(str, exact))}."
    )
  rows, columns = (span // stride + 1 for span in spans)
  return Grid((patch[0], patch[1]), (stride, stride), (rows, columns))


def which_patch(
  image_hw: tuple[int, ...],
  default: Size,
  *,
  seqhw: int | None = None,
  grid_hw: Size | None = None,
  patch_hw: Size | None = None,
) -> Size:
  """Returns the patch size in pixels for at most one of tokens per side, grid and patch size.

  Raises:
    UserError: if more than one is given, or the grid or patch does not divide the image exactly.
  """
  square = None if seqhw is None else (seqhw, seqhw)
  sizes = {"seqhw": square, "grid_hw": grid_hw, "patch_hw": patch_hw}
  arguments = {name: size for name, size in sizes.items() if size is not None}
  if len(arguments) > 1:
    raise errors.UserError(f"Give one of seqhw, grid_hw and patch_hw, got {', '.join(arguments)}.")
  name, size = next(iter(arguments.items()), ("patch_size", default))
  if len(size) != 2 or any(p < 1 or side % p for side, p in zip(image_hw, size, strict=True)):
    got = seqhw if name == "seqhw" else tuple(size)
    raise errors.UserError(
      f"{name}={got} does not divide the image {tuple(image_hw)}; "
      f"sizes that do: {_divisors(image_hw, square=name == 'seqhw')}."
    )
  if name in ("seqhw", "grid_hw"):
    return image_hw[0] // size[0], image_hw[1] // size[1]
  return size[0], size[1]


def padded_grid(
  image_hw: tuple[int, ...],
  default: Size,
  *,
  multiple: int = 1,
  seqhw: int | None = None,
  grid_hw: Size | None = None,
  patch_hw: Size | None = None,
) -> Grid:
  """Returns the grid of an image that may be padded: the fewest patches that cover it.

  Args:
    image_hw: pixels of the image.
    default: pixels of a patch where no argument gives any.
    multiple: rows and columns are rounded up to a multiple of this, by more padding.
    seqhw: tokens per side; a side of the patch is that of the image divided by it, rounded up.
    grid_hw: tokens (per column, per row); likewise.
    patch_hw: pixels of a patch.

  Raises:
    UserError: more than one of the three; less than one; so many tokens that a row or column would be only padding.
  """
  square = None if seqhw is None else (seqhw, seqhw)
  given = {"seqhw": square, "grid_hw": grid_hw, "patch_hw": patch_hw}
  named = {name: size for name, size in given.items() if size is not None}
  if len(named) > 1:
    raise errors.UserError(f"Give one of seqhw, grid_hw and patch_hw, got {', '.join(named)}.")
  name, size = next(iter(named.items()), ("patch_size", default))
  got = seqhw if name == "seqhw" else tuple(size)
  if len(size) != 2 or min(size) < 1:
    raise errors.UserError(f"{name}={got}; expected numbers from 1 up.")
  height, width = image_hw[0], image_hw[1]
  by_grid = name in ("seqhw", "grid_hw")
  ph, pw = (-(-height // size[0]), -(-width // size[1])) if by_grid else (size[0], size[1])
  rows, columns = -(-height // ph), -(-width // pw)
  if by_grid and (rows, columns) != tuple(size):
    fits = min(rows, columns) if name == "seqhw" else (rows, columns)
    raise errors.UserError(
      f"{name}={got} does not fit the image {tuple(image_hw)}: patches of {ph} x {pw} pixels, {rows} x {columns} of"
      f" them, cover it already. Give patch_hw, or e.g. {name}={fits}."
    )
  rows, columns = (-(-k // multiple) * multiple for k in (rows, columns))
  return Grid((ph, pw), (ph, pw), (rows, columns))


def which_depth(blocks: int, depth: int | None) -> int:
  """Returns the number of blocks that run: `depth`, or all `blocks` where it is None.

  Raises:
    UserError: the model has fewer blocks than `depth`.
  """
  if depth is None:
    return blocks
  if not 1 <= depth <= blocks:
    raise errors.UserError(f"depth={depth}: the model has {blocks} blocks; expected 1 to {blocks}.")
  return depth


def common_divisors(sides: tuple[int, ...]) -> list[int]:
  """Returns the numbers that divide every side, from 1 up: the `seqhw` that fit an image of these pixels."""
  return [i for i in range(1, min(sides) + 1) if not any(side % i for side in sides)]


def paper_sizes(image_size: int) -> list[int]:
  """Tokens a side whose patches are 48 to 8 pixels: at 240 pixels the paper's ten."""
  return [n for n in common_divisors((image_size,)) if 8 <= image_size // n <= 48]


def _divisors(image_hw: tuple[int, ...], square: bool) -> str:
  each = [common_divisors((side,)) for side in image_hw]
  if square:
    each = [common_divisors(image_hw)]
  return " and ".join(", ".join(map(str, sizes)) for sizes in each)
