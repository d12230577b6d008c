"""A window that slides over an image: where it stands, and one picture of what a model says of all windows.

Protocol (arXiv 2105.05633, segm/model/utils.py): the image's short side is resized, and the image enlarged where it is
smaller than the window; windows stand `stride` pixels apart, the last one flush with the edge; logits are summed, and
divided by how many windows cover a pixel; then they are resized to the size of the true mask.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple, final

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer

from flexivit_jax.sizes import Size

STEP = 64  # sides of what is compiled are multiples of it: few programs for many sizes of images
ROWS = 128  # of the answer that are made at once


class View(NamedTuple):
  """How images are shown to the model; see `segmentation.segmentation`."""

  short_side: int | None
  window: Size | None
  stride: Size | None
  scales: tuple[float, ...]
  flip: bool

  def size(self, hw: Size, scale: float = 1.0) -> Size:
    """The size that an image of `hw` pixels is resized to."""
    short = self.short_side or min(hw)
    return scaled(hw, short * scale, self.window or (1, 1))

  @property
  def flips(self) -> tuple[bool, ...]:
    """Whether the image is mirrored, in each pass over it."""
    return (False, True) if self.flip else (False,)


def scaled(hw: Size, short: float, least: Size = (1, 1)) -> Size:
  """Returns the size of an image whose short side is resized to `short` pixels, but no side is below `least`."""
  factor = short / min(hw)
  h, w = (max(1, round(side * factor)) for side in hw)
  more = max(least[0] / h, least[1] / w)
  if more <= 1:
    return h, w
  return max(least[0], round(h * more)), max(least[1], round(w * more))


def anchors(length: int, window: int, stride: int) -> list[int]:
  """Returns where windows begin along a side of `length` pixels; the last one ends with it."""
  return [*range(0, length - window, stride), length - window]


def number(hw: Size, window: Size, stride: Size) -> int:
  """Returns how many windows an image of `hw` pixels has; it is not smaller than one."""
  rows, columns = (len(anchors(n, w, s)) for n, w, s in zip(hw, window, stride, strict=True))
  return rows * columns


@final
class Canvas:
  """The sum of the logits of windows of one image; every pixel is covered once all of `places` are added.

  Args:
    hw: pixels of the image that the windows are of.
    window: pixels of a window.
    stride: pixels from one to the next.
    num_classes: number of logits.
    flip: whether the windows are of the mirrored image.
  """

  def __init__(self, hw: Size, window: Size, stride: Size, num_classes: int, flip: bool = False):
    self.hw, self.flip = hw, flip
    begins = [anchors(*sides) for sides in zip(hw, window, stride, strict=True)]
    self.places = [(y, x) for y in begins[0] for x in begins[1]]
    self._missing = len(self.places)
    # The windows are a product of rows and columns, and so is how often a pixel is covered.
    self._covered = [
      np.sum([(np.arange(n) >= b) & (np.arange(n) < b + size) for b in begin], axis=0)
      for n, begin, size in zip(hw, begins, window, strict=True)
    ]
    h, w = map(_rounded, hw)
    self.sum = jnp.zeros((h, w, num_classes), jnp.float32)

  def add(self, logits: Float[Array, "b wh ww k"], i: int, place: tuple[int, int]) -> None:
    """Adds what the model says of the window at `place`, the i-th of a batch."""
    self.sum = _add(self.sum, logits, np.int32(i), *map(np.int32, place))
    self._missing -= 1

  @property
  def is_full(self) -> bool:
    """Whether all windows are there."""
    return not self._missing

  def sampled(self, hw: Size) -> "Sampled":
    """Returns it with the weights that make an image of `hw` pixels of it."""
    rows, columns = (
      _weights(old, new, covered)
      for old, new, covered in zip(self.hw, hw, self._covered, strict=True)
    )
    if self.flip:
      columns = Weights(*(values[::-1] for values in columns))
    return Sampled(self.sum, rows, columns)


class Weights(NamedTuple):
  """Of each new pixel along an axis: the two old ones that it lies between, and the share of each."""

  low: Integer[np.ndarray, "n"]
  high: Integer[np.ndarray, "n"]
  of_low: Float[np.ndarray, "n"]
  of_high: Float[np.ndarray, "n"]

  def part(self, begin: int, number: int) -> "Weights":
    """Those of some pixels; beyond the end all is zero."""
    parts = (values[begin : begin + number] for values in self)
    return Weights(*(np.pad(values, (0, number - len(values))) for values in parts))


class Sampled(NamedTuple):
  """A sum of logits [h, w, k], and how it is resized along both axes."""

  sum: Array
  rows: Weights
  columns: Weights


def predicted(
  canvases: Sequence[Canvas], hw: Size, *, softmax: bool = True
) -> Integer[np.ndarray, "h w"]:
  """Returns the class of each pixel of an image: the largest logit, or of several canvases the mean probability.

  Args:
    canvases: all full: of several scales, or of the mirrored image.
    hw: pixels of the true mask, to which logits are resized bilinearly before anything else.
    softmax: whether they hold logits; otherwise probabilities.
  """
  parts = [canvas.sampled(hw) for canvas in canvases]
  width = _rounded(hw[1])
  blocks = []
  for begin in range(0, hw[0], ROWS):
    shown = tuple(Sampled(s.sum, s.rows.part(begin, ROWS), s.columns.part(0, width)) for s in parts)
    blocks.append(_classes(shown, softmax=softmax))
  return np.concatenate(jax.device_get(blocks))[: hw[0], : hw[1]]


@functools.partial(jax.jit, donate_argnums=0)
def _add(total: Array, logits: Array, i: Array, y: Array, x: Array) -> Array:
  window = jax.lax.dynamic_index_in_dim(logits, i, keepdims=False).astype(jnp.float32)
  start = (y, x, jnp.int32(0))
  before = jax.lax.dynamic_slice(total, start, window.shape)
  return jax.lax.dynamic_update_slice(total, before + window, start)


@functools.partial(jax.jit, static_argnames="softmax")
def _classes(parts: tuple[Sampled, ...], *, softmax: bool) -> Integer[Array, "rows columns"]:
  scores = [_resized(*part) for part in parts]
  return classes(joined(scores) if softmax else functools.reduce(jnp.add, scores))


def _resized(total: Array, rows: Weights, columns: Weights) -> Float[Array, "rows columns k"]:
  low, high = (jnp.take(total, i, axis=0) for i in (rows.low, rows.high))
  x = low * rows.of_low[:, None, None] + high * rows.of_high[:, None, None]
  low, high = (jnp.take(x, i, axis=1) for i in (columns.low, columns.high))
  return low * columns.of_low[None, :, None] + high * columns.of_high[None, :, None]


def joined(logits: Sequence[Float[Array, "*n k"]]) -> Float[Array, "*n k"]:
  """Returns the sum of the probabilities of several; of one its logits, whose largest is the same."""
  if len(logits) == 1:
    return logits[0]
  return functools.reduce(jnp.add, map(jax.nn.softmax, logits))


def classes(scores: Float[Array, "*n k"]) -> Integer[Array, "*n"]:
  """The class of the largest score; k, which is none, where one is not a number."""
  k = scores.shape[-1]
  best = jnp.where(jnp.isnan(scores.sum(-1)), k, jnp.argmax(scores, axis=-1))
  return best.astype(jnp.uint8 if k < 256 else jnp.int32)


def _weights(old: int, new: int, covered: Integer[np.ndarray, "old"]) -> Weights:
  """Bilinear, between the centres of pixels and without antialiasing; divided by how often a pixel is covered."""
  centre = np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1)
  low = np.floor(centre).astype(np.int32)
  high, share = np.minimum(low + 1, old - 1), centre - low
  of_low, of_high = (1 - share) / covered[low], share / covered[high]
  return Weights(low, high, of_low.astype(np.float32), of_high.astype(np.float32))


def _rounded(side: int) -> int:
  return -(-side // STEP) * STEP
