"""How long programs take here and now: measured when they are compiled, and with every batch.

What slows one program down, other work on the machine, slows all of them. So each program has the shortest time that it
ever took, and all share one slowdown: programs that have not run for long are known, too. The slowdown is forgotten
within seconds when nothing runs; else a server that was slow once, and refuses what it predicts to be late, would
refuse for ever.
"""

import math
import time
from collections.abc import Callable
from typing import final

from flexivit_jax.sizes import SeqHw

Key = tuple[str, SeqHw, int]  # what, size, images of a batch
_NEW = 0.1  # weight of a new slowdown
_FORGET_S = 1.0  # in which all but 1 / e of a slowdown is forgotten, if nothing runs


@final
class Times:
  """The shortest seconds of each program, and running means of the slowdown and of its deviation (as in RFC 6298).

  Args:
    clock: seconds, for the forgetting.
  """

  def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
    self._clock, self._at = clock, -math.inf
    self._least: dict[Key, float] = {}
    self._slowdown, self._deviation = 1.0, 0.0

  def add(self, key: Key, seconds: float) -> None:
    """Takes a time that was measured."""
    least = self._least[key] = min(seconds, self._least.get(key, math.inf))
    slowdown, deviation = self._now()
    error = seconds / least - slowdown
    self._slowdown = slowdown + _NEW * error
    self._deviation = deviation + _NEW * (abs(error) - deviation)
    self._at = self._clock()

  def mean(self, key: Key) -> float:
    """Seconds on average; infinite where nothing is known."""
    return self._least.get(key, math.inf) * self._now()[0]

  def safe(self, key: Key) -> float:
    """Seconds that are seldom exceeded: the mean and two mean deviations."""
    slowdown, deviation = self._now()
    return self._least.get(key, math.inf) * (slowdown + 2 * deviation)

  def _now(self) -> tuple[float, float]:
    left = math.exp(-max(0.0, self._clock() - self._at) / _FORGET_S)
    return 1 + (self._slowdown - 1) * left, self._deviation * left
