"""RandAugment (arXiv 1909.13719) on uint8 RGB images.

The operations, ranges and constants are those of the AutoAugment code that big_vision uses; they
were made for images of about 224 pixels (translations and cut-outs are in pixels). Deviations:
grey values are Pillow's rounding instead of truncation; `Contrast` turns about the mean grey
(there about pixels / 256, a slip); geometry is nearest neighbour about Pillow's pixel centres.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Shaped, UInt8
from PIL import Image, ImageEnhance, ImageOps

from flexivit_jax.errors import UserError

_GREY = (128, 128, 128)  # Fills what geometry uncovers.

Draw = np.random.Generator
Transform = Callable[[Image.Image, float, Draw], Image.Image]


def randaug(
  image: Shaped[np.ndarray, "h w c"],
  num_layers: int,
  magnitude: float,
  geometry: bool = True,
  *,
  rng: Draw,
) -> UInt8[np.ndarray, "h w c"]:
  """Applies `num_layers` operations drawn uniformly, each of strength `magnitude` / 10.

  Args:
    image: uint8 RGB.
    num_layers: N in the paper.
    magnitude: M in the paper, 0..10.
    geometry: False: of the operations those on colours alone, ten of 16. Needed where examples have boxes or a mask,
      which could not follow a rotation.
  """
  if image.dtype != np.uint8 or image.shape[-1] != 3:
    raise UserError(f"randaug expects uint8 [h, w, 3], got {image.dtype} {list(image.shape)}.")
  if not 0 <= magnitude <= 10:
    raise UserError(f"randaug magnitude is {magnitude}; expected 0..10.")
  pillow = Image.fromarray(np.ascontiguousarray(image))
  transforms = [t for name, t in TRANSFORMS.items() if geometry or name not in _GEOMETRIC]
  for index in rng.integers(len(transforms), size=num_layers):
    pillow = transforms[index](pillow, magnitude / 10, rng)
  return np.asarray(pillow)


def _sign(rng: Draw) -> int:
  return 1 if rng.random() < 0.5 else -1


def _affine(image: Image.Image, matrix: tuple[float, ...]) -> Image.Image:
  return image.transform(image.size, Image.Transform.AFFINE, matrix, fillcolor=_GREY)


def _rotate(image: Image.Image, strength: float, rng: Draw) -> Image.Image:
  return image.rotate(_sign(rng) * 30 * strength, fillcolor=_GREY)


def _shear_x(image: Image.Image, strength: float, rng: Draw) -> Image.Image:
  return _affine(image, (1, _sign(rng) * 0.3 * strength, 0, 0, 1, 0))


def _shear_y(image: Image.Image, strength: float, rng: Draw) -> Image.Image:
  return _affine(image, (1, 0, 0, _sign(rng) * 0.3 * strength, 1, 0))


def _translate_x(image: Image.Image, strength: float, rng: Draw) -> Image.Image:
  return _affine(image, (1, 0, _sign(rng) * 100 * strength, 0, 1, 0))


def _translate_y(image: Image.Image, strength: float, rng: Draw) -> Image.Image:
  return _affine(image, (1, 0, 0, 0, 1, _sign(rng) * 100 * strength))


def _posterize(image: Image.Image, strength: float, rng: Draw) -> Image.Image:
  keep_bits = int(4 * strength)
  high = (0xFF << (8 - keep_bits)) & 0xFF  # Pillow refuses 0 bits, which is black.
  return image.point([value & high for value in range(256)] * 3)


def _solarize(image: Image.Image, strength: float, rng: Draw) -> Image.Image:
  return ImageOps.solarize(image, int(256 * strength))


def _solarize_add(image: Image.Image, strength: float, rng: Draw) -> Image.Image:
  add = int(110 * strength)
  return image.point([min(255, v + add) if v < 128 else v for v in range(256)] * 3)


def _cutout(image: Image.Image, strength: float, rng: Draw) -> Image.Image:
  """Paints a square of `80 * strength` pixels, clipped, about a uniform centre."""
  half = int(40 * strength)
  pixels = np.array(image)
  y, x = (int(rng.integers(n)) for n in pixels.shape[:2])
  pixels[max(0, y - half) : y + half, max(0, x - half) : x + half] = _GREY
  return Image.fromarray(pixels)


def _enhance(enhancer: type) -> Transform:
  """Blends with a degenerate image by 0.1 (nearly that image) to 1.9 (away from it); 0.5 of the
  way is `1.0`, no change."""
  return lambda image, strength, rng: enhancer(image).enhance(0.1 + 1.8 * strength)


TRANSFORMS: dict[str, Transform] = {
  "AutoContrast": lambda image, strength, rng: ImageOps.autocontrast(image),
  "Equalize": lambda image, strength, rng: ImageOps.equalize(image),
  "Invert": lambda image, strength, rng: ImageOps.invert(image),
  "Rotate": _rotate,
  "Posterize": _posterize,
  "Solarize": _solarize,
  "Color": _enhance(ImageEnhance.Color),
  "Contrast": _enhance(ImageEnhance.Contrast),
  "Brightness": _enhance(ImageEnhance.Brightness),
  "Sharpness": _enhance(ImageEnhance.Sharpness),
  "ShearX": _shear_x,
  "ShearY": _shear_y,
  "TranslateX": _translate_x,
  "TranslateY": _translate_y,
  "Cutout": _cutout,
  "SolarizeAdd": _solarize_add,
}
# A cut-out moves nothing, but it hides what boxes and mask still show.
_GEOMETRIC = frozenset(("Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY", "Cutout"))
