"""Each operation does what it says, and strings are parsed strictly."""

import io
import re

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from PIL import Image

from flexivit_jax.data import images
from flexivit_jax.data.preprocess import OPS, parse
from flexivit_jax.errors import UserError

pytestmark = pytest.mark.faults

IMAGE = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)


def rng(seed: int = 0) -> np.random.Generator:
  return np.random.default_rng(seed)


def run(pp: str, image: np.ndarray | bytes = IMAGE, seed: int = 0, label: int = 3) -> dict:
  return parse(pp)({"image": image, "label": label}, rng(seed))


def windows(image: np.ndarray, hw: tuple[int, int]) -> np.ndarray:
  return np.lib.stride_tricks.sliding_window_view(image, hw, (0, 1)).transpose(0, 1, 3, 4, 2)


def is_window(part: np.ndarray, image: np.ndarray) -> bool:
  return bool((windows(image, part.shape[:2]) == part).all((2, 3, 4)).any())


def test_decode_passes_arrays():
  assert run("decode")["image"] is IMAGE


def test_resize_squashes_and_resize_small_keeps_aspect():
  assert run("resize(8)")["image"].shape == (8, 8, 3)
  assert run("resize((8, 10))")["image"].shape == (8, 10, 3)
  assert run("resize_small(10)")["image"].shape == (10, 15, 3)
  assert run("resize_small(7)")["image"].shape == (7, 10, 3)  # 10.5 to even, as tf.round


def test_resize_small_is_area_unless_asked():
  exact = IMAGE.reshape(10, 2, 15, 2, 3).mean((1, 3))
  np.testing.assert_allclose(run("resize_small(10)")["image"], exact, atol=0.5)
  flat = run("resize_small(5, method='linear')")["image"]
  assert np.abs(flat - IMAGE.reshape(5, 4, -1, 2, 3).mean((1, 3))[:, : flat.shape[1]]).max() > 5


def test_central_crop():
  np.testing.assert_array_equal(run("central_crop(9)")["image"], IMAGE[5:14, 10:19])
  np.testing.assert_array_equal(run("central_crop((20, 10))")["image"], IMAGE[:, 10:20])


@pytest.mark.parametrize("pp", ["central_crop(21)", "random_crop(21)", "central_crop((20, 31))"])
def test_crops_never_pad(pp):
  with pytest.raises(UserError, match=r"out of \(20, 30\) pixels"):
    run(pp)


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("name", ["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"])
@pytest.mark.parametrize("hw", [(9, 40), (33, 8), (20, 30)])
def test_pillows_filters_are_pillows(name, hw, channels):
  image = np.random.default_rng(0).integers(0, 256, (20, 30, channels), np.uint8)
  mode = {1: "L", 3: "RGB", 4: "CMYK"}[channels]
  pixels = Image.frombytes(mode, (30, 20), image.tobytes())
  want = np.asarray(pixels.resize(hw[::-1], Image.Resampling[name.upper()])).reshape(*hw, channels)
  got = parse(f"resize({hw}, 'pil_{name}')")({"image": image}, None)["image"]
  np.testing.assert_array_equal(got, want)


def test_pillows_filters_refuse_floats():
  with pytest.raises(UserError, match="Pillow's filters expect uint8, got float32; resize before"):
    run("value_range|resize(5, 'pil_bicubic')")


@settings(deadline=None, max_examples=50)
@given(h=st.integers(1, 60), w=st.integers(1, 60), size=st.integers(1, 40))
def test_the_longer_side_is_rounded_down_where_asked(h, w, size):
  """As torchvision's `Resize(size)` and transformers have it: `int(size * long / short)`."""
  image = np.zeros((h, w, 3), np.uint8)
  got = parse(f"resize_small({size}, 'pil_bilinear', 'down')")({"image": image}, None)["image"]
  assert got.shape[:2] == (int(size * h / min(h, w)), int(size * w / min(h, w)))


@settings(deadline=None, max_examples=50)
@given(h=st.integers(1, 60), w=st.integers(1, 60), th=st.integers(1, 40), tw=st.integers(1, 40))
def test_resize_keep_covers_a_size_or_fits_into_it(h, w, th, tw):
  record = {"image": np.zeros((h, w, 3), np.uint8)}
  cover = parse(f"resize_keep(({th}, {tw}), 'cover')")(record, None)["image"].shape
  inside = parse(f"resize_keep(({th}, {tw}), 'contain')")(record, None)["image"].shape
  assert cover[0] >= th and cover[1] >= tw and (cover[0] == th or cover[1] == tw)
  assert inside[0] <= th and inside[1] <= tw and (inside[0] == th or inside[1] == tw)


