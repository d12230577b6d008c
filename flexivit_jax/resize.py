"""Linear resize operators as small matrices, and PI-resize of patch-embedding kernels.

Every resize here is linear and separable: one matrix `M` of shape `[new, old]` an axis. The paper's PI-resize
(FlexiViT, arXiv 2212.08013) needs `pinv(B^T)` of the two-dimensional operator `B`; because
`B = M_h (x) M_w` and `pinv(A (x) C) = pinv(A) (x) pinv(C)`, two small pseudo-inverses are all there is to it.
Coordinates are half-pixel centred, as in `tf.image.resize`, `jax.image.resize` and torch's `align_corners=False`.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from flexivit_jax import errors

Array = jax.Array | np.ndarray


def _triangle(x: np.ndarray) -> np.ndarray:
  return np.maximum(0.0, 1.0 - np.abs(x))


def _keys_cubic(x: np.ndarray) -> np.ndarray:
  a, x = -0.5, np.abs(x)
  near = (a + 2) * x**3 - (a + 3) * x**2 + 1
  far = a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
  return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


def _sampled(
  old: int, new: int, kernel: Callable[[np.ndarray], np.ndarray], antialias: bool
) -> np.ndarray:
  centre = (np.arange(new) + 0.5) * old / new - 0.5  # of each output pixel, in input pixels
  width = max(1.0, old / new) if antialias else 1.0
  weights = kernel((centre[:, None] - np.arange(old)) / width)
  # At the border the weights inside are renormalised.
  return weights / weights.sum(axis=1, keepdims=True)


def _area(old: int, new: int) -> np.ndarray:
  lo = np.arange(new)[:, None] * old / new
  overlap = np.minimum(lo + old / new, np.arange(old) + 1) - np.maximum(lo, np.arange(old))
  return np.maximum(0.0, overlap) * new / old


OPERATORS: dict[str, Callable[[int, int], np.ndarray]] = {
  "linear": functools.partial(_sampled, kernel=_triangle, antialias=False),  # the paper's
  "linear_antialias": functools.partial(_sampled, kernel=_triangle, antialias=True),
  "cubic": functools.partial(_sampled, kernel=_keys_cubic, antialias=False),
  "cubic_antialias": functools.partial(_sampled, kernel=_keys_cubic, antialias=True),  # timm's
  "area": _area,
}


@functools.cache
def resize_matrix(old: int, new: int, operator: str = "linear") -> Float[np.ndarray, "new old"]:
  """Matrix `M` with `M @ x` the signal `x` of `old` samples resized to `new` samples; float64, read-only.

  Args:
    old: samples before, at least 1.
    new: samples after, at least 1.
    operator: a name in `OPERATORS`; cubic is Keys' with a = -0.5, area is the exact box average.

  Raises:
    UserError: for an unknown operator or a size below 1.
  """
  if operator not in OPERATORS:
    raise errors.unknown("resize operator", operator, OPERATORS)
  _check_sizes(old, new)
  return _read_only(np.eye(old) if old == new else OPERATORS[operator](old, new))


Moment = tuple[float, ...]


@functools.cache
def pi_matrix(
  old: int, new: int, operator: str = "linear", moment: Moment | None = None
) -> Float[np.ndarray, "new old"]:
  """Matrix `P` with `<M @ x, P @ w> == <x, w>` for all `x` when new >= old; least squares when new < old.

  `P = pinv(M.T)` with `M = resize_matrix(old, new, operator)`; float64, read-only. Source: FlexiViT
  (arXiv 2212.08013), PI-resize: `(B^T)^+ vec(w)`.

  Args:
    old, new, operator: as in `resize_matrix`.
    moment: `E[x_i x_(i+k)]` for k = 0, 1, ..., at least `old` of them: what signals look like, see `second_moment`.
      Least squares is then over such signals, `P = pinv(sqrt(S) M.T) sqrt(S)` (same source, for a general second
      moment S), and not over white noise. Without effect when new >= old.
  """
  m = resize_matrix(old, new, operator)
  if old == new:
    return m
  if moment is None or new > old:
    return _read_only(np.linalg.pinv(m.T))
  root = _root(moment, old)
  return _read_only(np.linalg.pinv(root @ m.T) @ root)


def _root(moment: Moment, size: int) -> Float[np.ndarray, "size size"]:
  """Symmetric square root of the Toeplitz matrix of the first `size` values."""
  at = np.arange(size)
  values, vectors = np.linalg.eigh(np.asarray(moment)[np.abs(at[:, None] - at)])
  if values.min() <= 1e-9 * values.max():
    raise errors.UserError(
      f"The second moment {moment[:4]}... of {size} samples is none: the smallest eigenvalue of its"
      f" matrix is {values.min():.1e}, expected > 0."
    )
  return (vectors * np.sqrt(values)) @ vectors.T


def second_moment(image: Float[np.ndarray, "n h w c"], length: int) -> Moment:
  """Returns `E[x_i x_(i+k)] / E[x_i^2]` of pixels k apart in a row or column, for k < length: what `pi_matrix` takes.

  Pixels in [-1, 1], as the model sees them; not centred, since a kernel answers to the mean too.

  Raises:
    UserError: images with fewer than `length` pixels a side.
  """
  if min(image.shape[1:3]) < length:
    raise errors.UserError(f"Images of {image.shape[1:3]} pixels are smaller than {length}.")
  x = image.astype(np.float64)
  sums = [
    np.mean(x[:, k:] * x[:, : x.shape[1] - k]) + np.mean(x[:, :, k:] * x[:, :, : x.shape[2] - k])
    for k in range(length)
  ]
  return tuple(float(s / sums[0]) for s in sums)


@functools.cache
def zoom_matrix(old: int, new: int) -> Float[np.ndarray, "new old"]:
  """Linear resize that maps the first sample to the first and the last to the last; float64, read-only.

  Corner-aligned, as `scipy.ndimage.zoom(order=1)`: what the reference applies to the position grid of an older
  checkpoint when it loads one (big_vision, models/vit.py).
  """
  _check_sizes(old, new)
  at = np.arange(new) * ((old - 1) / (new - 1) if new > 1 else 0.0)
  return _read_only(_triangle(at[:, None] - np.arange(old)))


def pi_resize(
  kernel: Float[Array, "*size c d"],
  size: Sequence[int],
  operator: str = "linear",
  moment: Moment | None = None,
) -> Float[Array, "*new c d"]:
  """Patch-embedding kernel resized so that tokens of equally resized patches stay what they were.

  Exact when no axis shrinks; the least-squares solution for white-noise patches on an axis that does, or for patches
  of a second moment that is the product of the same `moment` along each axis (see `pi_matrix`). Any number
  of spatial axes. NumPy in, NumPy out in the kernel's own precision; JAX in, JAX out, differentiable. Bitwise the
  identity where the size is unchanged.

  Args:
    kernel: `[*size, c, d]`, usually `[h, w, c, d]`.
    size: new spatial size, one integer an axis.
    operator: how the image patches are resized; a name in `OPERATORS`.
    moment: of the patches along an axis.

  Raises:
    UserError: if `size` does not have one entry for each spatial axis, or the operator is unknown.
  """
  return _apply(kernel, [pi_matrix(o, n, operator, moment) for o, n in _axes(kernel, size)])


def plain_resize(
  kernel: Float[Array, "*size c d"], size: Sequence[int], operator: str = "linear"
) -> Float[Array, "*new c d"]:
  """Kernel resized as if it were an image: the paper's "vanilla" competitor, which changes every token's scale."""
  return _apply(kernel, [resize_matrix(o, n, operator) for o, n in _axes(kernel, size)])


def area_resize(
  kernel: Float[Array, "*size c d"], size: Sequence[int], operator: str = "linear"
) -> Float[Array, "*new c d"]:
  """`plain_resize` times the ratio of the patch areas, old / new: the paper's "area heuristic"."""
  ratio = float(np.prod(kernel.shape[:-2]) / np.prod(size))
  resized = plain_resize(kernel, size, operator)
  return (resized * ratio).astype(kernel.dtype) if ratio != 1.0 else resized


