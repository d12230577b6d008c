"""Mosaics: each tile is an example, boxes and masks lie where it lies, and nothing but the example decides."""

import dataclasses

import numpy as np
import pytest

from flexivit_jax.data.loader import eval_batches, train_batches
from flexivit_jax.data.preprocess import parse
from flexivit_jax.data.sources import Source
from flexivit_jax.errors import UserError

MASKED = "decode|mosaic(12, (0.2, 0.4, 0.4))|pad_boxes(18)|keep('image', 'mask', 'boxes', 'box_labels', 'box_mask')"
MOVED = MASKED.replace("decode|", "decode|random_crop(6, min_area=0)|flip_lr|")


def scene(i: int, bad=()) -> dict:
  """Everything but its two boxes has the value i; one is in the upper left corner, the other anywhere."""
  image = np.full((8, 8, 3), i, np.uint8)
  low = np.random.default_rng(i).integers(0, 4, 2)
  boxes = np.array([[0, 0, 2, 4], [*low, *(low + 3)]], np.float32)
  return {
    "image": b"broken" if i in bad else image,
    "mask": np.full((8, 8), i % 5, np.int32),
    "boxes": boxes,
    "box_labels": np.array([i % 5, i % 5]),
    "label": i % 5,
    "id": f"scene_{i}",
  }


def scenes(size=40, bad=()) -> Source:
  return Source("scenes", "train", 5, None, size, lambda at: [scene(i, bad) for i in at])


def all_of(source, pp, **options):
  usual = {"batch_size": 8, "seed": 1, "num_steps": 2, "threads": 0}
  with train_batches(source, pp, **{**usual, **options}) as found:
    return list(found), found.errors


