"""Images made from their number."""

import functools
from collections.abc import Sequence
from typing import Any

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
  annotated: bool = False,
  classes: Sequence[str] | None = None,
) -> Source:
  """Images made from their number: a wave whose direction and colour tell the class, and noise.

  Args:
    split: of `train`, `validation`, `test`, `full`, each with `num_examples` different examples.
    image_size: pixels, an int or (h, w).
    num_classes: example i has label i modulo this.
    num_examples: in each split.
    seed: of the noise and the phases; the classes look the same for every seed.
    annotated: draws one to four rectangles into each image, in the colours of their classes, and says so in "boxes",
      "box_labels", "box_ids", "mask" (255 outside of them) and "captions": to try a task without its data.
    classes: the names of the classes; None: they have none.
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
  if annotated and num_classes > 255:
    raise UserError(f"num_classes={num_classes} with annotated; a mask of 8 bits holds 255.")
  if classes is not None and (isinstance(classes, str) or len(classes) != num_classes):
    raise UserError(f"classes={classes!r:.80}; expected a list of {num_classes} names.")
  options = ((hw[0], hw[1]), num_classes, num_examples, seed, annotated)
  read = functools.partial(_read_synthetic, rows, *options)
  labels = functools.partial(_synthetic_labels, rows, num_classes, num_examples)
  class_names = None if classes is None else tuple(classes)
  return Source("synthetic", split, num_classes, class_names, len(rows), read, labels)


def _synthetic_labels(rows: Sequence[int], num_classes: int, num_examples: int) -> list[Label]:
  return [row % num_examples % num_classes for row in rows]


def _read_synthetic(
  rows: Sequence[int],
  hw: tuple[int, int],
  num_classes: int,
  num_examples: int,
  seed: int,
  annotated: bool,
  indices: Sequence[int],
) -> list[Record]:
  def make(row: int) -> Record:
    label = row % num_examples % num_classes
    rng = np.random.default_rng((seed, row))
    image = _wave(hw, label, num_classes, rng)
    record: Record = {"image": image, "label": label, "id": f"synthetic_{row}"}
    return {**record, **_rectangles(image, row, num_classes, rng)} if annotated else record

  return [make(rows[i]) for i in indices]


def _wave(
  hw: tuple[int, int], label: int, num_classes: int, rng: np.random.Generator
) -> np.ndarray:
  turn = label / num_classes
  y, x = np.ogrid[: hw[0], : hw[1]]
  along = x / hw[1] * np.cos(np.pi * turn) + y / hw[0] * np.sin(np.pi * turn)
  wave = np.sin(2 * np.pi * (3 * along + rng.random()))[..., None]
  colour = _colour(label, num_classes)
  noise = rng.standard_normal((*hw, 1), dtype=np.float32)
  return np.clip(127.5 + 80 * wave * colour + 25 * noise, 0, 255).astype(np.uint8)


def _colour(label: int, num_classes: int) -> np.ndarray:
  return 0.5 + 0.5 * np.cos(2 * np.pi * (label / num_classes + np.arange(3) / 3))


def _rectangles(
  image: np.ndarray, row: int, num_classes: int, rng: np.random.Generator
) -> dict[str, Any]:
  """Draws into the image, and returns what there is to know of it; a later rectangle hides earlier ones."""
  h, w = image.shape[:2]
  number = int(rng.integers(1, 5))
  labels = rng.integers(num_classes, size=number)
  mask = np.full((h, w), 255, np.uint8)
  boxes = np.zeros((number, 4), np.float32)
  for i, label in enumerate(labels.tolist()):
    sides = [max(1, int(n * rng.uniform(0.2, 0.6))) for n in (w, h)]
    x0, y0 = (int(rng.integers(n - m + 1)) for n, m in zip((w, h), sides, strict=True))
    x1, y1 = x0 + sides[0], y0 + sides[1]
    boxes[i] = x0, y0, x1, y1
    image[y0:y1, x0:x1] = np.rint(255 * _colour(label, num_classes))
    mask[y0:y1, x0:x1] = label
  caption = "rectangles of " + " and ".join(f"class {label}" for label in labels)
  return {
    "boxes": boxes,
    "box_labels": labels.astype(np.int64),
    "box_ids": np.arange(number, dtype=np.int64) + 4 * row,
    "mask": mask,
    "captions": (caption,),
  }
