"""Boxes that a model says come back to the pixels of the file's image, whatever the chain of operations."""

import numpy as np
import pytest

from flexivit_jax.data import annotations
from flexivit_jax.data.geometry import Affine
from flexivit_jax.data.preprocess import parse
from flexivit_jax.errors import UserError


def operation(rng: np.random.Generator) -> str:
  size = lambda low, high: str(tuple(int(n) for n in rng.integers(low, high, 2)))  # noqa: E731
  fit, side = rng.choice(["cover", "contain"]), rng.integers(20, 300)
  return rng.choice(
    [
      f"resize({size(20, 300)}, min_area=0)",
      f"resize_small({side}, min_area=0)",
      f"resize_keep({size(20, 300)}, '{fit}', min_area=0)",
      f"pad('square', multiple={rng.integers(1, 20)}, fill=0, min_area=0)",
      f"central_crop({size(20, 200)}, fill=0, min_area=0)",
      f"random_crop(15, padding={rng.integers(9)}, min_area=0)",
      "crop_border(2, min_area=0)",
      "inception_crop(area_min=40, min_area=0)",
    ]
  )


def test_boxes_come_back_to_the_original():
  edges = 0
  for seed in range(200):
    rng = np.random.default_rng(seed)
    h, w = (int(n) for n in rng.integers(24, 300, 2))
    low, high = (rng.uniform(a, b, (5, 2)) * [w, h] for a, b in ((0, 0.5), (0.5, 1)))
    boxes = np.concatenate([[[0, 0, w, h]], np.concatenate([low, high], 1)]).astype(np.float32)
    image = np.zeros((h, w, 3), np.uint8)
    pp = "decode|origin()|" + "|".join(operation(rng) for _ in range(rng.integers(1, 5)))
    record = parse(pp)({"image": image, "boxes": boxes, "box_ids": np.arange(6)}, rng)
    if not len(record["boxes"]):  # crops left nothing but padding
      continue
    seen, (new_h, new_w) = record["boxes"], record["image"].shape[:2]
    assert record["origin"].dtype == np.float32 and record["origin"][:2].tolist() == [h, w]
    back = annotations.on_original(np.float64(seen) / ([new_w, new_h] * 2), record["origin"])
    # The first box is the whole image: it comes back as what crops left of it, and others are cut like it.
    visible, true = back[0], boxes[record["box_ids"]]
    expected = np.clip(true, np.tile(visible[:2], 2), np.tile(visible[2:], 2))
    np.testing.assert_allclose(back, expected, atol=1e-3, rtol=0)
    edges += (np.abs(back - visible) > 0.1).sum()
  assert edges > 1500


def test_the_origin_is_the_window_that_is_seen():
  record = parse("decode|origin()|resize((20, 60))|central_crop((10, 70), fill=0)|resize(35)")(
    {"image": np.zeros((40, 30, 3), np.uint8)}, None
  )
  assert record["origin"].tolist() == [40, 30, 10, -2.5, 20, 35]
  boxes = np.array([[[0, 0, 1, 1], [0.5, 0.5, 0.75, 1]], [[0, 0, 0.5, 0.5], [1, 1, 1, 1]]])
  both = np.stack([record["origin"], np.array([8, 4, 0, 0, 8, 8], np.float32)])
  found = annotations.on_original(boxes, both)
  assert found.tolist() == [
    [[0, 10, 30, 30], [15, 20, 23.75, 30]],
    [[0, 0, 4, 4], [4, 8, 4, 8]],
  ]


def test_where_an_origin_may_not_be():
  record = {"image": np.zeros((8, 9, 3), np.uint8)}
  for pp, message in [
    ("decode|resize(4)|origin()", r"origin\(\) stands after resize\(4\).*right after decode"),
    ("decode_inception_crop(4)|origin()", "stands after decode_inception_crop"),
    ("decode|origin()|resize(4)|flip_lr", "flip_lr mirrors an image whose origin is asked for"),
  ]:
    with pytest.raises(UserError, match=message):
      parse(pp)
  parse("decode|origin()|copy('image', 'b')|flip_lr(key='b')")
  with pytest.raises(UserError, match="is not decoded"):
    parse("origin()")({"image": b"x"}, None)
  with pytest.raises(UserError, match="may rotate"):
    parse("decode|origin()|randaug(2, 10)")(record, np.random.default_rng(0))
  begun = parse("decode|origin()")(record, None)
  with pytest.raises(UserError, match="A mirrored image has no origin"):
    annotations.follow(begun, (8, 9), Affine((0, 0, 8, 9), (8, 9), flip=True), 0.1)