def norm_resize(
  kernel: Float[Array, "*size c d"], size: Sequence[int], operator: str = "linear"
) -> Float[Array, "*new c d"]:
  """`plain_resize` scaled so that each output feature keeps its kernel's L2 norm: a "norm heuristic".

  The paper's formula is not public (it normalises token norms after embedding); this is our reading of it as a map
  of weights: for white-noise patches it keeps the expected norm of the tokens. An all-zero filter stays zero.
  """
  resized, axes = plain_resize(kernel, size, operator), tuple(range(kernel.ndim - 1))
  if resized.shape == kernel.shape:
    return kernel
  before, after = ((k**2).sum(axis=axes, keepdims=True) for k in (kernel, resized))
  xp = np if isinstance(kernel, np.ndarray) else jnp
  # Both are replaced, not the ratio: the gradient of sqrt(0) would be infinite.
  before, after = (xp.where(after > 0, x, xp.ones_like(x)) for x in (before, after))
  return resized * xp.sqrt(before / after)


KERNEL_RESIZES: dict[str, Callable[..., Array]] = {
  "pi": pi_resize,
  "plain": plain_resize,
  "area": area_resize,
  "norm": norm_resize,
}


def resize_grid(
  grid: Float[Array, "h w d"], hw: tuple[int, int], operator: str = "linear_antialias"
) -> Float[Array, "new_h new_w d"]:
  """Position grid resized linearly, antialiased on an axis that shrinks: what the reference does at run time."""
  return _apply(
    grid, [resize_matrix(o, n, operator) for o, n in zip(grid.shape[:2], hw, strict=True)]
  )


