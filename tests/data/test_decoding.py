"""Images of every orientation, mode and depth, and damaged ones."""

import io
import struct
import warnings
import zlib

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from PIL import Image, ImageOps, features

from flexivit_jax import data
from flexivit_jax.data import images, loader
from flexivit_jax.data.preprocess import parse
from flexivit_jax.data.sources import make_source
from flexivit_jax.errors import UserError

pytestmark = pytest.mark.faults

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (13, 17, 3), dtype=np.uint8)
LIMIT = 10**7
INVERSE = {6: 8, 8: 6}
LOSSLESS = {"PNG": {}, "WEBP": {"lossless": True}, "TIFF": {}}


@pytest.fixture(autouse=True)
def every_warning_anew():
  loader._warn.cache_clear()
  images._warn.cache_clear()


def encoded(image: Image.Image, form: str, **options) -> bytes:
  file = io.BytesIO()
  image.save(file, form, **options)
  return file.getvalue()


def stored(upright: np.ndarray, orientation: object, form: str, **options) -> bytes:
  """A file that is this image once it is turned as its EXIF data say."""
  image, exif = Image.fromarray(upright), Image.Exif()
  exif[0x0112] = INVERSE.get(orientation, orientation)
  image.info["exif"] = exif.tobytes()
  turned, exif = ImageOps.exif_transpose(image), Image.Exif()
  exif[0x0112] = orientation
  return encoded(turned, form, exif=exif.tobytes() if form == "PNG" else exif, **options)


# --- orientation ---


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", LOSSLESS)
def test_images_are_turned_as_their_exif_data_say(form, orientation):
  file = stored(RGB, orientation, form, **LOSSLESS[form])
  np.testing.assert_array_equal(images.decode_image(file, max_pixels=LIMIT, exif=True), RGB)
  with images.noticing() as texts:
    plain = images.decode_image(file, max_pixels=LIMIT)
  # As tf.io.decode_image does; Pillow turns a TIFF itself.
  turned = form == "TIFF" or orientation == 1
  assert np.array_equal(plain, RGB) == turned
  assert len(texts) == (not turned)


@pytest.mark.parametrize("orientation", (0, 9, 300))
def test_an_orientation_that_there_is_not_turns_nothing(orientation):
  file = stored(RGB, orientation, "PNG")
  np.testing.assert_array_equal(images.decode_image(file, max_pixels=LIMIT, exif=True), RGB)


def test_damaged_exif_data_turn_nothing():
  for block in (b"Exif\0\0", b"Exif\0\0MM\0*", b"Exif\0\0II*\0\xff\xff\xff\xff", b"junk" * 20):
    file = encoded(Image.fromarray(RGB), "PNG", exif=block)
    np.testing.assert_array_equal(images.decode_image(file, max_pixels=LIMIT, exif=True), RGB)


def scene(height: int, width: int) -> np.ndarray:
  """Each place has another colour, and half of it is dark: no turn of it is itself."""
  y, x = np.mgrid[:height, :width]
  return np.stack([255 * y / height, 255 * x / width, 200.0 * (y < height / 2)], -1).astype(
    np.uint8
  )


@hypothesis.settings(max_examples=40, deadline=None)
@hypothesis.given(
  st.integers(1, 8),
  st.tuples(st.integers(40, 200), st.integers(40, 200)),
  st.tuples(*[st.floats(0, 1)] * 4),
  st.sampled_from((4, 9, 30)),
)
def test_a_box_is_the_same_box_of_the_upright_image_at_every_scale(orientation, hw, box, side):
  upright = scene(*hw)
  file = stored(upright, orientation, "JPEG", quality=97, subsampling=0)
  h, w = (max(8, round(n * part)) for n, part in zip(hw, box[:2], strict=True))
  top, left = (int((n - m) * part) for n, m, part in zip(hw, (h, w), box[2:], strict=True))

  def draw(size):
    assert size == hw
    return top, left, h, w

  cut = images.decode_crop(file, draw, (side, side), max_pixels=LIMIT, exif=True)
  whole = images.crop(upright, top, left, (h, w))
  a, b = (images.resize_image(image, (4, 4), "area").astype(int) for image in (cut, whole))
  # A pixel of an eighth of the size is as wide as 8 of the box; its colour is off by half of that at most.
  assert np.abs(a - b).mean() < 6 + 255 * 4 / min(h, w)
  scales = [s for s in (8, 4, 2) if h >= s * side and w >= s * side]
  if not scales:
    full = images.decode_image(file, max_pixels=LIMIT, exif=True)
    np.testing.assert_array_equal(cut, images.crop(full, top, left, (h, w)))
  else:
    assert cut.shape[0] < whole.shape[0] and min(cut.shape[:2]) >= side


