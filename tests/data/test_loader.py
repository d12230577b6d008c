"""Batches are functions of (seed, step), whoever makes them; every example counts once."""

import dataclasses
import threading
import time

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from flexivit_jax.data.loader import eval_batches, train_batches
from flexivit_jax.data.preprocess import parse
from flexivit_jax.data.sources import Source, make_source
from flexivit_jax.data.stream import example_cache
from flexivit_jax.errors import UserError

pytestmark = pytest.mark.faults

PP = "decode|random_crop(6)|flip_lr|value_range|onehot(10)|keep('image', 'labels')"
PLAIN = "decode|value_range|keep('image')"


def numbers(size: int, bad: tuple[int, ...] = ()) -> Source:
  """Example i is an image full of i; the bad ones cannot be decoded."""

  def read(indices):
    return [
      {
        "image": b"broken" if i in bad else np.full((8, 8, 3), i % 256, np.uint8),
        "label": i % 10,
        "id": f"number_{i}",
      }
      for i in indices
    ]

  return Source("numbers", "train", 10, None, size, read)


def batches(source=None, pp=PP, **options) -> list[dict[str, np.ndarray]]:
  options = {"batch_size": 12, "seed": 3, "num_steps": 9, "threads": 2} | options
  with train_batches(source or numbers(50), pp, **options) as found:
    return list(found)


def assert_equal(first: list, second: list) -> None:
  for a, b in zip(first, second, strict=True):
    assert a.keys() == b.keys()
    for key in a:
      np.testing.assert_array_equal(a[key], b[key])


def ids(found: list[dict[str, np.ndarray]]) -> list[int]:
  return [int(i) for batch in found for i in batch["_id"]]


@pytest.fixture(scope="module")
def reference():
  return batches(threads=0)


# --- training ---


def test_shapes_and_types(reference):
  kinds = {k: (v.shape, v.dtype.name) for k, v in reference[0].items()}
  assert kinds == {
    "image": ((12, 6, 6, 3), "float32"),
    "labels": ((12, 10), "float32"),
    "_id": ((12,), "int64"),
  }


def test_batches_hold_the_examples_they_name(reference):
  for batch in reference:
    np.testing.assert_allclose(batch["image"][:, 0, 0, 0], batch["_id"] / 255 * 2 - 1, atol=1e-6)
    np.testing.assert_array_equal(batch["labels"].argmax(-1), batch["_id"] % 10)


