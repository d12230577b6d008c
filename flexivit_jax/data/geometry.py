"""Geometric operations: where the result of each lies in the image, as one affine map.

An operation is a function of the image's size, `hw`, and sees no pixels, but perhaps the mask. It
returns an `Affine`: a window that is cut out, resized and mirrored. `look` applies it to the image,
`annotations.follow` to the boxes and the mask of the same example, so that all three agree whatever
the operation.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Int32, Shaped

from flexivit_jax.data import images
from flexivit_jax.errors import UserError, unknown
from flexivit_jax.specs import NO_CLASS

Image = Shaped[np.ndarray, "h w c"]
Resized = Shaped[np.ndarray, "_ _ c"]  # Of another size, with the same channels.
ImageSize = tuple[int, int]  # Height, width.
PixelSize = int | tuple[int, int] | list[int]
Window = tuple[int, int, int, int]  # Top, left, height, width.
Fill = int | float | list[int] | list[float]


class Affine(NamedTuple):
  """An axis-aligned affine map: a window of the image, resized to `hw`, then mirrored if `flip`.

  A point goes from (x, y) to ((x - left) * hw[1] / width, (y - top) * hw[0] / height), and from there
  to (hw[1] - x, y) if `flip`. Points are in pixels from the upper left corner of the image.

  Attributes:
    window: (top, left, height, width) in pixels of the image; it may reach beyond the image.
    hw: pixels of the result.
    flip: whether left and right change places.
    method: resizes the image, see `images.resize_image`; masks take the nearest pixel.
    fill: the image's value beyond its edges, or one for each channel.
    ignore: the number of a class that pads the mask; None: no class, -1.
  """

  window: Window
  hw: ImageSize
  flip: bool = False
  method: str = "linear"
  fill: Fill = 0
  ignore: int | None = None


class Seen(NamedTuple):
  """What an operation returns that decodes only what it needs: the result, and the map that it shows.

  Attributes:
    image: the result.
    hw: pixels of the whole image.
    affine: the map from the whole image to the result.
  """

  image: Resized
  hw: ImageSize
  affine: Affine


def look(image: Image, affine: Affine) -> Resized:
  """Returns what an image looks like through the map."""
  window, hw, flip, method, fill, _ = affine
  if window != (0, 0, *image.shape[:2]):
    image = images.window(image, window, fill)
  if window[2:] != hw:
    image = images.resize_image(image, hw, method)
  return image[:, ::-1] if flip else image


# --- operations ---


def resize(hw: ImageSize, size: PixelSize, method: str = "linear") -> Affine:
  """Resizes both sides to `size` (an int squashes to a square). See `images.resize_image`."""
  return Affine((0, 0, *hw), _hw(size), method=method)


def resize_small(
  hw: ImageSize, size: int, method: str = "area", rounding: str = "nearest"
) -> Affine:
  """Resizes the shorter side to `size` pixels and keeps the aspect ratio.

  Args:
    hw: pixels of the image.
    size: pixels.
    method: see `images.resize_image`.
    rounding: of the longer side: "nearest", or "down" as torchvision's `Resize` and transformers do.
  """
  h, w = hw
  if _choice(rounding, "rounding", ("nearest", "down")) == "down":
    long = int(size * max(hw) / min(hw))
    return resize(hw, (size, long) if h <= w else (long, size), method)
  factor = size / min(hw)
  return resize(hw, (round(h * factor), round(w * factor)), method)


def resize_keep(hw: ImageSize, size: PixelSize, fit: str = "cover", method: str = "area") -> Affine:
  """Resizes to `size` and keeps the aspect ratio (sides are rounded), as timm's `ResizeKeepRatio` does.

  Args:
    hw: pixels of the image.
    size: pixels.
    fit: "cover": no side is shorter than `size`; "contain": none is longer.
    method: see `images.resize_image`.
  """
  ratios = [n / m for n, m in zip(hw, _hw(size), strict=True)]
  ratio = min(ratios) if _choice(fit, "fit", ("cover", "contain")) == "cover" else max(ratios)
  return resize(hw, [max(1, round(n / ratio)) for n in hw], method)


def scale_jitter(
  hw: ImageSize,
  short: int,
  ratio_min: float = 0.5,
  ratio_max: float = 2.0,
  long: int | None = None,
  method: str = "linear",
  *,
  rng: np.random.Generator,
) -> Affine:
  """Resizes the shorter side to `short` times a random ratio, and keeps the aspect ratio.

  Args:
    hw: pixels of the image.
    short: pixels of the shorter side at ratio 1.
    ratio_min, ratio_max: of the uniform ratio.
    long: pixels of the longer side at ratio 1 that are not exceeded, for long images; None: any number.
    method: see `images.resize_image`.

  Segmenter's data have short=512, long=2048 (ADE20k).
  """
  if not 0 < ratio_min <= ratio_max or short < 1 or (long is not None and long < short):
    raise UserError(
      f"scale_jitter(short={short}, ratio_min={ratio_min}, ratio_max={ratio_max}, long={long}); expected short >= 1,"
      " 0 < ratio_min <= ratio_max, long >= short."
    )
  factor = short / min(hw) if long is None else min(short / min(hw), long / max(hw))
  factor *= rng.uniform(ratio_min, ratio_max)
  return resize(hw, [max(1, round(n * factor)) for n in hw], method)


def central_crop(
  hw: ImageSize,
  size: PixelSize,
  half: str = "down",
  fill: int | list[int] | None = None,
  ignore: int | None = None,
) -> Affine:
  """Cuts the central `size`.

  Args:
    hw: pixels of the image.
    size: pixels.
    half: how an odd margin is divided. "down": the smaller half is above or left; "even": rounded to even, as in
      torchvision's `CenterCrop` and timm.
    fill: the value, or one for each channel, that pads an image that is too small; None: it is an error.
    ignore: the value that pads its mask, see `Affine`.
  """
  even = _choice(half, "half", ("down", "even")) == "even"
  size = _hw(size) if fill is not None else _fitting(hw, size)
  # Of padding, which is a negative margin, the smaller half is above or left in either case.
  top, left = (
    round(m / 2) if even and m > 0 else m // 2 if m > 0 else -(-m // 2)
    for m in (n - k for n, k in zip(hw, size, strict=True))
  )
  return Affine((top, left, *size), size, fill=0 if fill is None else fill, ignore=ignore)


def crop_border(hw: ImageSize, pixels: int) -> Affine:
  """Cuts `pixels` off each of the four sides."""
  if pixels < 0 or 2 * pixels >= min(hw):
    raise UserError(f"Cannot cut {pixels} off each side of {hw} pixels; expected 0 or more.")
  size = (hw[0] - 2 * pixels, hw[1] - 2 * pixels)
  return Affine((pixels, pixels, *size), size)


def random_crop(
  hw: ImageSize,
  size: PixelSize,
  padding: int = 0,
  ignore: int | None = None,
  *,
  rng: np.random.Generator,
) -> Affine:
  """Adds `padding` black pixels on each side (`ignore` in the mask), then cuts `size` at a uniform position."""
  if padding < 0:
    raise UserError(f"padding={padding}; expected 0 or more.")
  size = _fitting((hw[0] + 2 * padding, hw[1] + 2 * padding), size)
  top = int(rng.integers(hw[0] + 2 * padding - size[0] + 1)) - padding
  left = int(rng.integers(hw[1] + 2 * padding - size[1] + 1)) - padding
  return Affine((top, left, *size), size, ignore=ignore)


def balanced_crop(
  hw: ImageSize,
  size: PixelSize,
  cat_max_ratio: float = 0.75,
  tries: int = 10,
  *,
  mask: Int32[np.ndarray, "h w"] | None,
  rng: np.random.Generator,
) -> Affine:
  """Cuts `size`, or less where the image is smaller, at a random place that no class fills.

  A place is taken if more than one class is there and none has `cat_max_ratio` or more of the pixels that have a class.
  After `tries` others, the next place is taken whatever is there. Pad later, see `pad`: an image is not made larger.

  Args:
    hw: pixels of the image.
    size: pixels, at most.
    cat_max_ratio: see above; 1 asks for two classes.
    tries: number of places that are looked at.
    mask: of the image; None: it has none, which is an error.

  Source: Segmenter's data (arXiv 2105.05633), as mmsegmentation's RandomCrop makes them.
  """
  if mask is None:
    raise UserError("balanced_crop: the example has no mask; random_crop needs none.")
  if not 0 < cat_max_ratio <= 1 or tries < 1:
    raise UserError(
      f"balanced_crop(cat_max_ratio={cat_max_ratio}, tries={tries}); expected a share above 0, at most 1, and 1 or"
      " more."
    )
  h, w = (min(n, m) for n, m in zip(hw, _hw(size), strict=True))
  for left in range(tries, -1, -1):
    top, left_edge = int(rng.integers(hw[0] - h + 1)), int(rng.integers(hw[1] - w + 1))
    if not left or _balanced(mask[top : top + h, left_edge : left_edge + w], cat_max_ratio):
      break
  return Affine((top, left_edge, h, w), (h, w))


def _balanced(mask: Int32[np.ndarray, "h w"], cat_max_ratio: float) -> bool:
  counts = np.bincount(mask[mask != NO_CLASS])
  return bool(np.count_nonzero(counts) > 1 and counts.max() < cat_max_ratio * counts.sum())


def pad(
  hw: ImageSize,
  size: PixelSize | str | None = None,
  *,
  fill: Fill,
  multiple: int = 1,
  ignore: int | None = None,
) -> Affine:
  """Adds pixels below and on the right; boxes stay where they are.

  Args:
    hw: pixels of the image.
    size: pixels of the result; "square": the longer side's; None: the image's own.
    fill: the image's value there, or one for each channel, in the image's own range at this point.
    multiple: each side is rounded up to a multiple of it.
    ignore: the mask's value there, see `Affine`.

  Errors: a larger image.
  """
  if isinstance(size, str):
    _choice(size, "size of pad", ("square",))
    size = max(hw)
  if multiple < 1:
    raise UserError(f"pad(multiple={multiple}); expected 1 or more.")
  h, w = (-(-n // multiple) * multiple for n in (hw if size is None else _hw(size)))
  if h < hw[0] or w < hw[1]:
    raise UserError(f"Cannot pad {hw} to {(h, w)} pixels, which is smaller; resize or crop first.")
  return Affine((0, 0, h, w), (h, w), fill=fill, ignore=ignore)


def inception_crop(
  hw: ImageSize,
  size: PixelSize | None = None,
  area_min: float = 5,
  area_max: float = 100,
  ratio_min: float = 0.75,
  ratio_max: float = 1.33,
  method: str = "linear",
  *,
  rng: np.random.Generator,
) -> Affine:
  """Cuts a box of random area and aspect ratio and resizes it to `size` (None: not).

  Args:
    hw: pixels of the image.
    size: pixels of the result.
    area_min, area_max: of the box, percent of the image.
    ratio_min, ratio_max: width / height of the box.

  Distribution: that of `tf.image.sample_distorted_bounding_box`, the reference's: the ratio is
  uniform, then the height is uniform among those that the area allows; the whole image after 100
  failures (an image more extreme than the ratios allow).
  """
  window = _inception_window(hw, (area_min, area_max), (ratio_min, ratio_max), rng)
  return Affine(window, window[2:] if size is None else _hw(size), method=method)


def decode_inception_crop(
  encoded: bytes | Image,
  size: PixelSize,
  area_min: float = 5,
  area_max: float = 100,
  ratio_min: float = 0.75,
  ratio_max: float = 1.33,
  method: str = "linear",
  max_pixels: int = 2**26,
  *,
  exif: bool | None = None,
  bits: int = 16,
  rng: np.random.Generator,
) -> Seen:
  """`decode|inception_crop(size)` with the same boxes; a JPEG much larger than the result is not decoded in full.

  Where a box has two (four, eight) times the pixels of `size` a side, the file is decoded at half (a quarter, an
  eighth) of its size, which is faster, and its pixels are means: less aliasing than "linear" has. Elsewhere the result
  is that of the two operations, to the bit. See `images.decode_crop`.
  """
  drawn: list[tuple[ImageSize, Affine]] = []

  def draw(hw: ImageSize) -> Window:
    areas, ratios = (area_min, area_max), (ratio_min, ratio_max)
    drawn.append((hw, inception_crop(hw, size, *areas, *ratios, method, rng=rng)))
    return drawn[0][1].window

  if isinstance(encoded, np.ndarray):
    draw((encoded.shape[0], encoded.shape[1]))
    return Seen(look(encoded, drawn[0][1]), *drawn[0])
  cut = images.decode_crop(
    encoded, draw, _hw(size), max_pixels=max_pixels, exif=bool(exif), bits=bits
  )
  return Seen(images.resize_image(cut, _hw(size), method), *drawn[0])


def _inception_window(
  hw: ImageSize,
  areas: tuple[float, float],
  ratios: tuple[float, float],
  rng: np.random.Generator,
) -> Window:
  """Draws (top, left, height, width) in an image of `hw` pixels."""
  area = (areas[0] / 100 * hw[0] * hw[1], areas[1] / 100 * hw[0] * hw[1])
  boxes = (_draw_box(hw, area, rng.uniform(*ratios), rng) for _ in range(100))
  box = next(filter(None, boxes), hw)
  top, left = (int(rng.integers(n - m + 1)) for n, m in zip(hw, box, strict=True))
  return top, left, box[0], box[1]


def _draw_box(
  hw: ImageSize, area: tuple[float, float], ratio: float, rng: np.random.Generator
) -> ImageSize | None:
  """Draws (height, width) with width / height = `ratio` and an area in range; None: none fits."""
  low = round((area[0] / ratio) ** 0.5)
  high = min(round((area[1] / ratio) ** 0.5), hw[0], int((hw[1] + 0.499) / ratio))
  height = int(rng.integers(min(low, high), high + 1))
  width = round(height * ratio)
  fits = 0 < height <= hw[0] and 0 < width <= hw[1]
  # Rounding to pixels may leave the range by less than one row or column; that is no failure.
  return (height, width) if fits and height * width + max(height, width) >= area[0] else None


def flip_lr(hw: ImageSize, *, rng: np.random.Generator) -> Affine:
  """Mirrors left and right with probability one half."""
  return Affine((0, 0, *hw), hw, rng.random() < 0.5)


# --- arguments ---


def _hw(size: PixelSize) -> ImageSize:
  h, w = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
  if h < 1 or w < 1:
    raise UserError(f"A size of {(h, w)} pixels; expected 1 or more.")
  return h, w


def _choice(value: str, what: str, choices: tuple[str, ...]) -> str:
  if value not in choices:
    raise unknown(what, value, choices)
  return value


def _fitting(hw: ImageSize, size: PixelSize) -> ImageSize:
  h, w = _hw(size)
  if h > hw[0] or w > hw[1]:
    raise UserError(f"Cannot crop {(h, w)} out of {hw} pixels; resize first or pad.")
  return h, w
