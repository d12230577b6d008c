"""The stream is a pure function of the plan and the position."""

import numpy as np
import pytest

from flexivit_jax.data.preprocess import parse
from flexivit_jax.data.sources import Source
from flexivit_jax.data.stream import BatchPlan, check_limit, example_cache, make_chunk
from flexivit_jax.errors import UserError

pytestmark = pytest.mark.faults


def read(indices):
  image = np.arange(300, dtype=np.uint8).reshape(10, 10, 3)
  return [{"image": image + np.uint8(i), "label": 0, "id": str(i)} for i in indices]


def plan(**changes) -> BatchPlan:
  source = Source("numbers", "train", 1, None, 20, read)
  pp = parse("random_crop(4)|flip_lr|value_range|keep('image')")
  return BatchPlan(source, pp, 0, 12, 12, 0, 1, "raise", 5)._replace(**changes)


def test_chunks_are_the_same_in_any_order_and_again():
  forward = [make_chunk(plan(), i)[0] for i in range(6)]
  backward = [make_chunk(plan(), i)[0] for i in reversed(range(6))]
  for a, b in zip(forward, reversed(backward), strict=True):
    np.testing.assert_array_equal(a["image"], b["image"])
    np.testing.assert_array_equal(a["_id"], b["_id"])


@pytest.mark.parametrize("chunks", [2, 5, 12])
def test_chunks_divide_a_batch(chunks):
  whole = make_chunk(plan(), 3)[0]
  parts = [make_chunk(plan(chunks=chunks), 3 * chunks + i)[0] for i in range(chunks)]
  assert {len(part["_id"]) for part in parts} <= {12 // chunks, 12 // chunks + 1}
  for key, value in whole.items():
    np.testing.assert_array_equal(np.concatenate([part[key] for part in parts]), value)


def test_the_order_is_pinned():
  """A change here changes every run that is resumed."""
  assert make_chunk(plan(), 0)[0]["_id"].tolist() == [18, 8, 16, 7, 4, 13, 1, 0, 19, 17, 10, 9]
  assert make_chunk(plan(seed=None), 1)[0]["_id"].tolist() == [*range(12, 20), *[-1] * 4]
  # Of another seed and the second epoch, so that neither can stand for the other.
  second = make_chunk(plan(seed=3), 2)[0]["_id"]
  assert second.tolist() == [5, 3, 18, 19, 15, 0, 2, 13, 14, 8, 11, 10]


@pytest.mark.parametrize("seed", [0, 5])
def test_draws_are_pinned(seed):
  """The crop of example 0 in the first two epochs, from the definition of its generator."""
  image = read([0])[0]["image"]
  for epoch in (0, 1):
    key = np.random.SeedSequence((seed, epoch, 0))
    expected = plan().pp({"image": image}, np.random.Generator(np.random.Philox(key)))["image"]
    chunks = [make_chunk(plan(seed=seed, batch_size=20, local=20), epoch)[0]]
    found = chunks[0]["image"][chunks[0]["_id"].tolist().index(0)]
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("label", [1, -1, (0, 1), (-1,)])
def test_labels_outside_the_classes_are_errors(label):
  broken = Source("b", "train", 1, None, 20, lambda ii: [r | {"label": label} for r in read(ii)])
  with pytest.raises(UserError, match=r"label is .*1.*; expected 0\.\.0"):
    make_chunk(plan(source=broken), 0)


def test_preprocessing_gets_every_key_of_a_record_but_its_id():
  def with_boxes(labels):
    extra = {"boxes": np.ones((2, 4), np.float32), "box_labels": np.array(labels)}
    records = [{"image": np.zeros((2, 2, 3), np.uint8), "id": "a", **extra}]
    return plan(
      source=Source("b", "train", 3, None, 20, lambda ii: records * len(ii)),
      pp=parse("copy('image', 'image')"),
    )

  batch = make_chunk(with_boxes([0, 2]), 0).batch
  assert batch.keys() == {"image", "boxes", "box_labels", "_id"}
  assert batch["boxes"].shape == (12, 2, 4)
  with pytest.raises(UserError, match=r"box_labels is \[0 3\]; expected 0\.\.2"):
    make_chunk(with_boxes([0, 3]), 0)


@pytest.mark.parametrize("cached", [False, True])
def test_numbers_of_a_mask_are_classes_or_ignored(cached):
  def with_mask(numbers, **extra):
    mask = np.array(numbers, np.uint8).reshape(1, -1)
    record = {"image": np.zeros((*mask.shape, 3), np.uint8), "id": "a", "mask": mask, **extra}
    source = Source("m", "train", 3, None, 20, lambda ii: [record] * len(ii))
    made = plan(source=source, pp=parse("decode|keep('mask')"))
    return made._replace(cache=example_cache(source, made.pp, 1)) if cached else made

  for numbers, extra in (([0, 2, 255], {}), ([0, 2, 7], {"mask_ignore": 7})):
    mask = make_chunk(with_mask(numbers, **extra), 0).batch["mask"]
    assert mask.dtype == np.int32 and mask[0].tolist() == [[0, 2, -1]]
  for numbers, extra in (([0, 3], {}), ([255], {"mask_ignore": 7})):
    with pytest.raises(
      UserError, match=rf"the mask has the number {numbers[-1]}, .*; expected 0\.\.2"
    ):
      make_chunk(with_mask(numbers, **extra), 0)


def test_strings_in_a_batch_are_an_error():
  with pytest.raises(UserError, match="'image' is bytes, not numbers"):
    broken = Source("b", "train", 1, None, 20, lambda ii: [r | {"image": b"x"} for r in read(ii)])
    make_chunk(plan(source=broken, pp=parse("keep('image')")), 0)


def test_limit():
  check_limit(dict.fromkeys(range(5), "x"), plan())
  with pytest.raises(UserError, match="6 bad examples"):
    check_limit(dict.fromkeys(range(6), "x"), plan())


def test_no_good_example():
  broken = Source("b", "train", 1, None, 3, lambda ii: [r | {"label": 1} for r in read(ii)])
  with pytest.raises(UserError, match="No good example in b 'train'"):
    make_chunk(plan(source=broken, seed=None, on_error="skip", batch_size=3, local=3), 0)
