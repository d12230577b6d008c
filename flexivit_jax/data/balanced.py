"""Balanced sampling: an order with equally many examples of each class, as a pure function of (seed, position).

An epoch has one position for each example, shuffled, and each class gets an equal share of the positions: the counts of
two classes in an epoch differ by at most one, and the classes with one more take turns. The draws of a class form a
stream over all epochs: round after round, each a new permutation of the examples of the class. So after any number of
draws, the counts of two examples of a class differ by at most one, and no state is needed. With n examples in c
classes, an example in a class of m examples is seen n / (c * m) times an epoch on average.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from flexivit_jax import heartbeat
from flexivit_jax.data.sources import Label, Record, Source
from flexivit_jax.errors import UserError

_CHUNK = 1024


class Balanced(NamedTuple):
  """Examples by class, without empty classes; class k has `indices[first[k] : first[k] + number[k]]`."""

  indices: Int[np.ndarray, "n"]
  first: Int[np.ndarray, "c"]
  number: Int[np.ndarray, "c"]


class Place(NamedTuple):
  """The example at a position of a stream. Its random draws are seeded by (seed, round, example)."""

  round: int
  example: int


def by_class(source: Source) -> Balanced:
  """Sorts the examples of a source by class.

  Raises:
    UserError: an example has no label, or several.
  """
  labels = np.array([_only(source, i, label) for i, label in enumerate(labels_of(source))])
  count = np.bincount(labels)
  present = np.flatnonzero(count)
  first = np.concatenate([[0], np.cumsum(count)])[present]
  return Balanced(np.argsort(labels, kind="stable"), first, count[present])


def _only(source: Source, index: int, label: Label) -> int:
  several = label if isinstance(label, tuple) else (label,)
  if len(several) != 1:
    raise UserError(
      f"sampler='balanced' needs one label an image; example {index} of {source.name} {source.split!r} has {label}."
    )
  return several[0]


@functools.lru_cache(maxsize=8)
def labels_of(source: Source) -> Sequence[Label]:
  """Returns the label of every example; reads a source without `labels` once, decoding no image.

  Raises:
    UserError: a label is out of range.
  """
  if source.labels is not None:
    labels = source.labels()
  else:
    labels = []
    for start in range(0, len(source), _CHUNK):
      records = source.read(range(start, min(start + _CHUNK, len(source))))
      labels.extend(_label(source, record) for record in records)
      heartbeat.beat()
  for index, label in enumerate(labels):
    for number in label if isinstance(label, tuple) else (label,):
      if not 0 <= number < source.num_classes:
        raise UserError(
          f"Example {index} of {source.name} {source.split!r} has label {number}; expected 0..{source.num_classes - 1}."
        )
  return labels


def _label(source: Source, record: Record) -> Label:
  if "label" not in record:
    raise UserError(
      f"{source.name} {source.split!r} has no label of a whole image, so its examples cannot be balanced by class."
    )
  return record["label"]


def place(order: Balanced, seed: int, position: int, ahead: int = 0) -> Place:
  """Returns the place at a position of the balanced stream.

  Args:
    order: the result of `by_class`.
    seed: of the run.
    position: from 0; an epoch has `len(order.indices)`.
    ahead: moves this many examples further in the round of the class, to replace one that cannot be read; after the
      last example of the class, to later positions of the epoch.
  """
  size, classes = len(order.indices), len(order.number)
  epoch, slot = divmod(position, size)
  share, extra = divmod(size, classes)
  mixed = shuffled(slot, size, (seed, epoch))
  # The first `extra` classes in turn have one more.
  longer = extra * (share + 1)
  if mixed < longer:
    turn, drawn = divmod(mixed, share + 1)
  else:
    turn, drawn = divmod(mixed - longer, share)
    turn += extra
  k = (epoch * extra + turn) % classes
  count = int(order.number[k])
  if ahead >= count:
    return place(order, seed, epoch * size + (slot + ahead - count + 1) % size)
  # Of the `epoch * extra` turns before, those with remainder k were this class's.
  earlier = epoch * share + (epoch * extra - k + classes - 1) // classes
  number, within = divmod(earlier + drawn, count)
  within = shuffled((within + ahead) % count, count, (seed, number, k))
  return Place(number, int(order.indices[order.first[k] + within]))


def shuffled(slot: int, size: int, seed: tuple[int, ...]) -> int:
  """Returns the place of `slot` in a permutation of `size`, which the seed determines."""
  from grain.experimental import index_shuffle

  return index_shuffle(slot, max_index=size - 1, seed=_seed(seed), rounds=4)


@functools.lru_cache(maxsize=4096)
def _seed(seed: tuple[int, ...]) -> int:
  return int(np.random.SeedSequence(seed).generate_state(1)[0])
