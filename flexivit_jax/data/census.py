"""The number of examples, or of boxes, of each class, as one sentence."""

import statistics

import numpy as np
from jaxtyping import Int

from flexivit_jax.data.sources import Source

_SHOWN = 10  # up to this many classes, all are named
_FEWEST = 3  # of more classes, this many are named


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
  sentence = _sentence(source, np.concatenate(boxes), "boxes")
  return f"{sentence}; {number}" if sentence else number


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
