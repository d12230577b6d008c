"""Images as arrays: decoding bytes and changing sizes, with Pillow and OpenCV."""

import contextlib
import contextvars
import functools
import io
import logging
import sys
from collections.abc import Callable, Iterator
from typing import Any

import cv2
import numpy as np
from jaxtyping import Int32, Integer, UInt8
from PIL import Image, UnidentifiedImageError

from flexivit_jax.errors import UserError, unknown

cv2.setNumThreads(0)  # The loader's threads are the parallelism; a pool inside each would thrash.

_LOG = logging.getLogger(__name__)
_INTERPOLATION = {"linear": cv2.INTER_LINEAR, "area": cv2.INTER_AREA}
# Pillow's filters. timm and transformers name them by these words, and by these numbers.
PILLOW = {f"pil_{f.name.lower()}": f for f in sorted(Image.Resampling)}
_METHODS = (*_INTERPOLATION, "cubic", *PILLOW)
# Formats that Pillow reads but image folders do not contain: documents, films, measurements, textures.
_NO_IMAGES = frozenset(
  ("BUFR", "EPS", "FITS", "FLI", "FTEX", "GRIB", "HDF5", "IPTC", "MPEG", "PALM", "PDF", "WMF")
)
_HEIF_BRANDS = (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1")
_ORIENTATION = 0x0112  # EXIF's tag
# EXIF's orientation -> what makes the image upright.
_TURNS: dict[int, Callable[[np.ndarray], np.ndarray]] = {
  1: lambda a: a,
  2: lambda a: cv2.flip(a, 1),
  3: lambda a: cv2.rotate(a, cv2.ROTATE_180),
  4: lambda a: cv2.flip(a, 0),
  5: cv2.transpose,
  6: lambda a: cv2.rotate(a, cv2.ROTATE_90_CLOCKWISE),
  7: lambda a: cv2.rotate(cv2.transpose(a), cv2.ROTATE_180),
  8: lambda a: cv2.rotate(a, cv2.ROTATE_90_COUNTERCLOCKWISE),
}
SIDEWAYS = (5, 6, 7, 8)
HEIF_SUFFIXES = (".heic", ".heif", ".hif")


@functools.cache
def suffixes() -> frozenset[str]:
  """Returns the suffixes of image files, in lower case: what this Pillow reads, and HEIC with pillow-heif."""
  with contextlib.suppress(ImportError):
    import pillow_heif  # Not among our dependencies: its codecs are heavy.

    pillow_heif.register_heif_opener()
  registered = Image.registered_extensions()
  readable = {"MPO", *Image.OPEN} - _NO_IMAGES
  return frozenset(
    s for s, name in registered.items() if name in readable and s != ".pfm"
  )  # floats


def shown_suffixes() -> str:
  """Returns the usual ones of `suffixes`, for messages."""
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


_NOTICED: contextvars.ContextVar[list[str] | None] = contextvars.ContextVar("noticed", default=None)
_NOT_TURNED = (
  "EXIF data say that the image is to be turned, and it is not, as in published evaluations; decode(exif=True) in pp"
  " turns it"
)
_DARK_GREY = (
  "an image of 16 bits uses only values below 4096 of 65536, and is nearly black so; if its values are of 12 bits,"
  " decode(bits=12) in pp scales them"
)
_DARK_COLOUR = (
  "a colour image of 16 bits uses only values below 4096 of 65536, and is nearly black so; write its files anew, scaled"
  " to all 16 bits or to 8"
)


@contextlib.contextmanager
def noticing() -> Iterator[list[str]]:
  """Collects warnings about the images that are decoded inside; outside they are logged, once each."""
  texts: list[str] = []
  token = _NOTICED.set(texts)
  try:
    yield texts
  finally:
    _NOTICED.reset(token)


def notice(text: str) -> None:
  """Gives a warning about the image that is being decoded, see `noticing`."""
  texts = _NOTICED.get()
  if texts is None:
    _warn(text)
  else:
    texts.append(text)


@functools.cache
def _warn(text: str) -> None:
  _LOG.warning("%s", text)


def decode_image(
  data: bytes, *, max_pixels: int, exif: bool = False, bits: int = 16
) -> UInt8[np.ndarray, "h w 3"]:
  """Decodes JPEG, PNG, WebP, BMP, GIF (first frame), ... into RGB.

  Grey, palette, CMYK become RGB. 16-bit grey is scaled to 8 (`round(v / 257)`), not clipped. An
  alpha channel is dropped (the stored colours stay, as `tf.io.decode_image(channels=3)` does).
  Truncated files are errors.

  Args:
    data: the file.
    max_pixels: the largest size by the header that is decoded (a file may be a decompression bomb).
    exif: rotates and mirrors the image as its EXIF orientation says; `tf.io.decode_image` does not. TIFF always is.
    bits: significant bits of grey values in a file of 16 bits; 12 scales 4095 to white.

  Raises:
    UserError: more than `max_pixels`.
    OSError, SyntaxError, ValueError: the file is damaged or not an image.
  """
  _check_bits(bits)
  with _open(data, max_pixels) as image:
    return _turn(_to_rgb(image, bits), image, exif)


def decode_mask(data: bytes, *, max_pixels: int) -> Int32[np.ndarray, "h w"]:
  """Decodes a PNG of class numbers: the indices of a palette, or grey values of 1 to 16 bits as they are stored.

  Raises:
    UserError: more than `max_pixels`; a file of colours, or of a format that may change numbers.
    OSError, SyntaxError, ValueError: the file is damaged or not an image.
  """
  with _open(data, max_pixels) as image:
    if image.format != "PNG" or image.mode not in ("1", "L", "P", "I;16", "I"):
      raise UserError(
        f"a mask as {image.format} of mode {image.mode}; expected a PNG with a palette or in grey, whose values are the"
        " numbers of classes"
      )
    raw = str(vars(image)["tile"][0][3])  # Pillow scales grey of 2 and 4 bits to 0..255.
    numbers = np.asarray(image).astype(np.int32)
    return numbers // {"L;2": 85, "L;4": 17}.get(raw, 1)


def decode_mask_colors(data: bytes, *, max_pixels: int) -> Int32[np.ndarray, "h w"]:
  """Decodes a PNG of a mask into colours 0xRRGGBB; indices of a palette become its colours.

  Raises:
    UserError: more than `max_pixels`; a file of another format, which may change colours.
    OSError, SyntaxError, ValueError: the file is damaged or not an image.
  """
  with _open(data, max_pixels) as image:
    if image.format != "PNG":
      raise UserError(f"a mask as {image.format}; expected a PNG, which keeps colours as they are")
    red, green, blue = np.moveaxis(np.asarray(image.convert("RGB")).astype(np.int32), -1, 0)
    return red << 16 | green << 8 | blue


def decode_crop(
  data: bytes,
  draw: Callable[[tuple[int, int]], tuple[int, int, int, int]],
  hw: tuple[int, int],
  *,
  max_pixels: int,
  exif: bool = False,
  bits: int = 16,
) -> UInt8[np.ndarray, "h w 3"]:
  """Decodes a box of an image; a JPEG at the smallest scale that still has `hw` pixels in the box.

  JPEG decodes to 1/2, 1/4 and 1/8 of the size for less work; the pixels are then means of the stored ones. Other
  formats, and JPEGs that are not grey or RGB, are decoded in full.

  Args:
    data: the file.
    draw: (height, width) of the image, rotated if `exif`, -> (top, left, height, width) of the box in it.
    hw: the pixels that the box needs.
    max_pixels, exif, bits: see `decode_image`, also for the errors.

  Returns:
    the box, with at least `hw` pixels if the file has them.
  """
  _check_bits(bits)
  with _open(data, max_pixels) as image:
    if image.format != "JPEG" or image.mode not in ("L", "RGB"):
      whole = _turn(_to_rgb(image, bits), image, exif)
      top, left, h, w = draw((whole.shape[0], whole.shape[1]))
      return crop(whole, top, left, (h, w))
    height, width = image.size[::-1]
    if exif and _orientation(image) in SIDEWAYS:
      height, width = width, height
    top, left, h, w = draw((height, width))
    scale = next((s for s in (8, 4, 2) if h >= s * hw[0] and w >= s * hw[1]), 1)
    if scale > 1:
      stored = image.size
      image.draft(image.mode, (stored[0] // scale, stored[1] // scale))  # at least so large
    whole = _turn(_to_rgb(image, bits), image, exif)
    rows, columns = whole.shape[0] / height, whole.shape[1] / width  # 1, or nearly 1 / scale
    top, h, left, w = round(top * rows), round(h * rows), round(left * columns), round(w * columns)
    return crop(whole, min(top, whole.shape[0] - h), min(left, whole.shape[1] - w), (h, w))


def header_hw(data: bytes, *, exif: bool = False) -> tuple[int, int]:
  """Returns (h, w) of the image that `decode_image` would return, by the header alone; no pixel is decoded.

  Args:
    data: the file.
    exif: as of `decode_image`.

  Raises:
    UserError, OSError, SyntaxError, ValueError: as `decode_image`, where the header is damaged.
  """
  with _open(data, sys.maxsize) as image:
    width, height = image.size
    # Pillow states the size of a TIFF as it will be turned.
    turned = exif and image.format != "TIFF" and _orientation(image) in SIDEWAYS
    return (width, height) if turned else (height, width)


def check_photo(data: bytes, *, max_pixels: int) -> None:
  """Checks a file of a stranger by its header alone: no pixel is decoded, and no document is run.

  Raises:
    UserError: more than `max_pixels`; a document, a film or a measurement, which Pillow reads by programs of others.
    OSError, SyntaxError, ValueError: the header is damaged, or of no image.
  """
  with _open(data, max_pixels) as image:
    if image.format in _NO_IMAGES:
      raise UserError(f"a file of the format {image.format}; expected {shown_suffixes()}")


def _check_bits(bits: int) -> None:
  if not 8 <= bits <= 16:
    raise UserError(f"bits={bits}; expected 8 to 16, of the grey values in files of 16 bits.")


def orientation(data: bytes) -> int:
  """Returns the EXIF orientation of a file, 1 to 8; 1 where it has none or is damaged."""
  try:
    with Image.open(io.BytesIO(data)) as image:
      return _orientation(image)
  except Exception:
    return 1


@contextlib.contextmanager
def _open(data: bytes, max_pixels: int) -> Iterator[Image.Image]:
  """Opens an image of at most `max_pixels`. Pillow's errors for damaged files become one of three types."""
  try:
    with Image.open(io.BytesIO(data)) as image:
      width, height = image.size
      if width * height > max_pixels:
        raise UserError(
          f"Image header says {width}x{height} pixels, more than max_pixels={max_pixels}."
        )
      yield image
  except UnidentifiedImageError:  # Pillow's message names an object in memory.
    raise ValueError(_unknown(data)) from None
  except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
    raise UserError(
      f"The image's header says too much for max_pixels={max_pixels}: {error}"
    ) from None
  except (OSError, SyntaxError, ValueError, MemoryError):
    raise
  except Exception as error:  # Damaged files raise all kinds: IndexError, struct.error, ...
    raise ValueError(f"damaged image: {type(error).__name__}: {error}") from error


def _unknown(data: bytes) -> str:
  if data[4:8] == b"ftyp" and data[8:12] in _HEIF_BRANDS and ".heic" not in suffixes():
    return "a HEIC image, which is read where pillow-heif is installed: pip install pillow-heif"
  return f"no known image format: {len(data)} bytes, first {data[:8]!r}"


def _orientation(image: Image.Image) -> int:
  try:
    orientation = image.getexif().get(_ORIENTATION, 1)
  except Exception:  # Damaged EXIF data do not damage the image.
    return 1
  return orientation if orientation in _TURNS else 1


def _turn(
  pixels: UInt8[np.ndarray, "h w 3"], image: Image.Image, exif: bool
) -> UInt8[np.ndarray, "_ _ 3"]:
  """Rotates the pixels of a loaded image as its EXIF data say; Pillow itself rotates a TIFF on loading."""
  orientation = _orientation(image)
  if orientation == 1:
    return pixels
  if not exif:
    notice(_NOT_TURNED)
    return pixels
  return _TURNS[orientation](pixels)


def _to_rgb(image: Image.Image, bits: int) -> UInt8[np.ndarray, "h w 3"]:
  deep = any(";16" in str(tile) for tile in getattr(image, "tile", ()))  # Loading empties the list.
  if image.mode.startswith("I;16") or image.mode == "I":
    return _grey_to_rgb(np.asarray(image), bits)
  rgb = _eight_bits_to_rgb(image)
  if deep and 0 < rgb.max() < 16:
    notice(_DARK_COLOUR)
  return rgb


def _eight_bits_to_rgb(image: Image.Image) -> UInt8[np.ndarray, "h w 3"]:
  if image.mode == "RGB":
    return np.asarray(image)
  if image.mode == "F":
    raise ValueError("floating point images have no defined range; expected 8 or 16 bits a channel")
  if image.mode == "LAB":
    raise ValueError("images in CIE Lab are not read; write the file as RGB")
  if image.mode == "La":
    image = image.convert("LA")
  if image.mode in ("P", "PA") or "transparency" in image.info:
    image = image.convert("RGBA")  # Palettes with transparency convert cleanly only by this way.
  if image.mode in ("RGBA", "LA", "RGBa"):
    return np.ascontiguousarray(np.asarray(image.convert("RGBA"))[..., :3])
  return np.asarray(image.convert("RGB"))


def _grey_to_rgb(grey: Integer[np.ndarray, "h w"], bits: int) -> UInt8[np.ndarray, "h w 3"]:
  low, high = int(grey.min()), int(grey.max())
  if low < 0 or high >= 2**bits:
    raise ValueError(f"grey values {low}..{high} do not fit {bits} bits")
  if bits == 16 and 0 < high < 4096:
    notice(_DARK_GREY)
  scaled = np.rint(grey.astype(np.float64) / ((2**bits - 1) / 255)).astype(np.uint8)
  return np.repeat(scaled[..., None], 3, axis=-1)


def resize_image(image: np.ndarray, hw: tuple[int, int], method: str = "linear") -> np.ndarray:
  """Resizes [h, w, c] to `hw` with half-pixel centres; keeps the dtype. "linear" does not antialias.

  "linear" samples 2 x 2 neighbours whatever the scale; "area" averages what an output pixel
  covers, and is "linear" where an axis grows; "cubic" is Keys' with a = -0.5, antialiased, as in
  Pillow and timm (for their models; several times slower). "pil_bilinear", "pil_bicubic",
  "pil_nearest", "pil_lanczos", "pil_box" and "pil_hamming" are Pillow's own filters on uint8, bit
  for bit; all but "pil_nearest" antialias. Deviation from
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
  if method in PILLOW:
    return _pillow(image, hw, PILLOW[method])
  grows = h > image.shape[0] or w > image.shape[1]
  resized = cv2.resize(image, (w, h), interpolation=_INTERPOLATION["linear" if grows else method])
  return resized.reshape(h, w, image.shape[2])  # OpenCV drops a channel axis of length 1.


def _pillow(image: np.ndarray, hw: tuple[int, int], method: Image.Resampling) -> np.ndarray:
  """Resizes uint8 channels each by itself, as Pillow does in an image of several."""
  if image.dtype != np.uint8:
    raise UserError(f"Pillow's filters expect uint8, got {image.dtype}; resize before value_range.")
  if image.shape[2] == 3:
    return np.asarray(Image.fromarray(image).resize(hw[::-1], method))
  channels = [Image.fromarray(image[..., i]) for i in range(image.shape[2])]
  return np.stack([np.asarray(c.resize(hw[::-1], method)) for c in channels], axis=-1)


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


def window(
  image: np.ndarray, place: tuple[int, int, int, int], fill: Any = 0, what: str = "fill"
) -> np.ndarray:
  """Cuts the window (top, left, height, width) out of [h, w, ...]; what lies beyond the image is `fill`.

  Args:
    image: an image [h, w, c] or a mask [h, w].
    place: the window, which may reach beyond the image.
    fill: one number, or one for each channel; it has to fit the dtype.
    what: the argument's name, for the error.
  """
  top, left, h, w = place
  height, width = image.shape[:2]
  if top >= 0 and left >= 0 and top + h <= height and left + w <= width:
    return image[top : top + h, left : left + w]
  out = np.zeros((h, w, *image.shape[2:]), image.dtype)
  if fill != 0:
    value = np.asarray(fill)
    if (value.astype(image.dtype) != value).any():
      raise UserError(f"{what}={fill} does not fit pixels of {image.dtype}.")
    out[...] = value
  inside = image[max(0, top) : max(0, top + h), max(0, left) : max(0, left + w)]
  down, right = max(0, -top), max(0, -left)
  out[down : down + inside.shape[0], right : right + inside.shape[1]] = inside
  return out
