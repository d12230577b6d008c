"""Images made from their number."""

import functools
from collections.abc import Sequence

import numpy as np

from flexivit_jax.data.sources.base import Label, Record, Source, select
from flexivit_jax.errors import UserError


def synthetic_source(
  *,
  split: str,
  image_size: int | Sequence[int] = 32,
  num_classes: int = 10,
  num_examples: int = 1024,
  seed: int = 0,
) -> Source:
  """Images made from their number: a wave whose direction and colour tell the class, and noise.

  Args:
    split: of `train`, `validation`, `test`, `full`, each with `num_examples` different examples.
    image_size: pixels, an int or (h, w).
    num_classes: example i has label i modulo this.
    num_examples: in each split.
    seed: of the noise and the phases; the classes look the same for every seed.
  """
  hw = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
  if len(hw) != 2 or min(*hw, num_classes, num_examples) < 1 or seed < 0:
    raise UserError(
      f"image_size={image_size}, num_classes={num_classes}, num_examples={num_examples}, seed={seed}; expected one side"
      " or two, all 1 or more, and a seed of 0 or more."
    )
  names = ("train", "validation", "test", "full")
  stored = {s: range(k * num_examples, (k + 1) * num_examples) for k, s in enumerate(names)}
  rows = select(split, stored)
  read = functools.partial(_read_synthetic, rows, (hw[0], hw[1]), num_classes, num_examples, seed)
  labels = functools.partial(_synthetic_labels, rows, num_classes, num_examples)
  return Source("synthetic", split, num_classes, None, len(rows), read, labels)


def _synthetic_labels(rows: Sequence[int], num_classes: int, num_examples: int) -> list[Label]:
  return [row % num_examples % num_classes for row in rows]


def _read_synthetic(
  rows: Sequence[int],
  hw: tuple[int, int],
  num_classes: int,
  num_examples: int,
  seed: int,
  indices: Sequence[int],
) -> list[Record]:
  def make(row: int) -> Record:
    label = row % num_examples % num_classes
    image = _wave(hw, label, num_classes, np.random.default_rng((seed, row)))
    return {"image": image, "label": label, "id": f"synthetic_{row}"}

  return [make(rows[i]) for i in indices]


def _wave(
  hw: tuple[int, int], label: int, num_classes: int, rng: np.random.Generator
) -> np.ndarray:
  turn = label / num_classes
  y, x = np.ogrid[: hw[0], : hw[1]]
  along = x / hw[1] * np.cos(np.pi * turn) + y / hw[0] * np.sin(np.pi * turn)
  wave = np.sin(2 * np.pi * (3 * along + rng.random()))[..., None]
  colour = 0.5 + 0.5 * np.cos(2 * np.pi * (turn + np.arange(3) / 3))
  noise = rng.standard_normal((*hw, 1), dtype=np.float32)
  return np.clip(127.5 + 80 * wave * colour + 25 * noise, 0, 255).astype(np.uint8)
