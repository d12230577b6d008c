"""A colour for each class, the same in all masks that are looked at."""

import colorsys
import functools

_GOLDEN = (5**0.5 - 1) / 2  # turns by which no two hues ever coincide, and early ones are far apart
# (saturation, value): eight hues fill a circle, then comes another ring.
_RINGS = ((0.6, 1.0), (1.0, 0.85), (1.0, 0.6), (0.6, 0.85))


@functools.cache
def colour(number: int) -> tuple[int, int, int]:
  """Returns the RGB colour of a class: always the same, whatever other classes there are."""
  ring, turns = _RINGS[number // 8 % len(_RINGS)], 0.02 + number * _GOLDEN
  return tuple(round(255 * v) for v in colorsys.hsv_to_rgb(turns % 1.0, *ring))  # type: ignore[return-value]


def hex_colour(number: int) -> str:
  """Returns the colour of a class as "#rrggbb"."""
  return "#" + "".join(f"{v:02x}" for v in colour(number))


def palette() -> list[int]:
  """Returns the colours of the first 256 classes, as an image with a palette takes them."""
  return [value for number in range(256) for value in colour(number)]
