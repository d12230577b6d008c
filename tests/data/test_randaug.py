"""RandAugment's operations against their definitions in NumPy."""

import numpy as np
import pytest
from PIL import Image

from flexivit_jax.data.randaug import TRANSFORMS, randaug
from flexivit_jax.errors import UserError

pytestmark = pytest.mark.faults

IMAGE = np.random.default_rng(0).integers(30, 220, (24, 32, 3), dtype=np.uint8)
GREY = 128


def apply(name: str, magnitude: float, image: np.ndarray = IMAGE, seed: int = 0) -> np.ndarray:
  rng = np.random.default_rng(seed)
  return np.asarray(TRANSFORMS[name](Image.fromarray(image), magnitude / 10, rng)).astype(int)


def test_there_are_the_sixteen_operations():
  assert len(TRANSFORMS) == 16


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("magnitude", [0, 5, 10])
def test_shape_and_type_stay(name, magnitude):
  rng = np.random.default_rng(0)
  out = np.asarray(TRANSFORMS[name](Image.fromarray(IMAGE), magnitude / 10, rng))
  assert (out.shape, out.dtype) == (IMAGE.shape, np.uint8)


@pytest.mark.parametrize(
  "name", ["Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY", "Cutout", "SolarizeAdd"]
)
def test_magnitude_zero_changes_nothing(name):
  np.testing.assert_array_equal(apply(name, 0), IMAGE)


@pytest.mark.parametrize("name", ["Color", "Contrast", "Brightness", "Sharpness"])
def test_enhancements_change_nothing_at_five(name):
  np.testing.assert_array_equal(apply(name, 5), IMAGE)


def test_values():
  image = IMAGE.astype(int)
  np.testing.assert_array_equal(apply("Invert", 3), 255 - image)
  np.testing.assert_array_equal(apply("Posterize", 10), image // 16 * 16)
  np.testing.assert_array_equal(apply("Posterize", 5), image // 64 * 64)
  np.testing.assert_array_equal(apply("Solarize", 4), np.where(image < 102, image, 255 - image))
  np.testing.assert_array_equal(apply("Solarize", 10), image)
  np.testing.assert_array_equal(apply("SolarizeAdd", 10), np.where(image < 128, image + 110, image))


def test_blends():
  image = IMAGE.astype(float)
  np.testing.assert_allclose(apply("Brightness", 10), np.clip(image * 1.9, 0, 255), atol=1)
  grey = image @ [0.299, 0.587, 0.114]
  contrast = grey.mean() + 1.9 * (image - grey.mean())
  np.testing.assert_allclose(apply("Contrast", 10), np.clip(contrast, 0, 255), atol=2)
  colour = grey[..., None] + 0.1 * (image - grey[..., None])
  np.testing.assert_allclose(apply("Color", 0), colour, atol=1.5)
  smooth = sum(
    image[1 + i : 23 + i, 1 + j : 31 + j] * (5 if i == j == 0 else 1)
    for i in (-1, 0, 1)
    for j in (-1, 0, 1)
  )
  sharp = smooth / 13 + 1.9 * (image[1:-1, 1:-1] - smooth / 13)
  np.testing.assert_allclose(apply("Sharpness", 10)[1:-1, 1:-1], np.clip(sharp, 0, 255), atol=2)


def test_histograms():
  stretched = apply("AutoContrast", 0)
  assert (stretched.min((0, 1)) == 0).all()
  assert (stretched.max((0, 1)) == 255).all()
  image = np.random.default_rng(1).normal(90, 20, (128, 128, 3)).clip(0, 255).astype(np.uint8)
  equal = apply("Equalize", 0, image)
  below = [(image < value).mean() for value in (60, 90, 120)]
  levels = [equal[image == value].mean() / 255 for value in (60, 90, 120)]
  np.testing.assert_allclose(levels, below, atol=0.03)


def test_translations_are_in_pixels_and_both_ways():
  shifts = set()
  for seed in range(20):
    out = apply("TranslateX", 0.5, seed=seed)  # 5 pixels
    left = np.array_equal(out[:, :-5], IMAGE[:, 5:]) and (out[:, -5:] == GREY).all()
    right = np.array_equal(out[:, 5:], IMAGE[:, :-5]) and (out[:, :5] == GREY).all()
    assert left != right
    shifts.add(left)
  assert shifts == {True, False}
  moved = apply("TranslateY", 0.3)
  assert np.array_equal(moved[3:], IMAGE[:-3]) or np.array_equal(moved[:-3], IMAGE[3:])


def test_shear_moves_rows_in_proportion():
  out = apply("ShearX", 10)
  rows = [int((row == GREY).all(-1).sum()) for row in out]
  np.testing.assert_allclose(rows, 0.3 * (np.arange(24) + 0.5), atol=1)


def test_rotation_keeps_the_centre_and_uncovers_corners():
  square = np.full((31, 31, 3), 7, np.uint8)
  square[15, 15] = 200
  out = apply("Rotate", 10, square)
  assert (out[15, 15] == 200).all()
  assert (out[0, 0] == GREY).all()


def test_cutout_is_a_clipped_square():
  seen = set()
  for seed in range(30):
    mask = (apply("Cutout", 1, np.zeros_like(IMAGE), seed) == GREY).all(-1)  # half side 4
    rows, columns = mask.any(1).sum(), mask.any(0).sum()
    assert mask.sum() == rows * columns
    assert 4 <= rows <= 8
    assert 4 <= columns <= 8
    seen.add(mask.tobytes())
  assert len(seen) > 20


def test_randaug_draws_layers():
  image = np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)
  outs = {randaug(image, 2, 5, rng=np.random.default_rng(s)).tobytes() for s in range(50)}
  assert len(outs) > 35  # Of 16 x 16 pairs, some of them no change at this strength.
  np.testing.assert_array_equal(randaug(IMAGE, 0, 10, rng=np.random.default_rng(0)), IMAGE)


def test_errors():
  rng = np.random.default_rng(0)
  with pytest.raises(UserError, match=r"expects uint8 \[h, w, 3\], got float32"):
    randaug(IMAGE.astype(np.float32), 2, 10, rng=rng)
  with pytest.raises(UserError, match="magnitude is 30"):
    randaug(IMAGE, 2, 30, rng=rng)
