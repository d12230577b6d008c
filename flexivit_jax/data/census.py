"""The number of examples of each class, as one sentence."""

import statistics

import numpy as np

from flexivit_jax.data.sources import Source

_SHOWN = 10  # up to this many classes, all are named
_FEWEST = 3  # of more classes, this many are named


def class_sizes(source: Source) -> str | None:
  """Returns e.g. "3 classes: cat 120, dog 98, owl 0"; None if the labels require reading the examples."""
  if source.labels is None or source.num_classes < 2:
    return None
  labels = np.hstack(source.labels())
  counts = np.bincount(labels.astype(int), minlength=source.num_classes).tolist()
  names = source.class_names or tuple(map(str, range(source.num_classes)))
  shown = (name if name.isprintable() else repr(name) for name in names)
  named = [f"{name} {count}" for name, count in zip(shown, counts, strict=True)]
  if len(named) <= _SHOWN:
    return f"{len(named)} classes: {', '.join(named)}"
  order = sorted(range(len(named)), key=lambda k: (counts[k], k))
  fewest = ", ".join(named[k] for k in order[:_FEWEST])
  return (
    f"{len(named)} classes of {min(counts)} to {max(counts)} examples, median {statistics.median(counts):g};"
    f" fewest: {fewest}"
  )
