"""A few examples of each class: the training data of a few-shot probe."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

from flexivit_jax import heartbeat
from flexivit_jax.data.sources import Source
from flexivit_jax.errors import UserError

_Result = TypeVar("_Result")
_CHUNK = 256  # Records per request: fast for array_record, and few are read in vain.


def few_shots(source: Source, *, shots: int = 10, seed: int = 0) -> Source:
  """Returns the first `shots` examples of each class, in an order shuffled by the seed.

  They depend on the seed and the split alone, so fewer shots are a subset of more. Records are read in this order
  until every class is full, and no image is decoded: with 1,000 equally frequent classes, 10 shots each need about
  23 records a class (simulated).

  Args:
    source: a split with labels.
    shots: examples of each class.
    seed: of the order.

  Raises:
    UserError: a class has too few examples, a label is out of range, there are fewer than two classes.
  """
  if shots < 1 or seed < 0:
    raise UserError(f"shots={shots}, seed={seed}; expected 1 or more, and 0 or more.")
  if source.num_classes < 2:
    raise UserError(f"{_name(source)} has {source.num_classes} class; shots need two or more.")
  by_class = _first_of_each(source, shots, np.random.default_rng(seed).permutation(len(source)))
  _check_full(source, shots, by_class)
  return subset(source, sorted(index for indices in by_class for index in indices))


def subset(source: Source, indices: Sequence[int]) -> Source:
  """Returns a source of the examples at these indices, in their order.

  Raises:
    UserError: an index is outside the source.
  """
  outside = [i for i in indices if not 0 <= i < len(source)]
  if outside:
    raise UserError(f"{_name(source)} has {len(source)} examples, none of index {outside[0]}.")
  chosen = tuple(int(i) for i in indices)
  read = functools.partial(_at, source.read, chosen)
  ahead = source.ahead and functools.partial(_at, source.ahead, chosen)
  split = f"{len(indices)} of {source.split}"
  return dataclasses.replace(
    source, split=split, size=len(indices), read=read, ahead=ahead, labels=None, listing=None
  )


def _at(
  call: Callable[[Sequence[int]], _Result], chosen: Sequence[int], indices: Sequence[int]
) -> _Result:
  return call([chosen[i] for i in indices])


def _first_of_each(source: Source, shots: int, order: np.ndarray) -> list[list[int]]:
  """Returns for each class the indices of its first `shots` examples in this order; stops when all are full."""
  by_class: list[list[int]] = [[] for _ in range(source.num_classes)]
  lacking = shots * source.num_classes
  for start in range(0, len(order), _CHUNK):
    indices = order[start : start + _CHUNK].tolist()
    for index, record in zip(indices, source.read(indices), strict=True):
      if "label" not in record:
        raise UserError(f"{_name(source)} has no label of a whole image; shots need one.")
      label = record["label"]
      if not 0 <= label < source.num_classes:
        message = f"Example {index} (id {record['id']!r}) of {_name(source)} has label {label}"
        raise UserError(f"{message}; expected 0..{source.num_classes - 1}.")
      if len(by_class[label]) < shots:
        by_class[label].append(index)
        lacking -= 1
    heartbeat.beat()
    if not lacking:
      break
  return by_class


def _check_full(source: Source, shots: int, by_class: Sequence[Sequence[int]]) -> None:
  names = source.class_names or range(source.num_classes)
  few = [f"{n} ({len(by_class[k])})" for k, n in enumerate(names) if len(by_class[k]) < shots]
  if few:
    shown = ", ".join(few[:5]) + (", ..." if len(few) > 5 else "")
    raise UserError(
      f"{_name(source)} has fewer than {shots} examples of {len(few)} classes: {shown}; take a larger split or fewer"
      " shots."
    )


def _name(source: Source) -> str:
  return f"{source.name} {source.split!r}"
