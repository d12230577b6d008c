"""scikit-learn's handwritten digits."""

import functools
from collections.abc import Sequence

import numpy as np

from flexivit_jax.data.sources.base import Label, Record, Source, select


def digits_source(*, split: str) -> Source:
  """scikit-learn's 1,797 handwritten digits, 8 x 8 pixels as uint8 [8, 8, 3], 10 classes.

  `train` is 1,437 of them and `test` 360, divided by a fixed permutation; ids are
  scikit-learn's row numbers.
  """
  order = np.random.default_rng(0).permutation(1797).tolist()
  stored = {"train": order[:1437], "test": order[1437:]}
  rows = select(split, stored)
  names = tuple(str(digit) for digit in range(10))
  read, labels = functools.partial(_read_digits, rows), functools.partial(_digits_labels, rows)
  return Source("digits", split, 10, names, len(rows), read, labels)


def _digits_labels(rows: Sequence[int]) -> list[Label]:
  return [int(_load_digits()[1][row]) for row in rows]


@functools.cache
def _load_digits() -> tuple[np.ndarray, np.ndarray]:
  from sklearn.datasets import load_digits  # Lazy: a second, and only this source needs it.

  images, labels = load_digits(return_X_y=True)
  grey = np.rint(images.reshape(-1, 8, 8, 1) * (255 / 16)).astype(np.uint8)
  return np.repeat(grey, 3, axis=-1), labels


def _read_digits(rows: Sequence[int], indices: Sequence[int]) -> list[Record]:
  images, labels = _load_digits()
  chosen = [rows[i] for i in indices]
  return [{"image": images[r], "label": int(labels[r]), "id": f"digits_{r:04}"} for r in chosen]
