"""A source whose labels are mapped to the numbers of other classes, those of a model."""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import numpy as np

from flexivit_jax.data.sources import Label, Record, Source
from flexivit_jax.errors import UserError


def renumber(
  source: Source, labels: Sequence[int], num_classes: int, class_names: Sequence[str]
) -> Source:
  """Returns the same examples in the same order with new labels, of images and of boxes, and new groups of classes.

  Args:
    source: a source.
    labels: the new label of each class of the source.
    num_classes: of the new labels.
    class_names: of the new labels.
  """
  names, new = tuple(class_names), tuple(labels)
  labels_of, groups = source.labels, source.class_groups
  return dataclasses.replace(
    source,
    num_classes=num_classes,
    class_names=names,
    read=functools.partial(_read, source.read, new),
    labels=labels_of and functools.partial(_labels, labels_of, new),
    listing=None,
    class_groups=groups and {k: tuple(_one(i, new) for i in v) for k, v in groups.items()},
  )


def _labels(labels_of: Callable[[], list[Label]], labels: tuple[int, ...]) -> list[Label]:
  return [_new(label, labels) for label in labels_of()]


def _read(
  read: Callable[[Sequence[int]], list[Record]], labels: tuple[int, ...], indices: Sequence[int]
) -> list[Record]:
  return [_renumbered(record, labels) for record in read(indices)]


def _renumbered(record: Record, labels: tuple[int, ...]) -> Record:
  if "mask" in record:
    raise UserError(
      "the classes of a mask are its values, which are not renumbered; list the class names of the data in the order"
      " of the model's"
    )
  new = dict(record)
  if "label" in record:
    new["label"] = _new(record["label"], labels)
  for key in ("box_labels", "neg_labels", "not_exhaustive"):
    if key in record:
      new[key] = np.array([_one(int(k), labels) for k in record[key]], np.int64)
  return new


def _new(label: Label, labels: tuple[int, ...]) -> Label:
  if isinstance(label, tuple):
    return tuple(_one(k, labels) for k in label)
  return _one(label, labels)


def _one(label: int, labels: tuple[int, ...]) -> int:
  if not 0 <= label < len(labels):
    raise UserError(f"label is {label}; expected 0..{len(labels) - 1}")
  return labels[label]
