"""Near-duplicate boxes become one, crowds are left out, and crops keep what is seen enough."""

import numpy as np
import pytest

from flexivit_jax.data.loader import train_batches
from flexivit_jax.data.preprocess import parse
from flexivit_jax.data.sources import Source
from flexivit_jax.errors import UserError


def made(pp: str, record: dict, seed: int = 0) -> dict:
  return parse(pp).of_classes(None, 5)(record, np.random.default_rng(seed))


def record(corners, labels, **more) -> dict:
  return {
    "image": np.zeros((20, 20, 3), np.uint8),
    "boxes": np.array(corners, np.float32).reshape(-1, 4),
    "box_labels": np.array(labels, np.int64),
    **more,
  }


def test_near_duplicates_become_one_box_of_several_classes():
  corners = [[0, 0, 10, 10], [5, 5, 9, 9], [0, 0, 10, 9.5], [0, 0.4, 10, 9.5], [0, 0, 10, 10]]
  got = made("merge_boxes(0.9)", record(corners, [3, 1, 0, 4, 3], box_ids=np.arange(5)))
  np.testing.assert_array_equal(got["boxes"], np.float32(corners[:2]))  # the first's coordinates
  assert got["box_ids"].tolist() == [0, 1] and "box_labels" not in got
  assert got["box_targets"].dtype == np.float32
  np.testing.assert_array_equal(got["box_targets"], [[1, 0, 0, 1, 1], [0, 1, 0, 0, 0]])
  # Each box is compared with boxes that are kept: no chain of neighbours joins what is far away.
  chain = [[0, 0, 10, 10 - 0.6 * i] for i in range(4)]
  got = made("merge_boxes(0.9)", record(chain, [0, 1, 2, 3]))
  np.testing.assert_array_equal(got["boxes"], np.float32([chain[0], chain[2]]))
  np.testing.assert_array_equal(got["box_targets"], [[1, 1, 0, 0, 0], [0, 0, 1, 1, 0]])


def test_boxes_without_overlap_or_of_crowds_are_not_joined():
  crowd = np.array([True, False])
  got = made("merge_boxes", record([[0, 0, 9, 9]] * 2, [1, 1], box_crowd=crowd))
  assert got["box_crowd"].tolist() == [True, False] and got["box_targets"].shape == (2, 5)
  none = made("merge_boxes|pad_boxes(3)", record([], []))
  assert none["box_targets"].shape == (3, 5) and not none["box_mask"].any()
  points = made("merge_boxes", record([[1, 1, 1, 1]] * 2, [0, 1]))  # no area, so no overlap
  assert len(points["boxes"]) == 2


@pytest.mark.parametrize(
  ("pp", "expected"),
  [
    ("merge_boxes(0)", "merge_boxes.0.; expected more than 0"),
    ("pad_boxes(3)|merge_boxes", "merge_boxes stands after pad_boxes"),
    ("pad_boxes(3)|without_crowd", "without_crowd stands after pad_boxes"),
    ("merge_boxes|merge_boxes", "box_labels"),
    ("keep('image')|without_crowd", "'boxes'"),
  ],
)
def test_what_cannot_be_done_is_said(pp, expected):
  with pytest.raises(UserError, match=expected):
    made(pp, record([[0, 0, 9, 9]], [1]))


def crowds(size: int = 8) -> Source:
  def read(indices):
    crowd = [np.array([i % 2 == 0, False]) for i in indices]
    boxes = [[0, 0, 9, 9], [1, 1, 5, 5]]
    return [
      record(boxes, [0, 1], box_crowd=c, id=str(i)) for i, c in zip(indices, crowd, strict=True)
    ]

  return Source("crowds", "train", 5, None, size, read)


def test_crowds_are_never_trained_as_objects(caplog):
  keys = "keep('image', 'boxes', 'box_labels', 'box_mask')"
  options = dict(batch_size=8, seed=0, num_steps=1, threads=0)
  batches = train_batches(crowds(), f"decode|without_crowd|pad_boxes(3)|{keys}", **options)
  with batches:
    batch = next(batches)
  assert batch["box_mask"].sum(1).tolist() == (1 + batch["_id"] % 2).tolist()
  assert "4 of 8 images: boxes of crowds are left out" in caplog.text
  with pytest.raises(UserError, match=r"1 of its boxes stands for a crowd.*without_crowd\(\)"):
    next(train_batches(crowds(), f"decode|pad_boxes(3)|{keys}", **options))
  kept = next(
    train_batches(crowds(), "decode|keep('image', 'boxes', 'box_labels', 'box_crowd')", **options)
  )
  assert kept["box_crowd"].sum() == 4