@hypothesis.given(size=st.integers(1, 60), seed=st.integers(0, 2**40), batch=st.integers(1, 60))
def test_every_epoch_is_a_permutation(size, seed, batch):
  hypothesis.assume(batch <= size)
  found = batches(
    numbers(size), PLAIN, seed=seed, batch_size=batch, num_steps=-(-2 * size // batch), threads=0
  )
  for epoch in (ids(found)[:size], ids(found)[size : 2 * size]):
    assert sorted(epoch) == list(range(size))


def test_epochs_and_seeds_shuffle_differently():
  size = 1000
  first = ids(batches(numbers(size), PLAIN, num_steps=4, batch_size=500))
  other = ids(batches(numbers(size), PLAIN, num_steps=4, batch_size=500, seed=4))
  orders = [first[:size], first[size:], other[:size], other[size:], list(range(size))]
  for i, a in enumerate(orders):
    for b in orders[:i]:
      assert np.abs(np.corrcoef(a, b)[0, 1]) < 0.12
      assert np.equal(a, b).sum() < 10


@pytest.mark.parametrize(
  "options", [{"threads": 1}, {"threads": 5, "prefetch": 4}, {"workers": 2, "threads": 1}]
)
def test_threads_and_workers_change_nothing(reference, options):
  assert_equal(batches(**options), reference)


def test_large_batches_are_made_in_chunks():
  source = make_source(name="digits", split="train")
  options = {"batch_size": 100, "num_steps": 20}
  found = batches(source, **options, threads=3)
  assert_equal(found, batches(source, **options, threads=0))
  assert sorted(ids(found)[:1437]) == list(range(1437))


def test_processes_share_each_batch(reference):
  parts = [batches(process_index=i, process_count=3) for i in range(3)]
  joined = [
    {key: np.concatenate([part[key] for part in step]) for key in step[0]}
    for step in zip(*parts, strict=True)
  ]
  assert_equal(joined, reference)


def test_start_step_continues(reference):
  assert_equal(batches(start_step=4), reference[4:])


@hypothesis.settings(max_examples=5)
@hypothesis.given(stop=st.integers(0, 9))
def test_state_continues(reference, stop):
  options = {"batch_size": 12, "seed": 3, "num_steps": 9, "threads": 2}
  with train_batches(numbers(50), PP, **options) as first:
    head = [next(first) for _ in range(stop)]
    state = first.get_state()
  with train_batches(numbers(50), PP, **options) as second:
    next(second)
    second.set_state(state)
    assert_equal(head + list(second), reference)
  assert state == {"step": stop, "seed": 3, "batch_size": 12, "examples": 50}


def test_state_of_another_run_is_an_error():
  state = {"step": 3, "seed": 3, "batch_size": 24, "examples": 50}
  found = train_batches(numbers(50), PP, batch_size=12, seed=3, num_steps=9)
  with pytest.raises(UserError, match="has batch_size=24, this run 12"):
    found.set_state(state)


def test_random_draws_depend_on_the_epoch_and_the_example():
  source = numbers(8)
  wide = dataclasses.replace(
    source, read=lambda ii: [r | {"image": np.arange(4800, dtype=np.uint8).reshape(40, 40, 3)}
                             for r in source.read(ii)]
  )  # fmt: skip
  found = batches(wide, batch_size=8, num_steps=3)
  images = {image.tobytes() for batch in found for image in batch["image"]}
  assert len(images) > 20


# --- evaluation ---


@hypothesis.given(
  size=st.integers(1, 50), batch=st.sampled_from([4, 8, 40, 80]), count=st.sampled_from([1, 2, 4])
)
def test_every_example_counts_once(size, batch, count):
  parts = [
    eval_batches(
      numbers(size),
      PLAIN,
      batch_size=batch,
      process_index=i,
      process_count=count,
      threads=0,
    )
    for i in range(count)
  ]
  assert len({len(part) for part in parts}) == 1
  seen = []
  for part in parts:
    found = list(part)
    assert len(found) == len(part)
    for one in found:
      assert one["image"].shape == (batch // count, 8, 8, 3)
      assert one["_mask"].dtype == np.float32
      np.testing.assert_array_equal(one["_mask"], one["_id"] >= 0)
      assert (one["image"][one["_mask"] == 0] == 0).all()
      seen += one["_id"][one["_mask"] == 1].tolist()
  assert sorted(seen) == list(range(size))


def test_evaluation_is_in_order_and_can_be_repeated():
  found = eval_batches(numbers(50), PP, batch_size=12)
  first, second = list(found), list(found)
  assert_equal(first, second)
  assert ids(first) == [*range(50), *[-1] * 10]
  next(iter(found))
  assert_equal(list(found), first)


# --- errors ---


def test_a_bad_example_is_named():
  message = (
    r"Bad example 7 \(id 'number_7'\) of data set 'numbers' split 'train': "
    r"ValueError: no known image format: 6 bytes, first b'broken' in decode.*on_error='skip'"
  )
  for options in ({"threads": 0}, {"threads": 2}):
    with pytest.raises(UserError, match=message):
      batches(numbers(50, bad=(7,)), **options)
  with pytest.raises(UserError, match=message):
    list(eval_batches(numbers(50, bad=(7,)), PP, batch_size=5))


def test_an_error_is_not_an_end():
  found = train_batches(numbers(50, bad=(7,)), PP, batch_size=50, seed=3, num_steps=9)
  for _ in range(2):
    with pytest.raises(UserError, match="Bad example 7"):
      next(found)
  assert found.get_state()["step"] == 0


@pytest.mark.slow
def test_a_bad_example_is_named_by_workers_too():
  with pytest.raises(UserError, match="Bad example 7"):
    batches(numbers(50, bad=(7,)), workers=1)


def test_a_failing_read_is_named():
  source = numbers(50)

  def read(indices):
    if 7 in indices:
      raise OSError("disk on fire")
    return source.read(indices)

  with pytest.raises(UserError, match=r"Bad example 7 of data set.*OSError: disk on fire"):
    batches(dataclasses.replace(source, read=read))
  with train_batches(
    dataclasses.replace(source, read=read), PP, batch_size=10, seed=0, num_steps=5, on_error="skip"
  ) as found:
    assert 7 not in ids(list(found))
    assert list(found.errors) == [7]


def test_skip_replaces_by_the_next_of_the_order_and_counts(reference, caplog):
  bad = (7, 21)
  for threads in (0, 3):
    options = {"batch_size": 12, "seed": 3, "num_steps": 9}
    with train_batches(
      numbers(50, bad), PP, **options, threads=threads, on_error="skip", max_errors=2
    ) as found:
      got = list(found)
      assert set(found.errors) == set(bad)
    order = ids(reference)
    for position, (was, now) in enumerate(zip(order, ids(got), strict=True)):
      start = position // 50 * 50
      if start + 50 <= len(order):
        following = order[position : start + 50] + order[start:position]
        assert now == next(i for i in following if i not in bad), was
  assert "Bad example 7" in caplog.text


def test_skip_stops_over_the_limit():
  with pytest.raises(UserError, match=r"3 bad examples in numbers 'train', more than max_errors=2"):
    batches(numbers(50, bad=(7, 8, 9)), on_error="skip", max_errors=2)
  with pytest.raises(UserError, match="bad examples in numbers"):
    batches(numbers(20, bad=tuple(range(20))), on_error="skip", max_errors=2)


def test_skip_leaves_gaps_in_evaluation():
  found = eval_batches(numbers(50, bad=(0, 33)), PP, batch_size=12, on_error="skip")
  seen = [i for i in ids(list(found)) if i >= 0]
  assert seen == [i for i in range(50) if i not in (0, 33)]
  assert set(found.errors) == {0, 33}


def test_labels_out_of_range_are_errors():
  source = dataclasses.replace(numbers(50), num_classes=9)
  with pytest.raises(UserError, match=r"label is 9; expected 0..8"):
    batches(source)


def test_images_of_different_sizes_are_an_error():
  source = numbers(50)
  odd = dataclasses.replace(
    source,
    read=lambda ii: [
      r | {"image": np.zeros((8 + i % 2, 8, 3), np.uint8)}
      for i, r in zip(ii, source.read(ii), strict=True)
    ],
  )
  with pytest.raises(UserError, match=r"differ in the shape of 'image'.*resize or crop"):
    batches(odd, PLAIN)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"batch_size": 51}, "has 50 examples, fewer than one batch of 51"),
    ({"process_count": 5}, "batch_size=12 is not a multiple of 5 processes"),
    ({"process_index": 1}, "process_index=1 is not in 0..0"),
    ({"seed": -1}, "seed is -1"),
    ({"on_error": "ignore"}, "expected 'raise' or 'skip'"),
    ({"pp": "decod"}, "Did you mean 'decode'"),
  ],
)
def test_arguments(options, message):
  with pytest.raises(UserError, match=message):
    batches(**options)


