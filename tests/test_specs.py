"""Named inputs: every array of an example against what states it."""

import numpy as np
import pytest

from flexivit_jax import specs
from flexivit_jax.errors import UserError

EXAMPLE = {
  "image": np.zeros((8, 6, 3), np.float32),
  "mask": np.zeros((8, 6), np.uint8),
  "boxes": np.zeros((5, 4), np.float32),
  "box_labels": np.zeros(5, np.int64),
  "tokens": np.zeros(16, np.int64),
  "weight": np.float32(0),
}
STATED = {
  "image": specs.spec("h w 3"),
  "mask": specs.spec("h w", "int"),
  "boxes": specs.spec("m 4"),
  "box_labels": specs.spec("m", "int"),
  "tokens": specs.spec("16", "int"),
  "weight": specs.spec(""),
}


def test_what_fits_names_the_lengths():
  assert specs.check(EXAMPLE, STATED) == {"h": 8, "w": 6, "m": 5}
  assert specs.check(EXAMPLE, STATED, {"classes": 3})["classes"] == 3


@pytest.mark.parametrize(
  ("name", "array", "message"),
  [
    (
      "mask",
      np.zeros((6, 8), np.uint8),
      r"'mask' of shape \[6, 8\]; expected \[h=8 of 'image', w=6",
    ),
    ("image", np.zeros((8, 6, 1), np.float32), r"of shape \[8, 6, 1\]; expected \[h, w, 3\]"),
    ("image", np.zeros((8, 6), np.float32), r"of shape \[8, 6\]; expected \[h, w, 3\]"),
    (
      "image",
      np.zeros((8, 6, 3), np.uint8),
      r"'image' of uint8; expected float numbers.*value_range",
    ),
    ("boxes", np.zeros((4, 4), np.float32), None),
    ("box_labels", np.zeros(4, np.int64), r"expected \[m=5 of 'boxes'\]"),
    ("tokens", np.zeros(12, np.int64), r"of shape \[12\]; expected \[16\]"),
    ("tokens", np.zeros(16, np.float32), r"'tokens' of float32; expected int numbers"),
    ("weight", np.zeros(1, np.float32), r"of shape \[1\]; expected \[\]"),
    ("mask", None, r"gives no 'mask'; .*It gives \['box_labels'.*keep"),
  ],
)
def test_what_does_not_fit_is_said(name, array, message):
  arrays = {k: v for k, v in {**EXAMPLE, name: array}.items() if v is not None}
  with pytest.raises(UserError, match=message):
    specs.check(arrays, STATED)


def test_a_misspelt_key_has_a_neighbour():
  with pytest.raises(UserError, match="Did you mean 'images'"):
    specs.check({"images": EXAMPLE["image"]}, {"image": specs.image()})


def test_each_image_of_a_batch_has_its_own_size():
  arrays = {"image": EXAMPLE["image"], "large": np.zeros((4, 4, 3), np.float32)}
  stated = {name: specs.image(name) for name in arrays}
  assert specs.check(arrays, stated)["h_large"] == 4


def test_a_kind_that_does_not_exist_is_a_mistake_of_the_code():
  with pytest.raises(ValueError, match="expected one of"):
    specs.spec("h", "floats")
