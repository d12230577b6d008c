"""Photometric distortion of uint8 RGB images: brightness, contrast, saturation and hue, each at random."""

import numpy as np
from jaxtyping import Float32, Shaped, UInt8
from PIL import Image

from flexivit_jax.errors import UserError


def photometric_distortion(
  image: Shaped[np.ndarray, "h w c"],
  brightness: float = 32,
  contrast: float = 0.5,
  saturation: float = 0.5,
  hue: float = 36,
  *,
  rng: np.random.Generator,
) -> UInt8[np.ndarray, "h w c"]:
  """Changes each of four things with probability one half; pixels do not move.

  The order is brightness, contrast, saturation, hue, or, with probability one half, contrast last. The defaults are
  those of SSD (arXiv 1512.02325) as Segmenter's data have them.

  Args:
    image: uint8 RGB.
    brightness: grey levels that are added, drawn from -brightness to +brightness.
    contrast, saturation: a factor is drawn from 1 - x to 1 + x, for all values; for the saturation (HSV).
    hue: degrees of the circle of colours, drawn from -hue to +hue.
    rng: what is drawn depends on nothing else; as many numbers for every image.

  Errors: another image; a strength out of range.
  """
  if image.dtype != np.uint8 or image.shape[-1] != 3:
    raise UserError(
      f"photometric_distortion expects uint8 [h, w, 3], got {image.dtype} {list(image.shape)}."
    )
  given = {"brightness": brightness, "contrast": contrast, "saturation": saturation, "hue": hue}
  limits = {"brightness": 255, "contrast": 1, "saturation": 1, "hue": 180}
  for name, value in given.items():
    if not 0 <= value <= limits[name]:
      raise UserError(f"photometric_distortion({name}={value}); expected 0 to {limits[name]}.")
  strengths = rng.uniform(-1, 1, 4) * list(given.values()) * (rng.random(4) < 0.5)
  add, stretch, colour, turn = strengths.tolist()
  last = rng.random() < 0.5
  if add:
    image = _rounded(image + np.float32(add))
  if stretch and not last:
    image = _rounded(image * np.float32(1 + stretch))
  if colour or turn:
    image = _in_hsv(image, 1 + colour, turn / 360)
  if stretch and last:
    image = _rounded(image * np.float32(1 + stretch))
  return image


def _in_hsv(
  image: UInt8[np.ndarray, "h w 3"], factor: float, turn: float
) -> UInt8[np.ndarray, "h w 3"]:
  """Multiplies the saturation, and turns the hue by this part of the circle."""
  hsv = np.array(Image.fromarray(np.ascontiguousarray(image)).convert("HSV"))
  hsv[..., 0] += np.uint8(round(turn * 256) % 256)  # the circle has 256 steps, so 255 + 1 is 0
  hsv[..., 1] = _rounded(hsv[..., 1] * np.float32(factor))
  return np.asarray(Image.fromarray(hsv, "HSV").convert("RGB"))


def _rounded(values: Float32[np.ndarray, "..."]) -> UInt8[np.ndarray, "..."]:
  return np.clip(np.rint(values), 0, 255).astype(np.uint8)
