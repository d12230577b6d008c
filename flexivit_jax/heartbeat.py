"""The heartbeat of a process: whatever makes progress beats, and the watchdog reads how long ago that was."""

import time

# One per process by nature. A list, so that every module that imports the functions shares the one value.
_LAST = [0.0]


def beat() -> None:
  """Records progress: a step, a compiled program, a batch of an evaluation."""
  _LAST[0] = time.monotonic()


def last() -> float:
  """Time of the last `beat`, on the clock of `time.monotonic`."""
  return _LAST[0]


def idle() -> float:
  """Seconds since the last `beat`."""
  return time.monotonic() - _LAST[0]
