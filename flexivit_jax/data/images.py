"""Images as arrays: decoding bytes and changing sizes, with Pillow and OpenCV."""

import contextlib
import functools
import io
from collections.abc import Callable

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError

from flexivit_jax.errors import UserError, unknown

cv2.setNumThreads(0)  # The loader's threads are the parallelism; a pool inside each would thrash.

_INTERPOLATION = {"linear": cv2.INTER_LINEAR, "area": cv2.INTER_AREA}
_METHODS = (*_INTERPOLATION, "cubic")
# What Pillow knows by a suffix and no folder of images means by it: documents, films, measurements, textures.
_NO_IMAGES = frozenset(
  ("BUFR", "EPS", "FITS", "FLI", "FTEX", "GRIB", "HDF5", "IPTC", "MPEG", "PALM", "PDF", "WMF")
)
HEIF_SUFFIXES = (".heic", ".heif", ".hif")


@functools.cache
def suffixes() -> frozenset[str]:
  """Suffixes of the files that are read as images, in lower case: what this Pillow reads, and HEIC with pillow-heif."""
  with contextlib.suppress(ImportError):
    import pillow_heif  # Not among our dependencies: its codecs are heavy.

    pillow_heif.register_heif_opener()
  known = Image.registered_extensions()
  readable = {"MPO", *Image.OPEN} - _NO_IMAGES
  return frozenset(s for s, name in known.items() if name in readable and s != ".pfm")  # floats


def shown_suffixes() -> str:
  """The usual ones of `suffixes`, for messages."""
  usual = (
    ".jpg",
    ".jpeg",
    ".png",
    ".webp",
    ".avif",
    ".bmp",
    ".gif",
    ".tif",
    ".tiff",
    ".jp2",
    ".heic",
  )
  return f"{' '.join(s for s in usual if s in suffixes())} and others"


def decode_image(data: bytes, *, max_pixels: int) -> np.ndarray:
  """Decodes JPEG, PNG, WebP, BMP, GIF (first frame), ... into RGB uint8 [h, w, 3].

  Grey, palette, CMYK become RGB. 16-bit grey is scaled to 8 (`round(v / 257)`), not clipped. An
  alpha channel is dropped (the stored colours stay, as `tf.io.decode_image(channels=3)` does).
  EXIF orientation is not applied (as there). Truncated files are errors.

  Args:
    data: the file.
    max_pixels: of the header, above which nothing is decoded (it may be a decompression bomb).

  Raises:
    UserError: more than `max_pixels`.
    OSError, SyntaxError, ValueError: Pillow's, for what is not an image or is damaged.
  """
  with _open(data) as image:
    _check_pixels(image, max_pixels)
    return _to_rgb(image)