def zoom_grid(grid: Float[Array, "h w d"], hw: tuple[int, int]) -> Float[Array, "new_h new_w d"]:
  """Position grid resized with its corners kept in place: what the reference does to an old checkpoint at load."""
  return _apply(grid, [zoom_matrix(o, n) for o, n in zip(grid.shape[:2], hw, strict=True)])


def _check_sizes(old: int, new: int) -> None:
  if old < 1 or new < 1:
    raise errors.UserError(f"Cannot resize {old} samples to {new}: both must be at least 1.")


def _axes(kernel: Array, size: Sequence[int]) -> list[tuple[int, int]]:
  if kernel.ndim != len(size) + 2:
    raise errors.UserError(
      f"A kernel of shape {tuple(kernel.shape)} has {kernel.ndim - 2} spatial axes ([*size, c, d]), "
      f"but the new size {tuple(size)} has {len(size)}; give one integer for each."
    )
  return list(zip(kernel.shape[:-2], size, strict=True))


def _apply(array: Array, matrices: Sequence[np.ndarray]) -> Array:
  """Multiplies leading axis i of `array` by `matrices[i]`; the axes that shrink most go first (less work)."""
  for axis in sorted(
    range(len(matrices)), key=lambda i: matrices[i].shape[0] / matrices[i].shape[1]
  ):
    new, old = matrices[axis].shape
    if new != old:  # between equal sizes every operator here is the identity
      array = _matmul_axis(matrices[axis], array, axis)
  return array


def _matmul_axis(matrix: np.ndarray, array: Array, axis: int) -> Array:
  lead, rest = array.shape[:axis], array.shape[axis + 1 :]
  flat = array.reshape(int(np.prod(lead)), matrix.shape[1], -1)
  m = matrix.astype(np.promote_types(array.dtype, np.float32))
  if isinstance(array, np.ndarray):
    out = np.matmul(m[None], flat)
  else:  # weight surgery is done in full precision, also where matmuls default to bfloat16
    out = jnp.einsum("no,lor->lnr", m, flat, precision=jax.lax.Precision.HIGHEST)
  return out.reshape(*lead, matrix.shape[0], *rest).astype(array.dtype)


def _read_only(matrix: np.ndarray) -> np.ndarray:
  matrix.flags.writeable = False
  return matrix
