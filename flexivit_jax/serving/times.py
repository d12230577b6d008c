"""How long programs take here and now: measured when they are compiled, and with every batch."""

import math
from typing import final

from flexivit_jax.sizes import SeqHw

Key = tuple[str, SeqHw, int]  # what, size, images of a batch
_NEW = 0.1  # weight of a new time


@final
class Times:
  """Running means of seconds and of their deviation, as TCP estimates its round trips (RFC 6298)."""

  def __init__(self) -> None:
    self._of: dict[Key, tuple[float, float]] = {}

  def add(self, key: Key, seconds: float) -> None:
    """Takes a time that was measured."""
    mean, deviation = self._of.get(key, (seconds, 0.0))
    error = seconds - mean
    self._of[key] = mean + _NEW * error, deviation + _NEW * (abs(error) - deviation)

  def mean(self, key: Key) -> float:
    """Seconds on average; infinite where nothing is known."""
    return self._of.get(key, (math.inf, 0.0))[0]

  def safe(self, key: Key) -> float:
    """Seconds that are seldom exceeded: the mean and two mean deviations."""
    mean, deviation = self._of.get(key, (math.inf, 0.0))
    return mean + 2 * deviation
