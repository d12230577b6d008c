"""The progress line of a run, and the times behind it."""

import contextlib
import io
import sys
import time
from collections.abc import Callable, Iterator

import jax


class Progress:
  """A line with step time, images/s, data wait and time left; redrawn in place on a terminal.

  Times are the host's. JAX runs ahead of the host by a few steps only, so means over many steps are
  those of the device.
  """

  def __init__(
    self,
    *,
    total_steps: int,
    batch_size: float,
    start_step: int = 0,
    stream: io.TextIOBase | None = None,
    every_s: int | float | None = None,
    clock: Callable[[], float] = time.monotonic,
  ):
    """Starts the clock: call it after everything is compiled.

    Args:
      total_steps: of the whole run.
      batch_size: global, images a step.
      start_step: steps done by earlier runs.
      stream: where to print; default stderr.
      every_s: seconds between lines; default 0.2 on a terminal, 10 elsewhere.
      clock: seconds, for tests.
    """
    self._total, self._batch = total_steps, batch_size
    self._start = self._step = start_step
    self._stream, self._clock = stream or sys.stderr, clock
    self._first = jax.process_index() == 0
    self._tty = self._stream.isatty()
    self._every = (0.2 if self._tty else 10.0) if every_s is None else every_s
    self._waited = 0.0
    self._begin = clock()
    self._printed = self._begin

  def update(self, step: int, *, data_wait: int | float = 0.0, note: str = "") -> None:
    """Says that `step` steps are done, the last of which waited `data_wait` s for its batch."""
    self._step, self._waited = step, self._waited + data_wait
    now = self._clock()
    if now - self._printed >= self._every or step >= self._total:
      self._printed = now
      self._print(note)

  def stats(self) -> dict[str, float]:
    """Returns seconds a step, images/s, fraction of time spent waiting for data, seconds left."""
    elapsed = max(self._clock() - self._begin, 1e-9)
    steps = max(self._step - self._start, 1)
    return {
      "step_s": elapsed / steps,
      "images_per_s": steps * self._batch / elapsed,
      "data_wait": min(self._waited / elapsed, 1.0),
      "eta_s": (self._total - self._step) * elapsed / steps,
    }

  @contextlib.contextmanager
  def paused(self) -> Iterator[None]:
    """Leaves what happens inside, such as an evaluation, out of the times."""
    before = self._clock()
    try:
      yield
    finally:
      pause = self._clock() - before
      self._begin += pause
      self._printed += pause

  def _print(self, note: str) -> None:
    if not self._first:  # of several processes one speaks
      return
    s = self.stats()
    text = (
      f"step {self._step}/{self._total} | {s['step_s'] * 1e3:.1f} ms/step"
      f" | {s['images_per_s']:.0f} images/s | data wait {s['data_wait']:.0%}"
      f" | ETA {_clock_time(s['eta_s'])}{f' | {note}' if note else ''}"
    )
    done = self._step >= self._total
    start, end = ("\r\x1b[K", "\n" if done else "") if self._tty else ("", "\n")
    with contextlib.suppress(OSError, ValueError):  # A closed terminal must not stop a training.
      self._stream.write(start + text + end)
      self._stream.flush()


def _clock_time(seconds: float) -> str:
  minutes, s = divmod(round(seconds), 60)
  hours, m = divmod(minutes, 60)
  return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"
