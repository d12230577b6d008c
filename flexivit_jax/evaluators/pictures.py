"""Samples of segmentation to look at, small: the first images of a data set, their masks, and what is predicted."""

import io
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Integer, UInt8
from PIL import Image

from flexivit_jax.data import class_colours, images
from flexivit_jax.specs import NO_CLASS

LONGEST = 400  # pixels of the longer side
_NONE = 255  # the value of no class, which is black


class Sample(NamedTuple):
  """An image in [-1, 1], its mask, and what is predicted by the name of the size."""

  image: Float[np.ndarray, "h w c"]
  mask: Integer[np.ndarray, "h w"]
  predicted: Mapping[str, Integer[np.ndarray, "h w"]]


def name_of(number: int, what: str) -> str:
  """Returns the name of a file: of `what` "image", "true", or the name of a size."""
  return f"{number}_{what.replace(' ', '_')}.{'jpg' if what == 'image' else 'png'}"


def files(number: int, sample: Sample) -> dict[str, bytes]:
  """Returns the files of a sample by name: a JPEG of the image, a PNG with a palette of each mask.

  Args:
    number: of the sample, from 0 up.
    sample: the sample.
  """
  hw = (sample.mask.shape[0], sample.mask.shape[1])
  masks = {"true": sample.mask, **sample.predicted}
  made = {
    name_of(number, what): _png(_small(mask, small_hw(hw, LONGEST))) for what, mask in masks.items()
  }
  image = images.resize_image(grey_levels(sample.image), small_hw(hw, LONGEST), "area")
  return {name_of(number, "image"): jpeg(image), **made}


def grey_levels(image: Float[np.ndarray, "h w c"]) -> UInt8[np.ndarray, "h w c"]:
  """Returns an image in [-1, 1] as bytes."""
  return np.clip((image + 1) * 127.5, 0, 255).round().astype(np.uint8)


def small_hw(hw: tuple[int, int], longest: int) -> tuple[int, int]:
  """Returns the size of an image whose longer side is made at most so many pixels."""
  factor = min(1.0, longest / max(hw))
  return max(1, round(hw[0] * factor)), max(1, round(hw[1] * factor))


def jpeg(image: UInt8[np.ndarray, "h w c"]) -> bytes:
  """Returns a file of a grey or RGB image."""
  return _encoded(Image.fromarray(image if image.shape[-1] == 3 else image[..., 0]), "JPEG")


def _small(mask: Integer[np.ndarray, "h w"], hw: tuple[int, int]) -> Integer[np.ndarray, "_ _"]:
  rows, columns = (np.arange(new) * old // new for old, new in zip(mask.shape, hw, strict=True))
  return mask[rows[:, None], columns[None]]


def _png(mask: Integer[np.ndarray, "h w"]) -> bytes:
  numbers = np.where(mask == NO_CLASS, _NONE, mask.astype(np.int64) % _NONE)
  image = Image.fromarray(numbers.astype(np.uint8))
  image.putpalette([*class_colours.palette()[: 3 * _NONE], 0, 0, 0])
  return _encoded(image, "PNG")


def _encoded(image: Image.Image, form: str) -> bytes:
  file = io.BytesIO()
  image.save(file, form, **({"quality": 85} if form == "JPEG" else {"optimize": True}))
  return file.getvalue()