@pytest.mark.parametrize("form", ("PNG", "WEBP", "TIFF", "JPEG"))
@pytest.mark.parametrize("orientation", range(1, 9))
def test_both_ways_to_cut_at_random_cut_the_same_of_a_turned_image(form, orientation):
  options = LOSSLESS.get(form, {"quality": 95})
  file = stored(scene(40, 60), orientation, form, **options)
  for seed in range(3):
    fused, plain = (
      parse(pp).upright()({"image": file}, np.random.default_rng(seed))["image"]
      for pp in ("decode_inception_crop(30, area_min=50)", "decode|inception_crop(30, area_min=50)")
    )
    np.testing.assert_array_equal(fused, plain)


def test_pp_may_say_what_is_to_be_done_with_exif_data():
  file = stored(RGB, 6, "PNG")
  for pp, upright, turned in (
    ("decode", False, False),
    ("decode", True, True),
    ("decode(exif=True)", False, True),
    ("decode(exif=False)", True, False),
  ):
    made = parse(pp).upright() if upright else parse(pp)
    with images.noticing():
      image = made({"image": file}, None)["image"]
    assert np.array_equal(image, RGB) == turned and made.text == pp


@pytest.fixture
def photos(tmp_path):
  """Three of five photos are turned."""
  (tmp_path / "train" / "cat").mkdir(parents=True)
  for i, orientation in enumerate((1, 3, 3, 1, 3)):
    file = stored(np.full((8, 8, 3), 100 + i, np.uint8) + scene(8, 8) // 4, orientation, "PNG")
    (tmp_path / "train" / "cat" / f"{i}.png").write_bytes(file)
  return tmp_path


def batch(source, pp="decode|keep('image')", **options):
  with data.train_batches(
    source, pp, batch_size=5, seed=0, num_steps=1, threads=0, **options
  ) as batches:
    (only,) = batches
  return only["image"][np.argsort(only["_id"])]


@pytest.mark.parametrize("keep_mb", (0, 512))
def test_own_photos_are_upright_in_training_and_evaluation(photos, keep_mb, caplog):
  for name, split in (("folder", "train"), ("images", "all")):
    source = make_source(name=name, split=split, data_dir=photos)
    (evaluated,) = data.eval_batches(
      source, "decode|keep('image')", batch_size=5, threads=0, keep_mb=keep_mb
    )
    np.testing.assert_array_equal(batch(source, keep_mb=keep_mb), evaluated["image"])
    for image, record in zip(evaluated["image"], source.read(range(5)), strict=True):
      i = int(record["id"].rpartition("/")[2][0])
      np.testing.assert_array_equal(image, 100 + i + scene(8, 8) // 4)
    square = "decode_inception_crop(8, area_min=100, ratio_min=1, ratio_max=1)|keep('image')"
    crops = batch(source, square, keep_mb=keep_mb)
    np.testing.assert_array_equal(crops, evaluated["image"])
  assert not caplog.text


@pytest.mark.parametrize("threads, workers", [(0, 0), (2, 0)])
def test_photos_of_a_published_set_are_not_turned_and_counted(photos, caplog, threads, workers):
  source = make_source(name="folder", split="train", data_dir=photos, upright=False)
  batches = data.eval_batches(
    source, "decode|keep('image')", batch_size=2, threads=threads, workers=workers, keep_mb=0
  )
  list(batches)
  first, count = caplog.messages
  assert first.startswith(f"folder 'train' in {photos}: EXIF data say") and ".png'." in first
  assert count.startswith(f"folder 'train' in {photos}: 3 of 5 images: EXIF data say")
  assert "decode(exif=True)" in count
  list(batches)
  assert len(caplog.messages) == 2  # once, however often the examples are passed over


# --- modes and depths ---


def grey16(values: np.ndarray, form: str) -> bytes:
  return encoded(Image.fromarray(values.astype(np.uint16)), form)


MODES = {
  "1": ("PNG", "TIFF"),
  "L": ("PNG", "JPEG", "TIFF"),
  "LA": ("PNG", "TIFF"),
  "P": ("PNG", "GIF", "TIFF"),
  "RGB": (
    "PNG",
    "JPEG",
    "TIFF",
    "JPEG2000",
    "AVIF",
    "TGA",
    "ICO",
    "QOI",
    "PPM",
    "PCX",
    "SGI",
    "DDS",
  ),
  "RGBA": ("PNG", "WEBP", "TIFF", "TGA", "QOI"),
  "CMYK": ("JPEG", "TIFF"),
  "YCbCr": ("JPEG", "TIFF"),
}


@pytest.mark.parametrize("mode, form", [(m, f) for m, forms in MODES.items() for f in forms])
def test_every_mode_becomes_the_colours_that_it_shows(mode, form):
  if form == "AVIF" and not features.check("avif"):
    pytest.skip("this Pillow has no AVIF")
  smooth = np.kron(RGB[:4, :4] // 2 + 60, np.ones((8, 8, 1), np.uint8))
  image = Image.fromarray(smooth).convert("RGBA" if mode == "LA" else "RGB").convert(mode)
  file = encoded(image, form, **LOSSLESS.get(form, {}))
  found = images.decode_image(file, max_pixels=LIMIT)
  assert found.shape == (32, 32, 3) and found.dtype == np.uint8
  expected = np.asarray(image.convert("RGBA" if mode == "LA" else "RGB"))[..., :3].astype(int)
  lossy = form in ("JPEG", "AVIF") or mode in ("CMYK", "YCbCr")
  assert np.abs(found - expected).mean() <= (8 if lossy else 0)


@pytest.mark.parametrize(
  "mode", ("PA", "La", "RGBa", "HSV", "LAB", "RGBX", "F", "I;16", "I;16B", "I")
)
def test_every_other_mode_of_pillow_is_read_or_refused_in_a_line(mode):
  image = Image.new(mode, (4, 3))
  try:
    found = images._to_rgb(image, 16)
  except ValueError as error:
    assert mode in ("LAB", "F") and "\n" not in str(error)
  else:
    assert found.shape == (3, 4, 3) and found.dtype == np.uint8


def test_animations_give_their_first_frame():
  frames = [Image.new("RGB", (9, 7), colour) for colour in ("red", "blue", "lime")]
  for form in ("GIF", "PNG", "WEBP", "TIFF"):
    options = {"lossless": True} if form == "WEBP" else {}
    file = encoded(frames[0], form, save_all=True, append_images=frames[1:], **options)
    image = images.decode_image(file, max_pixels=LIMIT)
    np.testing.assert_array_equal(image, np.full((7, 9, 3), (255, 0, 0)))


def test_a_wrong_suffix_does_not_matter(tmp_path):
  (tmp_path / "a.jpg").write_bytes(encoded(Image.fromarray(RGB), "PNG"))
  source = make_source(name="images", split="all", data_dir=tmp_path)
  np.testing.assert_array_equal(parse("decode")(source[0], None)["image"], RGB)


@pytest.mark.parametrize("form", ("PNG", "TIFF"))
@pytest.mark.parametrize("bits", (8, 10, 12, 14, 16))
def test_grey_of_fewer_bits_is_scaled_as_asked(form, bits):
  values = np.linspace(0, 2**bits - 1, 30).astype(int).reshape(5, 6)
  file = grey16(values, form)
  image = images.decode_image(file, max_pixels=LIMIT, bits=bits)
  np.testing.assert_array_equal(image[..., 2], np.rint(values * (255 / (2**bits - 1))))
  if bits > 8:
    with pytest.raises(ValueError, match=f"0..{2**bits - 1} do not fit {bits - 1} bits"):
      images.decode_image(file, max_pixels=LIMIT, bits=bits - 1)


@pytest.mark.parametrize("top, said", [(0, 0), (300, 1), (4095, 1), (4096, 0), (65535, 0)])
def test_images_of_12_bits_in_16_say_so(top, said, tmp_path, caplog):
  for i in range(3):
    (tmp_path / f"{i}.png").write_bytes(grey16(np.array([[0, top]]), "PNG"))
  source = make_source(name="images", split="all", data_dir=tmp_path)
  pp = "decode|keep('image')"
  list(data.eval_batches(source, pp, batch_size=3, threads=0))
  assert caplog.text.count("decode(bits=12)") == 2 * said
  assert ("3 of 3 images" in caplog.text) == bool(said)
  caplog.clear()
  if said:  # what it advises
    (made,) = data.eval_batches(source, pp.replace("decode", "decode(bits=12)"), batch_size=3)
    assert made["image"].max() == round(top * 255 / 4095) and not caplog.text


def test_bits_out_of_range_are_refused():
  with pytest.raises(UserError, match="bits=4; expected 8 to 16"):
    parse("decode(bits=4)")({"image": b"x"}, None)


def png(width: int, height: int, depth: int, colour: int, rows: bytes) -> bytes:
  def chunk(kind: bytes, content: bytes) -> bytes:
    body = kind + content
    return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

  head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
  parts = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
  return b"\x89PNG\r\n\x1a\n" + parts


def test_colour_of_12_bits_in_16_says_so():
  for top, said in ((4095, 1), (65535, 0)):
    rows = b"\0" + np.full((5, 3), top).astype(">u2").tobytes()
    with images.noticing() as texts:
      images.decode_image(png(5, 1, 16, 2, rows), max_pixels=LIMIT)
    assert len(texts) == said


# --- what is no image, or not to be read ---


@pytest.mark.parametrize("side", (3000, 10_000, 20_000, 2**31 - 1))
def test_huge_headers_are_refused_before_anything_is_decoded(side):
  file = png(side, side, 8, 2, b"")
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    with pytest.raises(UserError, match="max_pixels=1000000") as info:
      images.decode_image(file, max_pixels=10**6)
  assert "\n" not in str(info.value)


FILES = [
  encoded(Image.fromarray(scene(20, 30)), form)
  for form in ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "ICO", "TGA", "JPEG2000", "PCX")
]


@hypothesis.settings(max_examples=150, deadline=None)
@hypothesis.given(
  st.sampled_from(FILES),
  st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=6),
  st.floats(0, 1),
)
def test_damaged_files_raise_nothing_but_what_is_documented(file, changes, end):
  damaged = bytearray(file)
  for place, value in changes:
    damaged[int(place * (len(damaged) - 1))] = value
  damaged = bytes(damaged[: max(1, round(end * len(damaged)))])
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Pillow's own, of metadata
    try:
      image = images.decode_image(damaged, max_pixels=10**5, exif=True)
    except (OSError, SyntaxError, ValueError):
      return
  assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3


def test_heic_says_what_reads_it():
  if ".heic" in images.suffixes():
    pytest.skip("pillow-heif is installed")
  with pytest.raises(ValueError, match="pip install pillow-heif"):
    images.decode_image(b"\0\0\0\x18ftypheic" + b"\0" * 40, max_pixels=LIMIT)