def loader_threads() -> list[str]:
  return [t.name for t in threading.enumerate() if "grain-" in t.name]


def test_closing_stops_the_threads():
  before = set(loader_threads())
  with train_batches(numbers(50), PP, batch_size=12, seed=0, num_steps=10**6) as found:
    next(found)
    assert set(loader_threads()) - before
  for _ in range(100):
    if not set(loader_threads()) - before:
      break
    time.sleep(0.02)
  assert not set(loader_threads()) - before


def test_work_goes_on_while_the_caller_is_busy():
  made = []
  source = numbers(50)

  def read(indices):
    made.extend(indices)
    return source.read(indices)

  with train_batches(
    dataclasses.replace(source, read=read), PP, batch_size=10, seed=0, num_steps=50, prefetch=3
  ) as found:
    next(found)
    for _ in range(100):
      if len(made) >= 40:
        break
      time.sleep(0.02)
  assert len(made) >= 40


def test_overhead_is_small():
  """Of the CPU time, against preprocessing alone: tiny images, every annotation checked (20 times faster without)."""
  source = make_source(name="digits", split="train")
  pp = "decode|resize(24)|value_range(-1, 1)|onehot(10)|keep('image', 'labels')"
  with train_batches(source, pp, batch_size=64, seed=0, num_steps=100) as found:
    next(found)
    start = time.process_time()
    count = sum(len(batch["_id"]) for batch in found)
    each = (time.process_time() - start) / count
  prepare, start = parse(pp), time.process_time()
  for record in source.read(range(1000)):
    prepare(record, None)
  assert each < 2.5 * (time.process_time() - start) / 1000


