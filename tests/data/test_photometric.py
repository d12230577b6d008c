"""Photometric distortion: each part by its definition, and what does not change."""

import colorsys

import numpy as np
import pytest

from flexivit_jax.data.photometric import photometric_distortion
from flexivit_jax.errors import UserError

IMAGE = np.random.default_rng(0).integers(30, 200, (9, 11, 3)).astype(np.uint8)
OFF = dict(brightness=0, contrast=0, saturation=0, hue=0)


def distorted(seed, image=IMAGE, **strengths):
  return photometric_distortion(image, **OFF | strengths, rng=np.random.default_rng(seed))


def test_without_strength_nothing_changes_and_half_of_the_images_stay_with_one():
  for seed in range(5):
    assert distorted(seed) is IMAGE
  same = [distorted(seed, brightness=32) is IMAGE for seed in range(200)]
  assert 0.4 < np.mean(same) < 0.6


def test_brightness_adds_and_contrast_multiplies():
  added = {
    int(d) for s in range(300) for d in np.unique(distorted(s, brightness=25).astype(int) - IMAGE)
  }
  assert min(added) == -25 and max(added) == 25
  for seed in range(20):
    factors = distorted(seed, contrast=0.2) / IMAGE
    assert np.ptp(factors) < 1 / 30 and 0.78 < factors.mean() < 1.22


@pytest.mark.parametrize("seed", range(20))
def test_hue_turns_and_saturation_stretches(seed):
  hsv = lambda image: np.array([colorsys.rgb_to_hsv(*p) for p in image.reshape(-1, 3) / 255.0])  # noqa: E731
  before = hsv(IMAGE)
  vivid = before[:, 1] > 0.3  # where the hue is more than rounding
  turned = (hsv(distorted(seed, hue=36)) - before)[vivid]
  turn = (turned[:, 0] + 0.5) % 1 - 0.5
  assert np.abs(np.median(turn)) < 0.101 and np.abs(turn - np.median(turn)).max() < 0.03
  assert np.abs(turned[:, 1:]).max() < 0.03
  stretched = hsv(distorted(seed, saturation=0.3))
  factors = (stretched[:, 1] / before[:, 1])[vivid & (stretched[:, 1] < 0.99)]
  assert np.ptp(factors) < 0.12 and 0.68 < np.median(factors) < 1.32


def test_grey_stays_grey_and_the_order_is_drawn():
  grey = np.arange(99, dtype=np.uint8).reshape(9, 11, 1).repeat(3, 2)
  assert all(
    np.ptp(distorted(s, grey, saturation=0.5, hue=36), axis=2).max() == 0 for s in range(9)
  )
  # Contrast before saturation clips other values than after it, so that both orders are seen in what comes out.
  rng = np.random.default_rng(1)
  values = photometric_distortion(IMAGE, rng=rng), photometric_distortion(IMAGE, rng=rng)
  assert values[0].dtype == np.uint8 and (values[0] != values[1]).any()


@pytest.mark.parametrize(
  ("image", "options", "message"),
  [
    (IMAGE.astype(np.float32), {}, "expects uint8 .h, w, 3., got float32"),
    (IMAGE[..., :1], {}, r"got uint8 \[9, 11, 1\]"),
    (IMAGE, {"hue": 181}, r"hue=181.; expected 0 to 180"),
    (IMAGE, {"contrast": -0.1}, r"contrast=-0.1.; expected 0 to 1"),
  ],
)
def test_errors(image, options, message):
  with pytest.raises(UserError, match=message):
    distorted(0, image, **options)
