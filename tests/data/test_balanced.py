"""Balanced sampling: each class equally often in every epoch, each example of a class equally often over all epochs."""

import collections
import dataclasses

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from flexivit_jax.data import make_source, renumber, subset, train_batches
from flexivit_jax.data.balanced import by_class, labels_of, place
from flexivit_jax.data.preprocess import parse
from flexivit_jax.data.sources import Source
from flexivit_jax.data.stream import BatchPlan, make_chunk, place_of
from flexivit_jax.errors import UserError

pytestmark = pytest.mark.faults

PP = "random_crop(2)|value_range|keep('image')"
counts_of_classes = st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(any)


def source_of(labels, known=True, broken=()):
  def read(indices):
    image = np.arange(300, dtype=np.uint8).reshape(10, 10, 3)
    bad = np.zeros((10, 10), np.float64)
    return [
      {"image": bad if i in broken else image, "label": labels[i], "id": str(i)} for i in indices
    ]

  classes = 1 + max(np.max(label) for label in labels)
  return Source(
    "made", "train", int(classes), None, len(labels), read, (lambda: labels) if known else None
  )


def made(counts):
  labels = [k for k, count in enumerate(counts) for _ in range(count)]
  return [labels[i] for i in np.random.default_rng(0).permutation(len(labels))]


def plan(source, **changes):
  fixed = dict(seed=5, batch_size=4, local=4, offset=0, chunks=1, on_error="raise", max_errors=9)
  return BatchPlan(source, parse(PP), **fixed, order=by_class(source))._replace(**changes)


@hypothesis.settings(max_examples=8)
@hypothesis.given(counts_of_classes, st.integers(0, 2**32 - 1))
def test_in_each_epoch_the_classes_differ_by_at_most_one(counts, seed):
  labels = made(counts)
  order, n = by_class(source_of(labels)), len(labels)
  longer = collections.Counter()
  classes = sum(map(bool, counts))
  for epoch in range(classes):
    drawn = [labels[place(order, seed, epoch * n + i).example] for i in range(n)]
    found = collections.Counter(drawn)
    assert len(drawn) == n and set(found) <= set(labels)
    share = n // classes
    assert {found[k] for k in set(labels)} <= {share, share + 1}
    longer.update(found)
  assert {longer[k] for k in set(labels)} == {n}  # who has one more takes turns


@hypothesis.settings(max_examples=10)
@hypothesis.given(counts_of_classes, st.integers(0, 99), st.integers(1, 60))
def test_after_any_number_of_draws_examples_of_a_class_differ_by_at_most_one(counts, seed, draws):
  labels = made(counts)
  order, n = by_class(source_of(labels)), len(labels)
  draws = -(-draws // n) * n  # within an epoch the order is mixed
  places = [place(order, seed, i) for i in range(draws)]
  seen = collections.Counter(p.example for p in places)
  for k in set(labels):
    times = [seen[i] for i, label in enumerate(labels) if label == k]
    assert max(times) - min(times) <= 1
  assert len(set(places)) == draws  # so that no two of an example have the same random draws


@hypothesis.settings(max_examples=5)
@hypothesis.given(counts_of_classes, st.integers(1, 4), st.integers(0, 12))
def test_the_stream_is_the_same_for_any_number_of_processes_and_wherever_it_starts(
  counts, processes, start
):
  source = source_of(made(counts), known=False)
  whole = plan(source, batch_size=12, local=12)
  for step in (start, start + 1):
    ids = make_chunk(whole, step)[0]["_id"].tolist()
    local = 12 // processes
    parts = [
      make_chunk(whole._replace(local=local, offset=i * local), step)[0]["_id"].tolist()
      for i in range(processes)
    ]
    assert [i for part in parts for i in part] == ids
    assert ids == [place_of(whole, 12 * step + i).example for i in range(12)]


def batches(source, **options):
  fixed = dict(batch_size=4, seed=3, num_steps=12, threads=2, sampler="balanced")
  return train_batches(source, PP, **{**fixed, **options})


def test_it_goes_on_in_the_middle_with_the_same_examples_and_crops():
  source = source_of(made([1, 9, 3]))
  with batches(source) as whole:
    expected = list(whole)
  with batches(source) as first:
    head = [next(first) for _ in range(5)]
    state = first.get_state()
  with batches(source, threads=0) as second:
    second.set_state(state)
    found = head + list(second)
  for a, b in zip(found, expected, strict=True):
    np.testing.assert_array_equal(a["_id"], b["_id"])
    np.testing.assert_array_equal(a["image"], b["image"])
  other = train_batches(source, PP, batch_size=4, seed=3, num_steps=12)
  with pytest.raises(UserError, match="sampler=balanced, this run shuffle"):
    other.set_state(state)
  with pytest.raises(UserError, match="sampler=shuffle, this run balanced"):
    batches(source).set_state(other.get_state())


def test_an_example_that_comes_twice_in_an_epoch_is_cropped_anew():
  source = source_of([0] + 19 * [1])
  with batches(source, batch_size=20, num_steps=1) as found:
    batch = next(found)
  crops = batch["image"][batch["_id"] == 0]
  assert len(crops) == 10 and len({crop.tobytes() for crop in crops}) > 5


def test_a_broken_example_is_replaced_by_one_of_its_class():
  labels = made([4, 12])
  rare = [i for i, label in enumerate(labels) if label == 0]
  with batches(source_of(labels, broken=rare[:1]), on_error="skip", num_steps=8) as found:
    ids = np.concatenate([batch["_id"] for batch in found])
  drawn = collections.Counter(labels[i] for i in ids)
  assert rare[0] not in ids and drawn[0] == drawn[1] == 16


@pytest.mark.parametrize("label", [(0, 1), ()])
def test_an_image_of_several_labels_or_none_is_an_error_that_names_it(label):
  source = dataclasses.replace(source_of([0, 1, 2, 2]), labels=lambda: [0, label, 1, 2])
  with pytest.raises(UserError, match=r"needs one label an image; example 1 of made 'train' has"):
    batches(source)


def test_a_sampler_that_does_not_exist_is_an_error():
  with pytest.raises(UserError, match=r"'balancd'.*Did you mean 'balanced'"):
    batches(source_of([0, 1, 2, 2]), sampler="balancd")


@pytest.mark.parametrize("split", ["train", "test[10%:60%]", "train+test"])
@pytest.mark.parametrize("name", ["digits", "synthetic"])
def test_sources_know_the_labels_that_they_read(name, split):
  source = make_source(name=name, split=split)
  ids = range(0, len(source), 50)
  assert [source[i]["label"] for i in ids] == [labels_of(source)[i] for i in ids]


def test_a_source_with_other_labels_knows_those():
  source = make_source(name="digits", split="test")
  other = renumber(source, tuple(range(9, -1, -1)), 12, tuple("abcdefghijkl"))
  assert labels_of(other) == [9 - label for label in labels_of(source)]
  part = subset(source, (5, 3))
  assert labels_of(part) == [source[5]["label"], source[3]["label"]]
