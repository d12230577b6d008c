"""How much a predicted mask overlaps with the true one: counts of pixels by class, and the metrics that they give.

Counts of all images are added before anything is divided: the metrics are those of one confusion matrix of the whole
data set, not means over images. A pixel of no class (`NO_CLASS`) counts for nothing, whatever is predicted there.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Integer

from flexivit_jax import errors
from flexivit_jax.specs import NO_CLASS

# Columns of `counts`: pixels that are of the class in both masks, in the true one, in the predicted one; then the same
# in bands along the contours.
BOTH, TRUE, PREDICTED = 0, 1, 2
REGIONS, BANDS = slice(0, 3), slice(3, 6)


class Truth(NamedTuple):
  """The true mask of an image, and what is counted of it once for all predictions.

  Attributes:
    mask: classes, and NO_CLASS.
    band: where it is near a contour, see `contour_band`.
    num_classes: number of classes.
    width: of the band, in pixels.
  """

  mask: Int[np.ndarray, "h w"]
  band: Bool[np.ndarray, "h w"]
  num_classes: int
  width: int


def truth(mask: Integer[np.ndarray, "h w"], num_classes: int, band: float) -> Truth:
  """Returns the truth of a mask.

  Args:
    mask: classes, and NO_CLASS.
    num_classes: number of classes.
    band: width of the band along contours: pixels, or below 1 a share of the diagonal, of which there is at least one.

  Raises:
    UserError: numbers that are neither a class nor NO_CLASS.
  """
  lowest, highest = int(mask.min()), int(mask.max())
  if lowest < NO_CLASS or highest >= num_classes:
    numbers = np.unique(mask)
    others = numbers[(numbers < NO_CLASS) | (numbers >= num_classes)].tolist()
    raise errors.UserError(
      f"A mask has the numbers {', '.join(map(str, others[:9]))}; expected classes 0 to {num_classes - 1}, or"
      f" {NO_CLASS} for none. Say in data which value counts for no class (ignore=), or give the model's classes."
    )
  width = round(band * np.hypot(*mask.shape)) if band < 1 else int(band)
  mask, width = mask.astype(np.int64), max(1, width)
  return Truth(mask, contour_band(mask, width), num_classes, width)


def counts(true: Truth, predicted: Integer[np.ndarray, "h w"]) -> Int[np.ndarray, "k 6"]:
  """Counts the pixels of each class; see `BOTH` and what follows it.

  Args:
    true: the truth of the image.
    predicted: classes; a number of no class is wrong wherever it stands.
  """
  k, known = true.num_classes, true.mask != NO_CLASS
  classes = np.where((predicted < 0) | (predicted >= k), k, predicted)
  mask = np.where(known, classes, NO_CLASS).astype(np.int64)
  bands = true.band, contour_band(mask, true.width)
  near = true.mask[bands[0] & bands[1] & (true.mask == mask)], true.mask[bands[0]], mask[bands[1]]
  in_bands = [np.bincount(classes, minlength=k + 1)[:k] for classes in near]
  return np.concatenate([regions(true, mask), np.stack(in_bands, axis=1)], axis=1)


def regions(true: Truth, predicted: Integer[np.ndarray, "h w"]) -> Int[np.ndarray, "k 3"]:
  """As `counts`, without the bands."""
  k, known = true.num_classes, true.mask != NO_CLASS
  of, here = true.mask[known], predicted[known].astype(np.int64)
  here = np.where((here < 0) | (here >= k), k, here)
  pairs = np.bincount(of * (k + 1) + here, minlength=k * (k + 1)).reshape(k, k + 1)
  return np.stack([np.diagonal(pairs), pairs.sum(1), pairs[:, :k].sum(0)], axis=1)


def contour_band(mask: Int[np.ndarray, "h w"], width: int) -> Bool[np.ndarray, "h w"]:
  """Returns which pixels have another class, or the edge of the image, at most `width` pixels away.

  Distances are those of a square (the larger of rows and columns), which repeated erosion by 3 x 3 pixels gives: the
  pixels of a class here are its mask without the eroded one. Pixels of no class make no contour. Source: boundary IoU,
  arXiv 2103.16562.
  """
  known, top = mask != NO_CLASS, int(mask.max()) + 1
  small = np.min_scalar_type(top)  # bytes, mostly: an eighth of the time
  highest = np.where(known, mask, 0).astype(small)
  lowest = np.where(known, mask, top).astype(small)
  for axis in (0, 1):
    highest = _extreme(highest, width, axis, np.maximum, top)  # beyond the edge is another class
    lowest = _extreme(lowest, width, axis, np.minimum, top)
  return known & ((highest != mask) | (lowest != mask))


def _extreme(
  x: Integer[np.ndarray, "h w"],
  width: int,
  axis: int,
  extreme: Callable[..., np.ndarray],
  outside: int,
) -> Integer[np.ndarray, "h w"]:
  """The extreme of the 2 * width + 1 pixels around each one along an axis; what is outside has one value."""
  padding = [(0, 0), (0, 0)]
  padding[axis] = (width, width)
  x = np.moveaxis(np.pad(x, padding, constant_values=outside), axis, 0)
  length, wanted = 1, 2 * width + 1
  while length < wanted:  # of two overlapping windows
    step = min(length, wanted - length)
    x, length = extreme(x[:-step], x[step:]), length + step
  return np.moveaxis(x, 0, axis)


# --- metrics, of counts [r, k, 3] or their means: as `resampling.Resampled` ---


def iou_of_classes(counts: Float[np.ndarray, "r k 3"]) -> Float[np.ndarray, "r k"]:
  """Intersection over union of each class; NaN where the class has no pixel in the true masks."""
  both, true, predicted = np.moveaxis(counts, -1, 0)
  return np.where(true > 0, both / np.maximum(true + predicted - both, _LEAST), np.nan)


def mean_iou(counts: Float[np.ndarray, "r k 3"]) -> Float[np.ndarray, "r"]:
  """The mean over the classes that the true masks have."""
  return _mean(iou_of_classes(counts))


def mean_accuracy(counts: Float[np.ndarray, "r k 3"]) -> Float[np.ndarray, "r"]:
  """The share of the pixels of a class that are predicted to be of it; the mean over the classes that there are."""
  both, true = counts[..., BOTH], counts[..., TRUE]
  return _mean(np.where(true > 0, both / np.maximum(true, _LEAST), np.nan))


def pixel_accuracy(counts: Float[np.ndarray, "r k 3"]) -> Float[np.ndarray, "r"]:
  """The share of the pixels that are right."""
  total = counts.sum(axis=1)
  return total[:, BOTH] / np.maximum(total[:, TRUE], _LEAST)


_LEAST = 1e-12  # means over images are multiples of 1 / n


def _mean(values: Float[np.ndarray, "r k"]) -> Float[np.ndarray, "r"]:
  there = ~np.isnan(values)
  return np.where(there, values, 0.0).sum(1) / np.maximum(there.sum(1), 1)