# --- what is kept in memory ---


def counted(source):
  """The source, and a list of all indices read from it."""
  read = []

  def reading(indices):
    read.extend(indices)
    return source.read(indices)

  return dataclasses.replace(source, read=reading), read


@pytest.mark.parametrize("threads", [0, 3])
def test_examples_that_are_kept_are_read_once_and_give_the_same_batches(threads):
  pp = (
    "decode|resize(10)|random_crop(8)|flip_lr|value_range(-1, 1)|onehot(10)|keep('image', 'labels')"
  )
  digits, first = counted(make_source(name="digits", split="train[:40]"))
  arguments = dict(batch_size=8, seed=3, num_steps=15, threads=threads)
  with train_batches(digits, pp, **arguments) as batches:
    kept = list(batches)
  if not threads:  # else two epochs may want the same example at once
    assert sorted(first) == sorted([0, *range(40)])  # the first tells how large they are
  digits, every = counted(digits)
  with train_batches(digits, pp, **arguments, keep_mb=0) as batches:
    again = list(batches)
  assert len(every) == 120
  for one, other in zip(kept, again, strict=True):
    assert one.keys() == other.keys()
    assert all(np.array_equal(one[key], other[key]) for key in one)


def test_evaluation_batches_are_kept_from_pass_to_pass():
  digits, read = counted(make_source(name="digits", split="test[:10]"))
  batches = eval_batches(digits, "resize(4)|value_range(-1, 1)", batch_size=4, threads=0)
  first, second = list(batches), list(batches)
  assert sorted(read) == sorted([0, *range(10)])
  assert all(np.array_equal(a["image"], b["image"]) for a, b in zip(first, second, strict=True))


def test_what_does_not_fit_is_not_kept():
  synthetic, read = counted(
    make_source(name="synthetic", split="train", image_size=256, num_examples=6)
  )
  arguments = dict(batch_size=6, seed=0, num_steps=2, threads=0)
  list(train_batches(synthetic, "resize(256)", **arguments, keep_mb=1))  # 1.125 MiB
  assert len(read) == 1 + 12
  read.clear()
  list(train_batches(synthetic, "resize(128)", **arguments, keep_mb=1))
  assert len(read) == 1 + 6


def test_files_that_are_kept_count_with_their_bytes():
  """What is random begins with the decoding: it is the files themselves that would be kept."""
  file = b"x" * 2**20
  source = Source(
    "files", "train", 1, None, 2, lambda at: [{"image": file, "label": 0} for _ in at]
  )
  pp = parse("decode_inception_crop(8)|keep('image')")
  assert example_cache(source, pp, 2) is None  # with their labels they are a little more
  assert example_cache(source, pp, 3) is not None


def test_a_bad_example_is_not_kept_and_is_named_each_time():
  digits = make_source(name="digits", split="train[:8]")

  def read(indices):
    return [
      r | {"label": 99} if i == 5 else r for i, r in zip(indices, digits.read(indices), strict=True)
    ]

  batches = eval_batches(
    dataclasses.replace(digits, read=read),
    "value_range(-1, 1)",
    batch_size=4,
    threads=0,
    on_error="skip",
  )
  for _ in range(2):
    assert [batch["_mask"].sum() for batch in batches] == [4, 3]
    assert list(batches.errors) == [5]
