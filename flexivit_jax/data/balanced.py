"""Balanced sampling: the order in which each class comes equally often, as a pure function of (seed, position).

An epoch has as many positions as there are examples, in a mixed order, and each class has an equal share of them: the
counts of two classes in an epoch differ by at most one, and the classes that have one more take turns. The draws of a
class are a stream of their own over all epochs: round after round, each a new permutation of the examples of the class.
So after any number of draws two examples of a class were seen equally often or one differs by one, and no state is
needed. Of n examples in c classes, an example of a class of m is seen n / (c * m) times an epoch on average.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from flexivit_jax import heartbeat
from flexivit_jax.data.sources import Label, Source
from flexivit_jax.errors import UserError

_CHUNK = 1024


class Balanced(NamedTuple):
  """Examples by class, of the classes that have any; those of class k: `indices[first[k] : first[k] + number[k]]`."""

  indices: Int[np.ndarray, "n"]
  first: Int[np.ndarray, "c"]
  number: Int[np.ndarray, "c"]


class Place(NamedTuple):
  """What is at a position of a stream. The random draws of an example are seeded by (seed, round, example)."""

  round: int
  example: int


def by_class(source: Source) -> Balanced:
  """Sorts the examples of a source by class.

  Raises:
    UserError: an example has no label or several.
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
  """The label of every example; a source that cannot tell them alone is read once, and no image is decoded.

  Raises:
    UserError: a label that is none of the classes.
  """
  if source.labels is not None:
    labels = source.labels()
  else:
    labels = []
    for start in range(0, len(source), _CHUNK):
      records = source.read(range(start, min(start + _CHUNK, len(source))))
      labels.extend(record["label"] for record in records)
      heartbeat.beat()
  for index, label in enumerate(labels):
    for number in label if isinstance(label, tuple) else (label,):
      if not 0 <= number < source.num_classes:
        raise UserError(
          f"Example {index} of {source.name} {source.split!r} has label {number}; expected 0..{source.num_classes - 1}."
        )
  return labels


def place(order: Balanced, seed: int, position: int, ahead: int = 0) -> Place:
  """What is at a position of the balanced stream.

  Args:
    order: of `by_class`.
    seed: of the run.
    position: from 0; `len(order.indices)` make an epoch.
    ahead: takes the example so many further in the round of its class, for one that cannot be read. Beyond the end of
      the class, an example of later positions of the epoch.
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
  """The place of `slot` in a permutation of `size` that the seed names."""
  from grain.experimental import index_shuffle

  return index_shuffle(slot, max_index=size - 1, seed=_seed(seed), rounds=4)


@functools.lru_cache(maxsize=4096)
def _seed(seed: tuple[int, ...]) -> int:
  return int(np.random.SeedSequence(seed).generate_state(1)[0])