def decode_crop(
  data: bytes,
  draw: Callable[[tuple[int, int]], tuple[int, int, int, int]],
  hw: tuple[int, int],
  *,
  max_pixels: int,
) -> np.ndarray:
  """Decodes a box of an image, a JPEG at the smallest scale that still has `hw` pixels in the box.

  JPEG's transform gives 1/2, 1/4 and 1/8 of the size for less work than the whole; the pixels are then means of those
  of the file. Other formats are decoded whole, and so are JPEGs that are not grey or RGB.

  Args:
    data: the file.
    draw: (height, width) of the image -> (top, left, height, width) of the box in it.
    hw: pixels that are wanted of the box.
    max_pixels: see `decode_image`, also for the errors.

  Returns:
    RGB uint8 [h, w, 3] of the box, which has at least `hw` pixels where the file has them.
  """
  with _open(data) as image:
    _check_pixels(image, max_pixels)
    width, height = image.size
    top, left, h, w = draw((height, width))
    if image.format != "JPEG" or image.mode not in ("L", "RGB"):
      return crop(_to_rgb(image), top, left, (h, w))
    scale = next((s for s in (8, 4, 2) if h >= s * hw[0] and w >= s * hw[1]), 1)
    if scale > 1:
      image.draft(image.mode, (width // scale, height // scale))  # at least so large
    whole = _to_rgb(image)
    rows, columns = whole.shape[0] / height, whole.shape[1] / width  # 1, or nearly 1 / scale
    top, h, left, w = round(top * rows), round(h * rows), round(left * columns), round(w * columns)
    return crop(whole, min(top, whole.shape[0] - h), min(left, whole.shape[1] - w), (h, w))


def _check_pixels(image: Image.Image, max_pixels: int) -> None:
  width, height = image.size
  if width * height > max_pixels:
    raise UserError(
      f"Image header says {width}x{height} pixels, more than max_pixels={max_pixels}."
    )


def _open(data: bytes) -> Image.Image:
  try:
    return Image.open(io.BytesIO(data))
  except UnidentifiedImageError:  # Pillow's message names an object in memory.
    raise ValueError(f"no known image format: {len(data)} bytes, first {data[:8]!r}") from None


def _to_rgb(image: Image.Image) -> np.ndarray:
  if image.mode == "RGB":
    return np.asarray(image)
  if image.mode.startswith("I;16") or image.mode == "I":
    grey = np.asarray(image).astype(np.float64)
    return _grey_to_rgb(np.rint(grey / 257))
  if image.mode == "F":
    raise ValueError("floating point images have no defined range; expected 8 or 16 bits a channel")
  if image.mode in ("P", "PA") or "transparency" in image.info:
    image = image.convert("RGBA")  # Palettes with transparency convert cleanly only by this way.
  if image.mode in ("RGBA", "LA", "La", "RGBa"):
    return np.ascontiguousarray(np.asarray(image.convert("RGBA"))[..., :3])
  return np.asarray(image.convert("RGB"))


def _grey_to_rgb(grey: np.ndarray) -> np.ndarray:
  if grey.min() < 0 or grey.max() > 255:
    raise ValueError(f"grey values {grey.min()}..{grey.max()} do not fit 16 bits")
  return np.repeat(grey.astype(np.uint8)[..., None], 3, axis=-1)


def resize_image(image: np.ndarray, hw: tuple[int, int], method: str = "linear") -> np.ndarray:
  """Resizes [h, w, c] to `hw` with half-pixel centres; keeps the dtype. No antialias but in "cubic".

  "linear" samples 2 x 2 neighbours whatever the scale; "area" averages what an output pixel
  covers, and is "linear" where an axis grows; "cubic" is Keys' with a = -0.5, antialiased, as in
  Pillow and timm (for their models; several times slower). Deviation from
  `tf.image.resize`: that computes in float32 and big_vision truncates to uint8; here uint8 images
  are computed in fixed point and rounded, within 1 grey level of the exact value.
  """
  h, w = hw
  if image.shape[:2] == (h, w):
    return image
  if method not in _METHODS:
    raise unknown("resize method", method, _METHODS)
  if method == "cubic":
    return _cubic(image, hw)
  grows = h > image.shape[0] or w > image.shape[1]
  resized = cv2.resize(image, (w, h), interpolation=_INTERPOLATION["linear" if grows else method])
  return resized.reshape(h, w, image.shape[2])  # OpenCV drops a channel axis of length 1.


def _cubic(image: np.ndarray, hw: tuple[int, int]) -> np.ndarray:
  if image.dtype == np.uint8 and image.shape[2] == 3:  # Pillow's own takes a twentieth of the time
    resized = Image.fromarray(image).resize(hw[::-1], Image.Resampling.BICUBIC)
    return np.asarray(resized)
  from flexivit_jax.resize import resize_matrix  # Imports JAX, which loader processes do without.

  rows, columns = (
    resize_matrix(o, n, "cubic_antialias").astype(np.float32)
    for o, n in zip(image.shape[:2], hw, strict=True)
  )
  out = np.matmul(columns[None], np.tensordot(rows, image.astype(np.float32), axes=1))
  return np.clip(np.rint(out), 0, 255).astype(np.uint8) if image.dtype == np.uint8 else out


def crop(image: np.ndarray, top: int, left: int, hw: tuple[int, int]) -> np.ndarray:
  """Cuts the window at (top, left) of size `hw` out of [h, w, c]."""
  return image[top : top + hw[0], left : left + hw[1]]


def pad_image(image: np.ndarray, padding: int, value: int = 0) -> np.ndarray:
  """Adds `padding` pixels of `value` on every side of [h, w, c]."""
  h, w, c = image.shape
  out = np.full((h + 2 * padding, w + 2 * padding, c), value, image.dtype)
  out[padding : padding + h, padding : padding + w] = image
  return out
