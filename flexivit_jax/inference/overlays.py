"""Masks to look at: the photo under its classes, and what the colours mean."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Integer, UInt8
from PIL import Image, ImageDraw, ImageFont

from flexivit_jax.data.class_colours import colour, palette

_LONGEST = 2048  # pixels of an overlay's longer side
_SHORTEST = 360  # of its shorter one: small images are enlarged, so that the legend has room
_NEVER = 0.0005  # a class with a smaller share of the pixels is not in a legend


class Row(NamedTuple):
  """A class in a mask: its number, its name or "", and its share of the pixels."""

  number: int
  name: str
  share: float

  @property
  def text(self) -> str:
    """Returns what a legend says."""
    return f"{self.share:6.1%}  {self.name or f'class {self.number}'}"


def palette_image(mask: Integer[np.ndarray, "h w"], classes: int) -> Image.Image:
  """Returns a mask as an image whose values are numbers of classes: with a palette; above 256, grey of 16 bits."""
  if classes > 256:
    return Image.fromarray(mask.astype(np.uint16))
  image = Image.fromarray(mask.astype(np.uint8))
  image.putpalette(palette())
  return image


def rows_of(mask: Integer[np.ndarray, "h w"], names: Sequence[str]) -> list[Row]:
  """Returns the classes that a mask has, the largest first."""
  counts = np.bincount(mask.reshape(-1), minlength=len(names))
  order = np.argsort(-counts, kind="stable")
  return [Row(int(k), names[k], float(counts[k] / mask.size)) for k in order if counts[k]]


def overlay(
  image: UInt8[np.ndarray, "h w 3"], mask: Integer[np.ndarray, "h w"], rows: Sequence[Row]
) -> Image.Image:
  """Returns the photo half under the colours of its classes, and the legend below."""
  h, w = mask.shape
  scale = min(max(1.0, _SHORTEST / min(h, w)), _LONGEST / max(h, w))
  size = max(1, round(w * scale)), max(1, round(h * scale))
  photo = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR), np.float32)
  numbers = np.asarray(
    Image.fromarray(mask.astype(np.int32)).resize(size, Image.Resampling.NEAREST)
  )
  table = np.asarray([colour(k) for k in range(int(mask.max()) + 1)], np.float32)
  blended = 0.5 * photo + 0.5 * table[numbers]
  edges = np.zeros(numbers.shape, bool)
  edges[:, 1:] |= numbers[:, 1:] != numbers[:, :-1]
  edges[1:] |= numbers[1:] != numbers[:-1]
  blended[edges] *= 0.35
  below = legend([row for row in rows if row.share >= _NEVER] or rows[:1], size[0])
  whole = Image.new("RGB", (size[0], size[1] + below.height), "white")
  whole.paste(Image.fromarray(blended.round().astype(np.uint8)), (0, 0))
  whole.paste(below, (0, size[1]))
  return whole


def legend(rows: Sequence[Row], width: int) -> Image.Image:
  """Returns a panel of this width: a square of the colour, the share and the name of each class, in columns."""
  height = max(15, min(30, width // 45))
  font = ImageFont.load_default(size=height)
  pad = height // 2
  texts = [row.text for row in rows]
  cell = 3 * pad + height + round(max(font.getlength(text) for text in texts))
  columns = max(1, min(len(rows), width // cell))
  lines, step = -(-len(rows) // columns), round(1.5 * height)
  panel = Image.new("RGB", (width, lines * step + pad), "white")
  draw = ImageDraw.Draw(panel)
  for i, (row, text) in enumerate(zip(rows, texts, strict=True)):
    x, y = pad + (i // lines) * cell, pad + (i % lines) * step
    draw.rectangle((x, y, x + height, y + height), fill=colour(row.number), outline="black")
    draw.text((x + height + pad, y + height // 2), text, "black", font=font, anchor="lm")
  return panel
