"""What the patch itself costs: how well masks are predicted by who knows the share of each class in each patch.

Two answers that a grid of patches can give, scored like any other: the commonest class of each patch ("constant"), and
the shares of the classes as scores, resized bilinearly as a model's are ("bilinear"). A model whose scores are sharper
than shares can pass the second, but not by much: beside a model's number they tell the size of the patch from the
quality of its features.
"""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer

from flexivit_jax.evaluators import windows
from flexivit_jax.evaluators.windows import View
from flexivit_jax.models.segmenter import upsampled
from flexivit_jax.sizes import Size
from flexivit_jax.specs import NO_CLASS

KINDS = ("constant", "bilinear")


def shares(
  mask: Integer[np.ndarray, "h w"], patch_hw: Size, num_classes: int
) -> Float[np.ndarray, "gh gw k"]:
  """Returns the share of each class in the pixels of each patch, those of no class among them.

  A patch that reaches beyond the edge, at the bottom and at the right, has the pixels that it covers.

  Args:
    mask: classes, and NO_CLASS.
    patch_hw: pixels of a patch.
    num_classes: number of classes.
  """
  (h, w), (ph, pw) = mask.shape, patch_hw
  grid, k = (-(-h // ph), -(-w // pw)), num_classes + 1
  patch = (np.arange(h) // ph)[:, None] * grid[1] + np.arange(w) // pw
  labels = np.where(mask == NO_CLASS, num_classes, mask)
  pixels = np.bincount((patch * k + labels).ravel(), minlength=grid[0] * grid[1] * k)
  pixels = pixels.reshape(*grid, k)
  return (pixels / pixels.sum(-1, keepdims=True))[..., :-1].astype(np.float32)


def predicted(
  mask: Integer[np.ndarray, "h w"], view: View, patch_hw: Size, num_classes: int
) -> dict[str, Integer[np.ndarray, "h w"]]:
  """Returns the answer of each of `KINDS`, as a model's are made: by windows and scales, at the size of the mask.

  Args:
    mask: classes, and NO_CLASS.
    view: how images are shown to the model.
    patch_hw: pixels of a patch of what the model is shown.
    num_classes: number of classes.
  """
  hw = (mask.shape[0], mask.shape[1])
  if view.window is None and view.scales == (1.0,) and view.size(hw) == hw:
    known = shares(mask, patch_hw, num_classes)
    common = np.repeat(np.repeat(known.argmax(-1), patch_hw[0], 0), patch_hw[1], 1)
    smooth = _largest(known, hw=hw, padded=_padded(hw, patch_hw))
    return {"constant": common[: hw[0], : hw[1]], "bilinear": np.asarray(smooth)}
  canvases = [_canvases(mask, view, scale, patch_hw, num_classes) for scale in view.scales]
  return {
    kind: windows.predicted([one[kind] for one in canvases], hw, softmax=False) for kind in KINDS
  }


def _canvases(
  mask: Integer[np.ndarray, "h w"], view: View, scale: float, patch_hw: Size, num_classes: int
) -> Mapping[str, windows.Canvas]:
  """The two answers for all windows at a scale."""
  hw = view.size((mask.shape[0], mask.shape[1]), scale)
  rows, columns = (
    ((np.arange(new) + 0.5) * old / new).astype(int)
    for old, new in zip(mask.shape, hw, strict=True)
  )
  seen = mask[rows[:, None], columns[None]]
  window, stride = view.window or hw, view.stride or hw
  made = {kind: windows.Canvas(hw, window, stride, num_classes) for kind in KINDS}
  for y, x in made["constant"].places:
    known = shares(seen[y : y + window[0], x : x + window[1]], patch_hw, num_classes)
    common = np.eye(num_classes, dtype=np.float32)[known.argmax(-1)]
    common = np.repeat(np.repeat(common, patch_hw[0], 0), patch_hw[1], 1)[: window[0], : window[1]]
    smooth = _smooth(known, hw=window, padded=_padded(window, patch_hw))
    for kind, scores in (("constant", common), ("bilinear", smooth)):
      made[kind].add(jnp.asarray(scores)[None], 0, (y, x))
  return made


def _padded(hw: Size, patch_hw: Size) -> Size:
  h, w = (-(-side // patch) * patch for side, patch in zip(hw, patch_hw, strict=True))
  return h, w


@functools.partial(jax.jit, static_argnames=("hw", "padded"))
def _smooth(known: Float[Array, "gh gw k"], *, hw: Size, padded: Size) -> Float[Array, "h w k"]:
  return upsampled(known[None], padded)[0, : hw[0], : hw[1]]


@functools.partial(jax.jit, static_argnames=("hw", "padded"))
def _largest(known: Float[Array, "gh gw k"], *, hw: Size, padded: Size) -> Integer[Array, "h w"]:
  return windows.classes(_smooth(known, hw=hw, padded=padded))
