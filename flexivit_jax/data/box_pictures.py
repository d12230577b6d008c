"""Boxes to look at: drawn on the photo, each with a label in the colour of its class."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFont

from flexivit_jax.data.class_colours import colour

LONGEST = 2048  # pixels of a picture's longer side
SHORTEST = 640  # of its shorter one: small images are enlarged, so that labels hide little
_MARGIN = 2  # pixels between a label's text and its edge


class Drawn(NamedTuple):
  """A box of a picture.

  Attributes:
    box: (x0, y0, x1, y1) in pixels of the image.
    number: of the class, which has a colour.
    text: the label; "" for none.
  """

  box: Sequence[float] | Float[np.ndarray, "4"]
  number: int
  text: str = ""


def draw(
  image: UInt8[np.ndarray, "h w c"],
  boxes: Sequence[Drawn],
  *,
  shortest: int = SHORTEST,
  longest: int = LONGEST,
) -> Image.Image:
  """Returns the image with boxes and labels.

  Args:
    image: 1 or 3 channels.
    boxes: the most important first: it is drawn last, and its label has the first choice of a place.
    shortest, longest: pixels of the sides, between which the image is enlarged or made smaller.
  """
  h, w = image.shape[:2]
  scale = min(max(1.0, shortest / min(h, w)), longest / max(h, w))
  size = max(1, round(w * scale)), max(1, round(h * scale))
  picture = Image.fromarray(image if image.shape[-1] == 3 else image[..., 0]).convert("RGB")
  picture = picture.resize(size, Image.Resampling.BILINEAR if scale >= 1 else Image.Resampling.BOX)
  pen = ImageDraw.Draw(picture)
  line = max(2, round(min(size) / 200))
  font = _font(max(13, min(30, round(min(size) / 40))))
  factor = np.array([size[0] / w, size[1] / h] * 2)
  placed = [np.asarray(one.box, np.float64) * factor for one in boxes]
  labels = _labels(placed, [one.text for one in boxes], font, size, line)
  for one, box in reversed([*zip(boxes, placed, strict=True)]):
    x0, y0, x1, y1 = box
    edge = (x0, y0, max(x0, x1 - 1), max(y0, y1 - 1))
    pen.rectangle(edge, outline="black", width=line + 2)
    pen.rectangle(_inner(edge), outline=colour(one.number), width=line)
  for one, label in reversed([*zip(boxes, labels, strict=True)]):
    if label is not None:
      back = colour(one.number)
      pen.rectangle(label, fill=back)
      at = label[0] + _MARGIN, (label[1] + label[3]) / 2
      pen.text(at, one.text, "black" if _is_light(back) else "white", font=font, anchor="lm")
  return picture


Rectangle = tuple[float, float, float, float]


def _inner(edge: Rectangle) -> Rectangle:
  """A pixel further in on each side, where there is room: so a line has a dark edge on bright photos."""
  x0, y0, x1, y1 = edge
  dx, dy = (1 if x1 - x0 > 2 else 0), (1 if y1 - y0 > 2 else 0)
  return x0 + dx, y0 + dy, x1 - dx, y1 - dy


def _labels(
  boxes: Sequence[np.ndarray],
  texts: Sequence[str],
  font: "Font",
  size: tuple[int, int],
  line: int,
) -> list[Rectangle | None]:
  """Returns the place of each label: above its box, else inside, below, or where it hides the fewest others."""
  height = font.getbbox("Åg|")[3] + 1.0
  taken: list[Rectangle] = []
  places: list[Rectangle | None] = []
  for (x0, y0, x1, y1), text in zip(boxes, texts, strict=True):
    if not text:
      places.append(None)
      continue
    width = font.getlength(text) + 2 * _MARGIN
    corners = [
      (x0, y0 - height), (x0 + line + 1, y0 + line + 1), (x0, y1), (x1 - width, y0 - height),
      (x1 - width, y1), (x0 + line + 1, y1 - height - line - 1),
    ]  # fmt: skip
    rows = [(x0, y0 - k * height) for k in range(2, 5)]
    rows += [(x0 + line + 1, y0 + line + 1 + k * height) for k in range(1, 9)]
    around = [_inside(x, y, width, height, size) for x, y in (*corners, *rows)]
    best = min(around, key=lambda place: _covered(place, taken))
    taken.append(best)
    places.append(best)
  return places


def _inside(x: float, y: float, width: float, height: float, size: tuple[int, int]) -> Rectangle:
  """The rectangle, moved into the picture where it would leave it."""
  x = max(0.0, min(float(x), size[0] - width))
  y = max(0.0, min(float(y), size[1] - height))
  return x, y, x + width - 1, y + height - 1


def _covered(place: Rectangle, others: Iterable[Rectangle]) -> float:
  """Pixels that two of them share; the first place wins among equals."""
  x0, y0, x1, y1 = place
  return sum(
    max(0.0, min(x1, u1) - max(x0, u0)) * max(0.0, min(y1, v1) - max(y0, v0))
    for u0, v0, u1, v1 in others
  )


Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def _font(size: int) -> Font:
  """DejaVu Sans, which has most alphabets, where it is installed; else Pillow's own."""
  try:
    return ImageFont.truetype("DejaVuSans.ttf", size)
  except OSError:
    return ImageFont.load_default(size)


def _is_light(rgb: tuple[int, int, int]) -> bool:
  """Whether black letters are easier to read on a colour than white ones (ITU-R 601 luma)."""
  return 0.299 * rgb[0] + 0.587 * rgb[1] + 0.114 * rgb[2] > 128
