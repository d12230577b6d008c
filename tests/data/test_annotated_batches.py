"""Batches with boxes and masks: the same from threads, from a cache, and after a resume."""

import dataclasses
import io

import numpy as np
import pytest
from PIL import Image

from flexivit_jax.data.loader import eval_batches, train_batches
from flexivit_jax.data.sources import Source
from flexivit_jax.errors import UserError

pytestmark = pytest.mark.faults

MOVES = "decode|inception_crop(16, area_min=40, min_area=0.3)|flip_lr|value_range"
KEYS = "'image', 'mask', 'boxes', 'box_ids', 'box_labels', 'box_mask', 'annotated_hw'"
PP = f"{MOVES}|pad_boxes(4)|relative_boxes('cxcywh')|keep({KEYS})"


def png(array: np.ndarray) -> bytes:
  Image.fromarray(array).save(file := io.BytesIO(), "PNG")
  return file.getvalue()


def scenes(number: int = 40, damaged: tuple[int, ...] = ()) -> Source:
  """Example i has i % 4 boxes; its mask has the number of a box in the box."""

  def scene(i: int) -> dict:
    rng = np.random.default_rng(i)
    h, w = rng.integers(20, 40, 2)
    low = rng.integers(0, 9, (i % 4, 2))
    boxes = np.concatenate([low, low + rng.integers(4, 9, (i % 4, 2))], 1)
    mask = np.zeros((h, w), np.uint8)
    for k, (x0, y0, x1, y1) in enumerate(boxes):
      mask[y0:y1, x0:x1] = k + 1
    return {
      "image": png(rng.integers(0, 256, (h, w, 3), np.uint8)),
      "mask": png(mask)[: 50 if i in damaged else None],
      "boxes": boxes.astype(np.float32),
      "box_ids": np.arange(i % 4) + 10 * i,
      "box_labels": np.arange(i % 4),
      "captions": ("a scene",) * (i % 3),
      "annotated_hw": (int(h), int(w)),
      "id": f"scene {i}",
    }

  return Source("scenes", "train", 4, None, number, lambda indices: [scene(i) for i in indices])


def batches(pp: str = PP, source: Source | None = None, **options) -> list[dict[str, np.ndarray]]:
  options = {"batch_size": 12, "seed": 3, "num_steps": 8, "threads": 0, "keep_mb": 0} | options
  with train_batches(source or scenes(), pp, **options) as found:
    return list(found)


def assert_equal(first: list, second: list) -> None:
  for a, b in zip(first, second, strict=True):
    assert a.keys() == b.keys()
    for key in a:
      np.testing.assert_array_equal(a[key], b[key])


@pytest.fixture(scope="module")
def reference():
  return batches()


def test_every_key_is_one_array(reference):
  kinds = {k: (v.shape[1:], v.dtype.name) for k, v in reference[0].items()}
  assert kinds == {
    "image": ((16, 16, 3), "float32"),
    "mask": ((16, 16), "int32"),
    "boxes": ((4, 4), "float32"),
    "box_ids": ((4,), "int64"),
    "box_labels": ((4,), "int64"),
    "box_mask": ((4,), "float32"),
    "annotated_hw": ((2,), "int64"),
    "_id": ((), "int64"),
  }
  for batch in reference:
    real = batch["box_mask"] > 0
    np.testing.assert_array_equal((batch["box_ids"] // 10)[real], batch["_id"][np.nonzero(real)[0]])
    np.testing.assert_array_equal((batch["box_ids"] % 10)[real], batch["box_labels"][real])
    assert (batch["box_labels"][~real] == -1).all() and (batch["boxes"][~real] == 0).all()


@pytest.mark.parametrize(
  "options", [{"threads": 3}, {"keep_mb": 64}, {"threads": 3, "keep_mb": 64}]
)
def test_threads_and_a_cache_change_nothing_and_a_resume_continues(reference, options):
  source, read = scenes(), []
  counted = dataclasses.replace(source, read=lambda ii: read.extend(ii) or source.read(ii))
  assert_equal(batches(source=counted, **options), reference)
  assert (len(read) < 60) == ("keep_mb" in options)  # 40 examples, 96 in the batches
  assert_equal(batches(**options, start_step=5), reference[5:])


def test_processes_share_each_batch(reference):
  parts = [batches(process_index=k, process_count=2, num_steps=1)[0] for k in range(2)]
  whole = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
  assert_equal([whole], reference[:1])


def test_evaluation_leaves_gaps_for_what_is_damaged():
  pp = "decode|resize_keep(16, 'contain')|pad(16, fill=0)|pad_boxes(3)|keep('mask', 'box_mask')"
  batch = next(
    iter(eval_batches(scenes(6, damaged=(2,)), pp, batch_size=8, threads=0, on_error="skip"))
  )
  assert batch["_mask"].tolist() == [1, 1, 0, 1, 1, 1, 0, 0]
  assert batch["box_mask"].sum(1).tolist() == [0, 1, 0, 3, 0, 1, 0, 0]
  assert batch["mask"].shape == (8, 16, 16) and set(np.unique(batch["mask"][3])) == {
    0,
    1,
    2,
    3,
    -1,
  }


@pytest.mark.parametrize(
  ("pp", "batch_size", "message"),
  [
    (
      f"{MOVES}|keep('boxes')",
      12,
      r"differ in the number of boxes \('boxes'\): 0, 1, 2; pad_boxes",
    ),
    (
      f"{MOVES}|keep('box_ids')",
      40,
      r"differ in the number of boxes \('box_ids'\): 0, 1, 2; pad_b",
    ),
    ("decode|keep('mask')", 12, "differ in the shape of 'mask': .*; resize or crop them in pp"),
    (
      f"{MOVES}|keep('captions')",
      12,
      "'captions' is tuple, not numbers; decode it, or `keep` other",
    ),
    ("keep('mask')", 12, "'mask' is bytes, not numbers; decode it"),
    (
      f"{MOVES}|pad_boxes(2)",
      12,
      "Bad example .*scene.*3 boxes are more than pad_boxes.2. has room",
    ),
  ],
)
def test_what_cannot_be_stacked_is_named(pp, batch_size, message):
  with pytest.raises(UserError, match=message):
    batches(pp, batch_size=batch_size, num_steps=1)
