"""A few examples of each class: the training data of a few-shot probe."""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import numpy as np

from flexivit_jax import heartbeat
from flexivit_jax.data.sources import Record, Source
from flexivit_jax.errors import UserError

_CHUNK = 256  # Records per request: enough for array_record to be fast, little to read in vain.


def few_shots(source: Source, *, shots: int = 10, seed: int = 0) -> Source:
  """The first `shots` examples of each class in an order that the seed mixes.

  Which ones of a class these are depends on the seed and the split alone, so fewer shots are the first of more.
  Records are read in that order until every class is full, and no image is decoded: of 1,000 equally frequent
  classes, 10 shots each need about 23 records a class (simulated).

  Args:
    source: a split with labels.
    shots: examples of each class.
    seed: of the order.

  Raises:
    UserError: a class with too few examples, a label that is none, fewer than two classes.
  """
  if shots < 1 or seed < 0:
    raise UserError(f"shots={shots}, seed={seed}; expected 1 or more, and 0 or more.")
  if source.num_classes < 2:
    raise UserError(f"{_name(source)} has {source.num_classes} class; shots need two or more.")
  found = _first_of_each(source, shots, np.random.default_rng(seed).permutation(len(source)))
  _check_full(source, shots, found)
  return subset(source, sorted(index for indices in found for index in indices))


def subset(source: Source, indices: Sequence[int]) -> Source:
  """The examples of a source at these indices, in their order.

  Raises:
    UserError: an index that the source does not have.
  """
  outside = [i for i in indices if not 0 <= i < len(source)]
  if outside:
    raise UserError(f"{_name(source)} has {len(source)} examples, none of index {outside[0]}.")
  read = functools.partial(_read_at, source.read, tuple(int(i) for i in indices))
  split = f"{len(indices)} of {source.split}"
  return dataclasses.replace(source, split=split, size=len(indices), read=read, labels=None)


def _read_at(
  read: Callable[[Sequence[int]], list[Record]], chosen: Sequence[int], indices: Sequence[int]
) -> list[Record]:
  return read([chosen[i] for i in indices])


def _first_of_each(source: Source, shots: int, order: np.ndarray) -> list[list[int]]:
  """For each class the indices of its first `shots` examples in this order; stops when all are full."""
  found: list[list[int]] = [[] for _ in range(source.num_classes)]
  lacking = shots * source.num_classes
  for start in range(0, len(order), _CHUNK):
    indices = order[start : start + _CHUNK].tolist()
    for index, record in zip(indices, source.read(indices), strict=True):
      label = record["label"]
      if not 0 <= label < source.num_classes:
        message = f"Example {index} (id {record['id']!r}) of {_name(source)} has label {label}"
        raise UserError(f"{message}; expected 0..{source.num_classes - 1}.")
      if len(found[label]) < shots:
        found[label].append(index)
        lacking -= 1
    heartbeat.beat()
    if not lacking:
      break
  return found


def _check_full(source: Source, shots: int, found: Sequence[Sequence[int]]) -> None:
  names = source.class_names or range(source.num_classes)
  few = [f"{n} ({len(found[k])})" for k, n in enumerate(names) if len(found[k]) < shots]
  if few:
    shown = ", ".join(few[:5]) + (", ..." if len(few) > 5 else "")
    raise UserError(
      f"{_name(source)} has fewer than {shots} examples of {len(few)} classes: {shown}; take a larger split or fewer"
      " shots."
    )


def _name(source: Source) -> str:
  return f"{source.name} {source.split!r}"
