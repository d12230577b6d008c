"""How far a rate of so many tries can be trusted: 95 % intervals, without a draw."""

import math


def wilson(p: float, n: int, z: float = 1.959964) -> tuple[float, float]:
  """The 95 % interval of a rate `p` of `n` tries. Source: Wilson 1927, JASA 22(158)."""
  centre = (p + z * z / (2 * n)) / (1 + z * z / n)
  half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
  return max(0.0, centre - half), min(1.0, centre + half)
