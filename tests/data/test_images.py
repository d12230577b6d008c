"""Decoding and resizing against independent implementations."""

import io
import struct
import zlib

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from PIL import Image

from flexivit_jax.data.images import crop, decode_image, resize_image, window
from flexivit_jax.errors import UserError

pytestmark = pytest.mark.faults

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (13, 17, 3), dtype=np.uint8)
LIMIT = 10**6


def encoded(image: Image.Image, kind: str, **options) -> bytes:
  file = io.BytesIO()
  image.save(file, kind, **options)
  return file.getvalue()


def linear_matrix(old: int, new: int) -> np.ndarray:
  """Half-pixel linear interpolation with clamped edges, written from its definition."""
  matrix = np.zeros((new, old))
  for i in range(new):
    centre = (i + 0.5) * old / new - 0.5
    low = int(np.floor(centre))
    matrix[i, np.clip(low, 0, old - 1)] += 1 - (centre - low)
    matrix[i, np.clip(low + 1, 0, old - 1)] += centre - low
  return matrix


def area_matrix(old: int, new: int) -> np.ndarray:
  edges = np.arange(new + 1) * old / new
  low = np.maximum.outer(edges[:-1], np.arange(old))
  high = np.minimum.outer(edges[1:], np.arange(1, old + 1))
  return np.maximum(high - low, 0) * new / old


@hypothesis.given(st.tuples(*[st.integers(1, 60)] * 4), st.sampled_from(["uint8", "float32"]))
def test_linear_resize_is_its_definition(sizes, dtype):
  h, w, new_h, new_w = sizes
  image = np.random.default_rng(h).uniform(0, 255, (h, w, 3)).astype(dtype)
  exact = np.einsum("ih,hwc,jw->ijc", linear_matrix(h, new_h), image, linear_matrix(w, new_w))
  resized = resize_image(image, (new_h, new_w))
  assert resized.dtype == image.dtype
  np.testing.assert_allclose(resized, exact, rtol=0, atol=1 if dtype == "uint8" else 1e-3)


@hypothesis.given(st.tuples(*[st.integers(1, 40)] * 4))
def test_area_resize_is_its_definition(sizes):
  new_h, new_w, more_h, more_w = sizes
  h, w = new_h + more_h, new_w + more_w
  image = np.random.default_rng(h).uniform(0, 255, (h, w, 3)).astype(np.float32)
  exact = np.einsum("ih,hwc,jw->ijc", area_matrix(h, new_h), image, area_matrix(w, new_w))
  np.testing.assert_allclose(resize_image(image, (new_h, new_w), "area"), exact, atol=2e-3)


def test_area_grows_as_linear():
  np.testing.assert_array_equal(resize_image(RGB, (20, 9), "area"), resize_image(RGB, (20, 9)))


def test_resize_to_the_same_size_changes_nothing():
  assert resize_image(RGB, (13, 17)) is RGB


def test_resize_keeps_one_channel():
  assert resize_image(RGB[..., :1], (5, 6)).shape == (5, 6, 1)


@pytest.mark.parametrize("hw", [(20, 9), (7, 40), (31, 44)])
def test_cubic_is_pillows(hw):
  image = np.random.default_rng(0).integers(80, 176, (29, 43, 3), np.uint8)
  pillow = Image.fromarray(image).resize(hw[::-1], Image.Resampling.BICUBIC)
  np.testing.assert_array_equal(resize_image(image, hw, "cubic"), pillow)
  # Other numbers of channels, and floats, are resized by the operator itself: Pillow rounds to 8 bits after each axis,
  # we once (and it clips then, so no extreme values here).
  twice = resize_image(np.concatenate([image, image], axis=2), hw, "cubic").astype(int)
  difference = np.abs(twice[..., :3] - np.asarray(pillow))
  assert difference.max() <= 2 and difference.mean() < 0.5
  np.testing.assert_array_equal(twice[..., :3], twice[..., 3:])


def test_unknown_method():
  with pytest.raises(UserError, match="Did you mean 'linear'"):
    resize_image(RGB, (5, 6), "bilinear")


@pytest.mark.parametrize("kind", ["PNG", "BMP", "WEBP", "TIFF"])
def test_lossless_formats_come_back(kind):
  data = encoded(Image.fromarray(RGB), kind, **({"lossless": True} if kind == "WEBP" else {}))
  image = decode_image(data, max_pixels=LIMIT)
  assert image.dtype == np.uint8
  np.testing.assert_array_equal(image, RGB)


