"""Samples of detection to look at: the first images of a data set with their boxes, and with what is found in them."""

import io
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Integer

from flexivit_jax.data import box_pictures
from flexivit_jax.data.box_pictures import Drawn

LONGEST = 640  # pixels of the longer side
MOST = 20  # detections that are drawn
LEAST = 0.1  # score of those


class Labelled(NamedTuple):
  """Boxes (x0, y0, x1, y1) in shares of the image, numbers of their classes, and scores, the largest first."""

  box: Float[np.ndarray, "m 4"]
  label: Integer[np.ndarray, "m"]
  score: Float[np.ndarray, "m"] | None = None


class Sample(NamedTuple):
  """An image in [-1, 1], its origin, its true boxes, and what is found by the name of the size."""

  image: Float[np.ndarray, "h w c"]
  origin: Float[np.ndarray, "6"]
  true: Labelled
  found: Mapping[str, Labelled]


def name_of(number: int, what: str) -> str:
  """Returns the name of a file: of `what` "true", or the name of a size."""
  return f"{number}_{what.replace(' ', '_')}.jpg"


def files(number: int, sample: Sample, names: Sequence[str] | None) -> dict[str, bytes]:
  """Returns a JPEG by name of the true boxes, and one of what is found at each size: at most `MOST`, from `LEAST` up.

  Args:
    number: of the sample, from 0 up.
    sample: the sample; what pads its image is cut off.
    names: of the classes; None: numbers.
  """
  made = {"true": sample.true, **sample.found}
  return {name_of(number, what): _drawn(sample, boxes, names) for what, boxes in made.items()}


def _drawn(sample: Sample, boxes: Labelled, names: Sequence[str] | None) -> bytes:
  h, w = sample.image.shape[:2]
  x0, y0, x1, y1 = _visible(sample.origin, h, w)
  image = np.clip((sample.image[y0:y1, x0:x1] + 1) * 127.5, 0, 255).round().astype(np.uint8)
  drawn = []
  for i, (box, label) in enumerate(zip(boxes.box, boxes.label.tolist(), strict=True)):
    text = names[label] if names else f"class {label}"
    if boxes.score is not None:
      if i >= MOST or not boxes.score[i] >= LEAST:
        break
      text = f"{text} {boxes.score[i]:.2f}"
    pixels = np.clip(box * [w, h, w, h] - [x0, y0, x0, y0], 0, [x1 - x0, y1 - y0] * 2)
    drawn.append(Drawn(pixels, label, text))
  file = io.BytesIO()
  box_pictures.draw(image, drawn, longest=LONGEST).save(file, "JPEG", quality=85)
  return file.getvalue()


def _visible(origin: Float[np.ndarray, "6"], h: int, w: int) -> tuple[int, int, int, int]:
  """The part of an image of h x w pixels that is no padding: (x0, y0, x1, y1)."""
  whole, start, size = np.split(np.float64(origin), 3)
  scale = [h, w] / size
  low, high = np.clip(-start * scale, 0, [h, w]), np.clip((whole - start) * scale, 0, [h, w])
  (y0, x0), (y1, x1) = np.floor(low + 0.01).astype(int), np.ceil(high - 0.01).astype(int)
  return int(x0), int(y0), max(int(x0) + 1, int(x1)), max(int(y0) + 1, int(y1))