def test_each_box_lies_on_its_tile():
  sides = []
  for batch in all_of(scenes(), MASKED, num_steps=7)[0]:
    for image, mask, boxes, labels, real in zip(
      *(batch[k] for k in ("image", "mask", "boxes", "box_labels", "box_mask")), strict=True
    ):
      np.testing.assert_array_equal(image[..., 0] % 5, mask)
      k = round((real.sum() / 2) ** 0.5)
      sides.append(k)
      assert real.sum() == 2 * k * k
      for n in range(k * k):  # two boxes of each tile, in the order of the tiles
        top, left = 12 // k * (n // k), 12 // k * (n % k)
        value = image[top, left, 0]
        assert (image[top : top + 12 // k, left : left + 12 // k] == value).all()
        want = scene(int(value))["boxes"] * 12 / k / 8 + [left, top, left, top]
        np.testing.assert_allclose(boxes[2 * n : 2 * n + 2], want, atol=1e-5)
        assert (labels[2 * n : 2 * n + 2] == value % 5).all()
    firsts = batch["image"][:, 0, 0, 0]
    np.testing.assert_array_equal(firsts, batch["_id"])  # the first tile is the example itself
  shares = np.bincount(sides, minlength=4) / len(sides)
  np.testing.assert_allclose(shares, [0, 0.2, 0.4, 0.4], atol=0.2)


def test_tiles_may_keep_their_shape_and_sizes_need_not_divide():
  source = scenes()
  tall = lambda at: [{"image": np.full((8, 4, 3), i, np.uint8), "id": str(i)} for i in at]  # noqa: E731
  source = dataclasses.replace(source, read=tall)
  pp = "decode|mosaic((11, 12), (0, 0, 1), fill=200)|keep('image')"
  batch = all_of(source, pp, num_steps=1)[0][0]
  assert batch["image"].shape == (8, 11, 12, 3)
  np.testing.assert_array_equal(batch["image"][:, 0, 2:4], 200)
  np.testing.assert_array_equal(batch["image"][:, :3, 0, 0], np.tile(batch["_id"], (3, 1)).T)


def test_any_topology_cache_and_start_makes_the_same_mosaics():
  whole, _ = all_of(scenes(), MOVED, keep_mb=0, num_steps=4)
  for other in ({"keep_mb": 64}, {"threads": 3}):
    again, _ = all_of(scenes(), MOVED, **other)
    for a, b in zip(whole[:2], again, strict=True):
      for key in a:
        np.testing.assert_array_equal(a[key], b[key])
  parts = [all_of(scenes(), MOVED, process_index=k, process_count=2)[0] for k in (0, 1)]
  for a, *halves in zip(whole[:2], *parts, strict=True):
    np.testing.assert_array_equal(a["image"], np.concatenate([h["image"] for h in halves]))
  late, _ = all_of(scenes(), MOVED, start_step=2, num_steps=4)
  np.testing.assert_array_equal(late[1]["boxes"], whole[3]["boxes"])
  other, _ = all_of(scenes(), MOVED, seed=2)
  assert not np.array_equal(other[0]["boxes"], whole[0]["boxes"])


def test_bad_tiles_are_replaced_and_counted_or_end_the_run():
  bad = (3, 17)
  found, errors = all_of(scenes(bad=bad), MOVED, on_error="skip")
  assert sorted(errors) == [*bad] and "scene_17" in errors[17]
  assert not any(np.isin(batch["image"], bad).any() for batch in found)
  again, _ = all_of(scenes(bad=bad), MOVED, on_error="skip", keep_mb=0, threads=2)
  for a, b in zip(found, again, strict=True):
    np.testing.assert_array_equal(a["image"], b["image"])
  with pytest.raises(UserError, match=r"^Bad example (3|17) \(id 'scene_") as caught:
    all_of(scenes(bad=bad), MOVED)
  assert str(caught.value).count("Bad example") == 1
  with pytest.raises(UserError, match="more than max_errors=1"):
    all_of(scenes(bad=bad), MOVED, on_error="skip", max_errors=1)
  nearly_all = tuple(range(8, 40))
  found, errors = all_of(scenes(bad=nearly_all), MOVED, on_error="skip", num_steps=2)
  assert found[0]["image"].max() < 8


def test_what_is_stated_of_a_mosaic_holds_for_all_its_tiles():
  stated = {0: ([1, 2], [4]), 1: ([2, 3], [0])}

  def read(at):
    return [
      scene(i)
      | dict(zip(("neg_labels", "not_exhaustive"), map(np.array, stated[i % 2]), strict=True))
      for i in at
    ]

  source = dataclasses.replace(scenes(), read=read)
  pp = parse("mosaic(8, (0, 1))")
  got = pp(source[0], np.random.default_rng(0), lambda before, rng: source[1])
  assert got["neg_labels"].tolist() == [2] and got["not_exhaustive"].tolist() == [0, 4]
  assert set(got) == {"image", "mask", "boxes", "box_labels", "neg_labels", "not_exhaustive"}
  silent = pp(source[0], np.random.default_rng(0), lambda before, rng: scene(1))
  assert "neg_labels" not in silent and silent["not_exhaustive"].tolist() == [4]


@pytest.mark.parametrize(
  ("pp", "expected"),
  [
    ("decode|mosaic(12, (0.5, 0.4))|keep('image')", "numbers >= 0 whose sum is 1"),
    ("decode|mosaic(2)|keep('image')", "at least 3, one for each tile"),
    ("decode|origin|mosaic(12)", "joins images, and origin"),
    ("decode|mosaic(12)|origin", "origin.. stands after mosaic"),
    ("decode|pad_boxes(4)|mosaic(12)", "pad_boxes.4. stands before mosaic"),
    ("decode|mosaic(12, tile=3)", "no argument 'tile'"),
  ],
)
def test_what_cannot_be_done_is_said(pp, expected):
  with pytest.raises(UserError, match=expected):
    all_of(scenes(), pp)


def test_a_mosaic_needs_others_that_are_alike():
  rng = np.random.default_rng(0)
  one = parse("mosaic(8, (0, 1))")
  with pytest.raises(UserError, match="no other examples to join"):
    one(scene(0), rng)
  grey = scene(1) | {"image": np.zeros((8, 8, 1), np.uint8)}
  with pytest.raises(UserError, match="uint8 of 3 channels and uint8 of 1"):
    one(scene(0), rng, lambda before, rng: grey)
  bare = {"image": scene(1)["image"]}
  with pytest.raises(UserError, match="only one has box_labels, boxes, mask"):
    one(scene(0), rng, lambda before, rng: bare)
  with pytest.raises(UserError, match="not decoded"):
    one({"image": b""}, rng)


def test_an_evaluation_of_mosaics_is_the_same_each_time():
  first, again = (list(eval_batches(scenes(10), MOVED, batch_size=4, threads=0)) for _ in range(2))
  np.testing.assert_array_equal(first[0]["image"], again[0]["image"])
