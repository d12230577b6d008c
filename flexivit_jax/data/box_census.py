"""What the boxes of a data set mean for training, as lines: which have no token at a size, crowds, repeated ones."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from flexivit_jax.data.preprocess import parse
from flexivit_jax.data.sources import Record, Source
from flexivit_jax.errors import UserError

_READ = 200  # examples that are read where the data have no list of boxes


class _Counts(NamedTuple):
  """Of each image: boxes to train with, those of crowds, those that repeat another one."""

  boxes: np.ndarray
  crowds: int
  repeated: int


def box_lines(source: Source, pp: str, tokens: Sequence[int]) -> list[str]:
  """Returns e.g. "at 25 tokens 53 of 929 boxes have no token, at 36 tokens 12; at 48 tokens each has one".

  And lines on images without a box or that cannot be read, on crowds, and on boxes that are there twice. Boxes are
  those of the data, before crops and mosaics: of their list, or of some images that are read. [] for data in a bucket,
  and for data that have no boxes at all.

  Args:
    source: the training data.
    pp: their preprocessing.
    tokens: numbers of tokens of the sizes that are trained.

  Raises:
    UserError: boxes stand for a crowd, and `pp` does not remove them.
  """
  if source.listing is None and source.ahead is not None:
    return []
  names = {op.function.__name__ for op in parse(pp).ops}
  records, bad = _records(source)
  counts = _counted(records, "without_crowd" in names)
  lines = []
  if counts.boxes.sum():
    lines.append(_without_token(counts.boxes, sorted({*tokens})))
    if len(counts.boxes) < len(source):
      lines[0] += f" (in {len(counts.boxes):,} of {len(source):,} images)"
    if "mosaic" in names:
      lines[0] += "; a mosaic has the boxes of all its tiles"
  if empty := int((counts.boxes == 0).sum()):
    lines.append(
      f"{empty:,} of {len(counts.boxes):,} images {'has' if empty == 1 else 'have'} no box"
    )
  if bad:
    lines.append(f"{bad:,} of {bad + len(records):,} images that were tried cannot be read")
  if counts.crowds and "without_crowd" not in names:
    raise UserError(
      f"{source.name} {source.split!r} has {counts.crowds:,} boxes that stand for a crowd, and are no objects to train"
      " with; write without_crowd() before pad_boxes in input.pp."
    )
  if counts.crowds:
    lines.append(f"{counts.crowds:,} boxes stand for a crowd, and are left out")
  if counts.repeated and "merge_boxes" not in names:
    lines.append(
      f"{counts.repeated:,} boxes repeat another one, class and corners; merge_boxes() in input.pp joins such"
    )
  return lines


def _without_token(boxes: np.ndarray, tokens: Sequence[int]) -> str:
  lost = {n: int(np.maximum(boxes - n, 0).sum()) for n in tokens}
  parts = [f"at {n:,} tokens {k:,}" for n, k in lost.items() if k]
  enough = [n for n, k in lost.items() if not k]
  total = f"{boxes.sum():,} boxes"
  if not parts:
    return f"each of {total} has a token at each size; at most {boxes.max():,} are in an image"
  parts[0] += f" of {total} have no token"
  rest = f"; at {enough[0]:,} tokens each has one" if enough else ""
  return ", ".join(parts) + rest


def _records(source: Source) -> tuple[list[Record], int]:
  """Returns the records of the list, or of some examples; and how many of these cannot be read."""
  if source.listing is not None:
    return [*source.listing()], 0
  records, bad = [], 0
  for index in np.unique(np.linspace(0, len(source) - 1, min(_READ, len(source))).astype(int)):
    try:
      records += source.read([int(index)])
    except Exception:  # where batches are made it ends the run, or is skipped, with its reason
      bad += 1
  return records, bad


def _counted(records: Iterable[Record], without_crowd: bool) -> _Counts:
  numbers, crowds, repeated = [], 0, 0
  for record in records:
    if "boxes" not in record:
      continue
    boxes = np.asarray(record["boxes"])
    crowd = int(np.count_nonzero(record.get("box_crowd", ())))
    numbers.append(len(boxes) - crowd * without_crowd)
    crowds += crowd
    if len(boxes) > 1:
      labels: Any = record.get("box_labels", np.zeros(len(boxes)))
      rows = np.column_stack([boxes, labels])
      repeated += len(rows) - len({*map(tuple, rows.tolist())})
  return _Counts(np.array(numbers, np.int64), crowds, repeated)