def test_grey_palette_and_alpha_become_rgb():
  grey = RGB[..., 0]
  np.testing.assert_array_equal(
    decode_image(encoded(Image.fromarray(grey), "PNG"), max_pixels=LIMIT),
    np.stack([grey] * 3, axis=-1),
  )
  palette = Image.fromarray(RGB).quantize(16)
  np.testing.assert_array_equal(
    decode_image(encoded(palette, "PNG"), max_pixels=LIMIT), np.asarray(palette.convert("RGB"))
  )
  rgba = np.concatenate([RGB, RNG.integers(0, 256, (13, 17, 1), dtype=np.uint8)], axis=-1)
  np.testing.assert_array_equal(
    decode_image(encoded(Image.fromarray(rgba), "PNG"), max_pixels=LIMIT), RGB
  )


def test_palette_with_transparency_drops_alpha():
  palette = Image.fromarray(RGB).quantize(16)
  data = encoded(palette, "PNG", transparency=bytes(range(16)))
  np.testing.assert_array_equal(
    decode_image(data, max_pixels=LIMIT), np.asarray(palette.convert("RGB"))
  )


def test_cmyk_becomes_rgb():
  flat = Image.new("RGB", (16, 16), (200, 30, 90)).convert("CMYK")
  image = decode_image(encoded(flat, "JPEG", quality=95), max_pixels=LIMIT)
  np.testing.assert_allclose(image[8, 8].astype(int), (200, 30, 90), atol=4)


def test_sixteen_bits_are_scaled_not_clipped():
  values = np.linspace(0, 65535, 12, dtype=np.uint16).reshape(3, 4)
  image = decode_image(encoded(Image.fromarray(values), "PNG"), max_pixels=LIMIT)
  np.testing.assert_array_equal(image[..., 1], np.rint(values / 257))


def png16(pixels: np.ndarray) -> bytes:
  """A 16-bit RGB PNG, which Pillow reads but cannot write."""

  def chunk(kind: bytes, data: bytes) -> bytes:
    body = kind + data
    return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

  h, w, _ = pixels.shape
  rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
  head = struct.pack(">IIBBBBB", w, h, 16, 2, 0, 0, 0)
  parts = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
  return b"\x89PNG\r\n\x1a\n" + parts


def test_sixteen_bits_of_colour_are_scaled():
  pixels = RNG.integers(0, 65536, (5, 6, 3), dtype=np.uint16)
  image = decode_image(png16(pixels), max_pixels=LIMIT)
  np.testing.assert_allclose(image, pixels / 257, rtol=0, atol=1)


def test_orientation_is_not_applied():
  image = Image.fromarray(RGB)
  exif = image.getexif()
  exif[0x0112] = 6
  assert decode_image(encoded(image, "JPEG", exif=exif), max_pixels=LIMIT).shape == (13, 17, 3)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_truncated_and_foreign_bytes_are_errors(kind):
  data = encoded(Image.fromarray(RGB), kind)
  for bad in (data[: len(data) * 2 // 3], b"", b"not an image"):
    with pytest.raises((OSError, SyntaxError, ValueError)):
      decode_image(bad, max_pixels=LIMIT)


def test_bombs_are_refused_from_the_header():
  with pytest.raises(UserError, match="17x13 pixels, more than max_pixels=220"):
    decode_image(encoded(Image.fromarray(RGB), "PNG"), max_pixels=220)


def test_floating_point_images_are_refused():
  with pytest.raises(ValueError, match="floating point"):
    decode_image(encoded(Image.fromarray(RGB[..., 0] / np.float32(3)), "TIFF"), max_pixels=LIMIT)


def test_a_crop_undoes_a_window_beyond_the_image():
  padded = window(RGB, (-4, -4, 13 + 8, 17 + 8), 7)
  np.testing.assert_array_equal(padded, np.pad(RGB, ((4, 4), (4, 4), (0, 0)), constant_values=7))
  np.testing.assert_array_equal(crop(padded, 4, 4, (13, 17)), RGB)
  for place in [(-30, 2, 5, 6), (2, 40, 5, 6)]:
    np.testing.assert_array_equal(window(RGB, place, [1, 2, 3]), np.full((5, 6, 3), [1, 2, 3]))
  with pytest.raises(UserError, match=r"fill=0\.5 does not fit pixels of uint8"):
    window(RGB, (0, 0, 14, 17), 0.5)