def test_central_crop_divides_an_odd_margin_as_asked_and_fills_where_asked():
  image = np.arange(7, dtype=np.uint8)[None, :, None].repeat(3, 2)  # 7 pixels, a margin of 3
  cut = lambda pp: parse(pp)({"image": image}, None)["image"][..., 0].tolist()  # noqa: E731
  assert cut("central_crop((1, 4))") == [[1, 2, 3, 4]]
  assert cut("central_crop((1, 4), 'even')") == [[2, 3, 4, 5]]  # round(1.5) is 2
  assert cut("central_crop((1, 6), 'even')") == [[0, 1, 2, 3, 4, 5]]  # round(0.5) is 0
  assert cut("central_crop((2, 8), fill=9)") == [[0, 1, 2, 3, 4, 5, 6, 9], [9] * 8]
  assert cut("central_crop((2, 5), fill=[7, 8, 9])") == [[1, 2, 3, 4, 5], [7] * 5]
  for wrong, message in (("half='up'", "half 'up'"), ("half='eve'", "Did you mean 'even'")):
    with pytest.raises(UserError, match=message):
      cut(f"central_crop(1, {wrong})")


def test_random_crop_is_any_window():
  crops = [run("random_crop((19, 29))", seed=s)["image"] for s in range(60)]
  assert all(is_window(c, IMAGE) for c in crops)
  assert len({c.tobytes() for c in crops}) == 4


def test_random_crop_with_padding():
  padded = np.pad(IMAGE, ((2, 2), (2, 2), (0, 0)))
  crops = [run("random_crop((20, 30), padding=2)", seed=s)["image"] for s in range(300)]
  assert all(is_window(c, padded) for c in crops)
  assert len({c.tobytes() for c in crops}) == 25


def test_inception_crop_boxes():
  boxes = [run("inception_crop(area_min=20)", seed=s)["image"] for s in range(400)]
  assert all(is_window(b, IMAGE) for b in boxes[:30])
  h, w = np.array([b.shape[:2] for b in boxes]).T
  assert (h * w >= 0.2 * 600 - np.maximum(h, w)).all()
  assert ((w / h > 0.75 - 0.1) & (w / h < 1.33 + 0.1)).all()
  assert h.max() == 20
  assert (h * w).min() < 0.3 * 600


def test_inception_crop_distribution():
  """The mean area is that of the definition, sampled here without pixels."""
  image = np.zeros((400, 400, 1), np.uint8)
  areas = [
    np.prod(run("inception_crop", image, seed=s)["image"].shape) / 160000 for s in range(2000)
  ]
  draws = np.random.default_rng(1)
  ratio = draws.uniform(0.75, 1.33, 100000)
  height = draws.uniform(np.sqrt(0.05 / ratio), np.minimum(1, 1 / ratio))
  assert abs(np.mean(areas) - np.mean(height**2 * ratio)) < 0.02


def test_inception_crop_of_a_line_is_the_line():
  line = IMAGE[:1]
  np.testing.assert_array_equal(run("inception_crop(area_min=90)", line)["image"], line)


def ramp(height: int, width: int) -> np.ndarray:
  """An image whose first two channels are the place: 0 to 255 from top to bottom and from left to right."""
  y, x = (np.linspace(0, 255, n) for n in (height, width))
  places = np.broadcast_arrays(y[:, None], x[None], 128.0)
  return np.stack(places, -1).round().astype(np.uint8)


def encoded(image: np.ndarray, form: str, **options) -> bytes:
  file = io.BytesIO()
  Image.fromarray(image).save(file, form, **options)
  return file.getvalue()


