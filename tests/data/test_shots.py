"""Shots: the same for a seed, so many of each class, read no further than needed."""

import collections
import pickle

import numpy as np
import pytest

from flexivit_jax.data import by_class, eval_batches, few_shots, make_source, subset
from flexivit_jax.data.sources import Source
from flexivit_jax.errors import UserError

pytestmark = pytest.mark.faults

DIGITS = dict(name="digits", split="train")


def ids(source):
  return [source[i]["id"] for i in range(len(source))]


def labelled(labels, num_classes, read=None, names=None):
  """A source whose records are labels only."""

  def records(indices):
    (read if read is not None else []).extend(indices)
    return [{"image": b"", "label": labels[i], "id": str(i)} for i in indices]

  return Source("made", "train", num_classes, names, len(labels), records)


def test_so_many_of_each_class_that_are_the_first_of_more():
  source = make_source(**DIGITS)
  chosen = {shots: few_shots(source, shots=shots) for shots in (1, 5, 20)}
  for shots, few in chosen.items():
    counts = collections.Counter(few[i]["label"] for i in range(len(few)))
    assert counts == dict.fromkeys(range(10), shots) and len(set(ids(few))) == 10 * shots
  assert set(ids(chosen[1])) < set(ids(chosen[5])) < set(ids(chosen[20])) < set(ids(source))
  assert chosen[5].split == "50 of train" and chosen[5].class_names == source.class_names


def test_a_function_of_seed_and_split():
  source = make_source(**DIGITS)
  first, again, other = (few_shots(source, shots=3, seed=seed) for seed in (0, 0, 1))
  assert ids(first) == ids(again)
  assert len(set(ids(first)) & set(ids(other))) < 10


def test_reading_stops_when_every_class_is_full():
  labels = np.arange(100_000) % 4
  read = []
  few_shots(labelled(labels.tolist(), 4, read), shots=10)
  assert len(read) == 256 and len(set(read)) == 256


def test_a_subset_has_its_examples_in_order_and_can_be_sent_to_workers():
  source = make_source(**DIGITS)
  part = pickle.loads(pickle.dumps(subset(source, [7, 3, 1000])))
  assert ids(part) == [source[i]["id"] for i in (7, 3, 1000)]
  pp = "value_range(-1, 1)|onehot(10)|keep('image', 'labels')"
  (batch,) = eval_batches(part, pp, batch_size=4, threads=0)
  assert batch["_mask"].tolist() == [1, 1, 1, 0]
  assert batch["labels"].argmax(-1)[:3].tolist() == [source[i]["label"] for i in (7, 3, 1000)]
  assert ids(subset(part, [2, 0])) == [source[i]["id"] for i in (1000, 7)]


@pytest.mark.parametrize(
  ("source", "options", "message"),
  [
    (labelled([0] * 9 + [1] * 2, 3, names=("cat", "dog", "owl")), dict(shots=3),
     r"made 'train' has fewer than 3 examples of 2 classes: dog \(2\), owl \(0\); take a larger"),
    (labelled([0, 1, 7], 2), {}, r"\(id '2'\) of made 'train' has label 7; expected 0..1"),
    (labelled([0, 1, -1], 2), {}, r"has label -1; expected 0..1"),
    (labelled([0, 0], 1), {}, "has 1 class; shots need two or more"),
    (labelled([0, 1], 2), dict(shots=0), "shots=0, seed=0; expected 1 or more"),
    (labelled([0, 1], 2), dict(shots=1, seed=-1), "seed=-1; expected 1 or more, and 0 or more"),
  ],
)  # fmt: skip
def test_what_cannot_be_is_an_error(source, options, message):
  with pytest.raises(UserError, match=message):
    few_shots(source, **options)


def test_an_index_outside_is_an_error():
  source = make_source(**DIGITS)
  for index in (-1, 1437):
    with pytest.raises(UserError, match=f"'train' has 1437 examples, none of index {index}"):
      subset(source, [0, index])


def test_a_source_without_labels_of_images_has_no_shots_and_no_balance():
  source = Source("b", "train", 2, None, 3, lambda ii: [{"image": b"", "id": "a"} for _ in ii])
  with pytest.raises(UserError, match="no label of a whole image; shots"):
    few_shots(source, shots=1)
  with pytest.raises(UserError, match="no label of a whole image, so"):
    by_class(source)