def test_an_evaluation_can_keep_crowds_of_formats_without_them():
  boxes = np.array([[0, 0, 2, 2], [1, 1, 3, 3]], np.float32)
  op = parse("with_crowd")
  assert op({"boxes": boxes}, None)["box_crowd"].tolist() == [False, False]
  stated = {"boxes": boxes, "box_crowd": np.array([False, True])}
  assert op(stated, None)["box_crowd"].tolist() == [False, True]


@pytest.mark.parametrize(
  "crop",
  [
    "inception_crop(12, area_min=10, min_area=0.6)",
    "decode_inception_crop((9, 14), area_min=10, min_area=0.6)",
    "random_crop(9, min_area=0.6)",
    "central_crop((7, 15), min_area=0.6)",
  ],
)
def test_crops_keep_boxes_of_which_enough_is_seen(crop):
  """Of OWL-ViT, 0.6; each pixel has its own value, so the result says what of a box is seen."""
  numbers = np.arange(400).reshape(20, 20)
  image = np.stack([numbers // 20 * 12, numbers % 20 * 12, numbers * 0], -1).astype(np.uint8)
  kept = []
  for seed in range(30):
    corners = np.random.default_rng(seed).integers(0, 10, (6, 4)) + np.array([0, 0, 10, 10])
    given = record(corners, range(5, -1, -1), box_ids=np.arange(6)) | {"image": image}
    rng = np.random.default_rng(seed)
    window = parse(crop.replace("0.6", "0"))(given | {"boxes": np.float32([[0, 0, 20, 20]])} | {
      "box_labels": np.zeros(1, int), "box_ids": np.zeros(1, int)}, rng)["image"]  # fmt: skip
    low, high = (f(window[..., :2].reshape(-1, 2), axis=0)[::-1] / 12 for f in (np.min, np.max))
    low, high = np.floor(low + 1e-6), np.ceil(high + 1 - 1e-6)
    seen = np.clip(np.minimum(corners[:, 2:], high) - np.maximum(corners[:, :2], low), 0, None)
    share = seen.prod(1) / (corners[:, 2:] - corners[:, :2]).prod(1)
    got = made(crop, given, seed)["box_ids"].tolist()
    sure = np.abs(share - 0.6) > 0.15 if "inception" in crop else share > -1
    assert [i in got for i in np.flatnonzero(sure)] == (share >= 0.6)[sure].tolist()
    kept.append(len(got))
  assert 20 < sum(kept) < 150


BAD = {
  "no width": ([3, 3, 3, 9], "no area inside the image"),
  "no height": ([3, 9, 9, 9], "no area inside the image"),
  "flipped": ([9, 3, 3, 9], "expected finite x0 <= x1"),
  "outside": ([20, 0, 25, 9], "no area inside the image of 20 x 20"),
  "not finite": ([0, np.nan, 5, 9], "expected finite x0 <= x1"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_box_of_any_source_makes_its_example_bad(kind):
  """Folders are checked when they are opened; this is for all else, such as packs."""
  corners, expected = BAD[kind]

  def read(indices):
    return [
      record([[0, 0, 9, 9], corners if i == 2 else [1, 1, 5, 5]], [0, 1], id=str(i))
      for i in indices
    ]

  source = Source("boxes", "train", 5, None, 4, read)
  options = dict(batch_size=4, seed=0, num_steps=1, threads=0)
  with pytest.raises(UserError, match=rf"Bad example 2.*{expected}"):
    next(train_batches(source, "decode|pad_boxes(3)|keep('boxes')", **options))
  with train_batches(
    source, "decode|pad_boxes(3)|keep('boxes')", on_error="skip", **options
  ) as batches:
    next(batches)
    assert list(batches.errors) == [2]


def test_repeated_boxes_and_none_are_no_mistake():
  repeated = made("decode|merge_boxes(0.9)", record([[1, 1, 5, 5]] * 3, [2, 2, 4]))
  np.testing.assert_array_equal(repeated["box_targets"], [[0, 0, 1, 0, 1]])
  assert made("decode|pad_boxes(2)", record([], []))["box_mask"].tolist() == [0, 0]
