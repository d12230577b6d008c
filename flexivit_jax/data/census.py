"""The number of examples, or of boxes, of each class, or its share of the pixels of masks, as one sentence."""

import statistics

import numpy as np
from jaxtyping import Int

from flexivit_jax.data import annotations
from flexivit_jax.data.sources import Source
from flexivit_jax.specs import NO_CLASS

_SHOWN = 10  # up to this many classes, all are named
_FEWEST = 3  # of more classes, this many are named
_MASKS = 100  # are decoded; a second for photographs of two megapixels


def class_sizes(source: Source) -> str | None:
  """Returns e.g. "3 classes: cat 120, dog 98, owl 0"; None if counting requires reading the examples.

  Of boxes it adds how many images have, e.g. "2 classes: cell 210, platelet 30; 1 to 9 boxes in each of 40 images".
  """
  if source.labels is not None:
    return _sentence(source, np.hstack(source.labels()), "examples")
  if source.listing is None:
    return None
  boxes = [record["box_labels"] for record in source.listing() if "box_labels" in record]
  counts = [len(labels) for labels in boxes]
  if not sum(counts):
    return None
  number = f"{min(counts)} to {max(counts)} boxes in each of {len(counts):,} images"
  labels = np.concatenate(boxes)
  sentence = _sentence(source, labels, "boxes")
  absent = source.num_classes - len(np.unique(labels))
  if absent and source.num_classes > _SHOWN:
    number = f"{absent:,} {'has' if absent == 1 else 'have'} no box; {number}"
  return f"{sentence}; {number}" if sentence else number


def pixel_shares(source: Source, most: int = _MASKS) -> str | None:
  """Returns e.g. "pixels in 100 of 367 masks: sky 16.8 %, road 31.0 %, no class 3.8 %; of bicyclist there is none".

  At most so many masks are read, evenly over the data set. None: the data are in a bucket, where reading takes long, or
  no mask can be read, which training says.
  """
  if source.ahead is not None or not source.num_classes:
    return None
  chosen = np.unique(np.linspace(0, len(source) - 1, min(most, len(source))).astype(int)).tolist()
  counts, read = np.zeros(source.num_classes + 1, np.int64), 0
  for index in chosen:
    try:
      (record,) = source.read([index])
      mask = annotations.read_mask(record)["mask"]
      found = np.bincount(
        np.where(mask == NO_CLASS, source.num_classes, mask).ravel(), minlength=len(counts)
      )
      counts, read = counts + found, read + 1
    except (
      KeyError,
      OSError,
      SyntaxError,
      ValueError,
    ):  # a bad example is found where batches are made
      continue
  if not read:
    return None
  names = [*(source.class_names or map(str, range(source.num_classes))), "no class"]
  shares = counts / counts.sum()
  seen = [f"{name} {share:.2%}" for name, share in zip(names, shares, strict=True) if share]
  absent = [name for name, share in zip(names[:-1], shares, strict=False) if not share]
  if len(seen) > 2 * _SHOWN:
    order = np.argsort(shares, kind="stable")
    order = order[shares[order] > 0]
    seen = [f"{names[k]} {shares[k]:.2%}" for k in [*order[: -_SHOWN - 1 : -1], *order[:_FEWEST]]]
    seen.insert(_SHOWN, "...")
  line = f"pixels in {read:,} of {len(source):,} masks: {', '.join(seen)}"
  if absent:
    of = ", ".join(absent[:_SHOWN]) + (f" and {len(absent) - _SHOWN} more" * (len(absent) > _SHOWN))
    line += f"; of {of} there is none" + (
      ""
      if read < len(source)
      else ", so it is not learned"
      if len(absent) == 1
      else ", so they are not learned"
    )
  return line


def _sentence(source: Source, labels: Int[np.ndarray, " m"], what: str) -> str | None:
  """Returns the sentence about the classes of these labels; None for fewer than two classes."""
  if source.num_classes < 2:
    return None
  counts = np.bincount(labels.astype(int), minlength=source.num_classes).tolist()
  names = source.class_names or tuple(map(str, range(source.num_classes)))
  shown = (name if name.isprintable() else repr(name) for name in names)
  named = [f"{name} {count}" for name, count in zip(shown, counts, strict=True)]
  if len(named) <= _SHOWN:
    return f"{len(named)} classes: {', '.join(named)}"
  order = sorted(range(len(named)), key=lambda k: (counts[k], k))
  fewest = ", ".join(named[k] for k in order[:_FEWEST])
  return (
    f"{len(named)} classes of {min(counts)} to {max(counts)} {what}, median {statistics.median(counts):g};"
    f" fewest: {fewest}"
  )