@pytest.mark.parametrize("hw", [(60, 80), (90, 70), (700, 900), (901, 1203), (1300, 400)])
@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_decode_inception_crop_cuts_the_same_boxes(hw, form):
  file = encoded(ramp(*hw), form)
  for seed in range(8):
    options = "64, area_min=20"
    plain = run(f"decode|inception_crop({options})", file, seed=seed)["image"]
    fused = run(f"decode_inception_crop({options})", file, seed=seed)["image"]
    if form == "PNG" or min(hw) < 128:  # nothing to gain: no box is twice as large as 64 a side
      np.testing.assert_array_equal(fused, plain)
    else:  # a pixel of an eighth of the size is at most 2.6 grey levels wide here
      assert np.abs(fused.astype(float) - plain).mean() < 2


@pytest.mark.parametrize(
  ("size", "scale"), [(400, 1), (200, 2), (100, 4), (50, 8), (20, 8), ((400, 100), 1)]
)
def test_a_jpeg_is_decoded_at_the_smallest_scale_that_has_the_pixels(monkeypatch, size, scale):
  decoded = []
  whole = images._to_rgb
  monkeypatch.setattr(images, "_to_rgb", lambda i, bits: decoded.append(i.size) or whole(i, bits))
  file = encoded(ramp(400, 400), "JPEG")
  out = run(f"decode_inception_crop({size}, area_min=100, ratio_min=1, ratio_max=1)", file)
  assert decoded == [(400 // scale, 400 // scale)]
  assert out["image"].shape[:2] == (size if isinstance(size, tuple) else (size, size))


def test_decode_inception_crop_takes_what_decode_takes():
  np.testing.assert_array_equal(
    run("decode_inception_crop(9)")["image"], run("inception_crop(9)")["image"]
  )
  grey = Image.fromarray(ramp(400, 400)[..., 0])
  cmyk = Image.fromarray(ramp(400, 400)).convert("CMYK")
  for image in (grey, cmyk):
    file = io.BytesIO()
    image.save(file, "JPEG")
    assert run("decode_inception_crop(32)", file.getvalue())["image"].shape == (32, 32, 3)
  with pytest.raises(UserError, match="400x400 pixels, more than max_pixels=1000"):
    run("decode_inception_crop(32, max_pixels=1000)", encoded(ramp(400, 400), "JPEG"))
  with pytest.raises(OSError, match="truncated"):
    run("decode_inception_crop(32)", encoded(ramp(400, 400), "JPEG")[:3000])
  with pytest.raises(ValueError, match="no known image format"):
    run("decode_inception_crop(32)", b"<html>")


def test_inception_crop_resizes():
  assert run("inception_crop(24)")["image"].shape == (24, 24, 3)


def test_flip_lr_flips_half():
  flips = [run("flip_lr", seed=s)["image"] for s in range(200)]
  flipped = [np.array_equal(f, IMAGE[:, ::-1]) for f in flips]
  assert all(f or np.array_equal(i, IMAGE) for f, i in zip(flipped, flips, strict=True))
  assert 70 < sum(flipped) < 130


def test_value_range():
  ramp = np.arange(256, dtype=np.uint8).reshape(16, 16, 1)
  out = run("value_range(-1, 1)", ramp)["image"]
  assert out.dtype == np.float32
  exact = -1 + 2 * (ramp.astype(np.float64) / 255)
  np.testing.assert_allclose(out, exact, rtol=0, atol=6e-8)
  assert (out.min(), out.max()) == (-1, 1)


def test_value_range_twice_is_an_error():
  with pytest.raises(UserError, match="applied twice"):
    run("value_range|value_range")


def test_onehot():
  labels = run("onehot(5)")["labels"]
  assert labels.dtype == np.float32
  np.testing.assert_array_equal(labels, [0, 0, 0, 1, 0])
  both = run("onehot(4, key='label', key_result='y', on=0.9, off=0.1)")["y"]
  np.testing.assert_array_equal(both, np.float32([0.1, 0.1, 0.1, 0.9]))
  with pytest.raises(UserError, match=r"Label 3 is outside onehot\(3\)"):
    run("onehot(3)")


@pytest.mark.parametrize(
  ("label", "expected"), [((2, 0), [1, 0, 1, 0]), ((), [0, 0, 0, 0]), (3, [0, 0, 0, 1])]
)
def test_multihot(label, expected):
  labels = parse("multihot(4)")({"label": label}, None)["labels"]
  assert labels.dtype == np.float32
  np.testing.assert_array_equal(labels, expected)


def test_labels_that_do_not_fit_are_errors():
  for label, message in (((1, 4), r"\[1, 4\]"), (-1, r"\[-1\]")):
    with pytest.raises(
      UserError, match=rf"Labels {message} are outside multihot\(4\); expected 0..3"
    ):
      parse("multihot(4)")({"label": label}, None)
  with pytest.raises(UserError, match=r"onehot\(4\) of \(1, 2\): not one label; use multihot\(4\)"):
    parse("onehot(4)")({"label": (1, 2)}, None)


def test_crop_border():
  out = run("crop_border(3)")["image"]
  np.testing.assert_array_equal(out, IMAGE[3:-3, 3:-3])
  np.testing.assert_array_equal(run("crop_border(0)")["image"], IMAGE)
  for pixels in (-1, min(IMAGE.shape[:2]) // 2):
    with pytest.raises(UserError, match=f"Cannot cut {pixels} off each side of"):
      run(f"crop_border({pixels})")


def test_student_and_teacher_get_the_same_crop():
  out = run(
    "inception_crop|flip_lr|copy('image', 'prof')|resize(8)|resize(16, key='prof')"
    "|value_range|value_range(key='prof')|keep('image', 'prof')"
  )
  same = run("inception_crop|flip_lr|resize(16)|value_range")["image"]
  assert out.keys() == {"image", "prof"}
  assert out["image"].shape == (8, 8, 3)
  np.testing.assert_array_equal(out["prof"], same)


def test_outkey_reads_image():
  out = run("resize(4, outkey='small')|resize(2, inkey='small', outkey='tiny')")
  assert out["image"] is IMAGE
  assert (out["small"].shape, out["tiny"].shape) == ((4, 4, 3), (2, 2, 3))


def test_same_rng_same_result_and_input_untouched():
  pp = "random_crop(16, padding=4)|flip_lr|randaug(2, 10)|value_range|onehot(10)"
  before = IMAGE.copy()
  first, second, other = run(pp, seed=1), run(pp, seed=1), run(pp, seed=2)
  np.testing.assert_array_equal(first["image"], second["image"])
  assert not np.array_equal(first["image"], other["image"])
  np.testing.assert_array_equal(IMAGE, before)


def test_random_is_known():
  assert parse("decode|flip_lr").random
  assert not parse("decode|resize(4)|value_range").random
  assert parse("decode|resize(4)").text == "decode|resize(4)"


def test_bars_and_line_breaks_inside_arguments():
  out = run("\n copy('image', 'a|b') |\n keep('a|b') ")
  assert list(out) == ["a|b"]


@pytest.mark.parametrize(
  ("pp", "message"),
  [
    ("decod|flip_lr", "Unknown preprocessing operation 'decod'.*Did you mean 'decode'"),
    ("resize", "missing a required argument: 'size'"),
    ("resize(4, metod='area')", "no argument 'metod'.*Did you mean 'method'"),
    ("onehot(4, inkey='x')", "no argument 'inkey'"),
    ("flip_lr(rng=0)", "no argument 'rng'"),
    ("flip_lr(3)", "too many positional arguments"),
    ("resize(__import__('os').getpid())", "is not a literal"),
    ("resize(4", "Cannot read pp string"),
    ("decode||flip_lr", "Cannot read pp string"),
    ("decode flip_lr", "Cannot read pp string"),
    ("", "Cannot read pp string"),
    ("keep(**{'a': 1})", "no .. there"),
    ("images.crop(3)", "Cannot read"),
    ("3", "Cannot read"),
  ],
)
def test_strings_are_parsed_strictly(pp, message):
  with pytest.raises(UserError, match=message):
    parse(pp)


def test_errors_name_the_operation_and_the_key():
  with pytest.raises(UserError, match=r"Unknown key of an example 'imag'.*Did you mean") as info:
    run("resize(4, key='imag')")
  assert info.value.__notes__ == ["in resize(4, key='imag')"]
  with pytest.raises(UserError, match="'prof'"):
    run("keep('prof')")


def test_every_operation_is_documented():
  assert all(op.__doc__ for op in OPS.values())


def test_the_page_has_every_operation(repository):
  page = (repository / "docs" / "preprocessing.md").read_text()
  assert [name for name in OPS if not re.search(rf"\| .*`{name}[(`].*\|", page)] == []
  for pp in re.findall(r"^decode.*\|.*$", page, re.MULTILINE):
    parse(pp)
