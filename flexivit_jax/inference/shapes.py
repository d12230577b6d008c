"""The one shape to which images are prepared, tried with two that are not square."""

import io
from collections.abc import Callable

import numpy as np
from PIL import Image

from flexivit_jax import errors
from flexivit_jax.trees import Json


def common(prepare: Callable[[bytes], np.ndarray], name: str) -> tuple[int, int, int]:
  """Returns height, width and channels of every image that `prepare` gives.

  Args:
    prepare: makes an array [h, w, c] of the bytes of an image file.
    name: of the model, for the error.

  Raises:
    UserError: a wide and a high image get shapes of their own.
  """
  shapes = {prepare(_png(*hw)).shape for hw in ((48, 64), (80, 64))}
  if len(shapes) > 1:
    raise errors.UserError(
      f"{name} prepares images to shapes of their own, {sorted(shapes)}; one shape is needed here. Give the checkpoint"
      " a preparation that resizes to one."
    )
  height, width, channels = shapes.pop()
  return height, width, channels


def of_training(
  prepare: Callable[[bytes], np.ndarray], record: Json, name: str
) -> tuple[int, int, int]:
  """Returns the shape that an image with the sides of those of the training gets.

  Args:
    prepare: as of `common`.
    record: of the model.
    name: of the model, for the error.

  Raises:
    UserError: the model does not say how large its images were.
  """
  sides = record.get("image_shape") or record.get("image_size")
  if not sides:
    raise errors.UserError(
      f"{name} does not say how large the images of its training were; one shape is needed here."
    )
  height, width = sides[:2]
  height, width, channels = prepare(_png(int(height), int(width))).shape
  return height, width, channels


def _png(height: int, width: int) -> bytes:
  buffer = io.BytesIO()
  Image.new("RGB", (width, height)).save(buffer, "PNG")
  return buffer.getvalue()
