"""Images that wait for the device: bounded queues, and which batch starts when.

Pure: no clock, no thread, no event loop. Times are seconds of any clock that never goes back.

A batch starts when it is full, or when its first image is due: it has waited as long as it may, or its deadline is as
near as the batch takes. The image that is due first goes first, so none waits for ever: nobody who comes later with
as much time is due earlier.
"""

import bisect
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, final

from flexivit_jax.sizes import SeqHw, size_text

SLACK = 0.003  # seconds that a batch with a deadline starts early: timers and threads wake late


class Lane(NamedTuple):
  """Which program an image waits for.

  Attributes:
    what: is computed, of `served.WHAT`.
    size: tokens per side.
    batch: images of its batches; None: as they are quickest.
  """

  what: str
  size: SeqHw
  batch: int | None = None

  @property
  def name(self) -> str:
    """For metrics."""
    return f"{self.what} {size_text(self.size)}" + (f" batch={self.batch}" if self.batch else "")


class FullError(Exception):
  """The queue has no room; `retry_after` is in how many seconds it will have, as predicted."""

  def __init__(self, retry_after: float):
    super().__init__(retry_after)
    self.retry_after = retry_after


class Waiting(NamedTuple):
  """An image that waits; ordered by when it is due, then by when it came.

  Attributes:
    due: when it starts at the latest.
    number: its place among all that came.
    deadline: when it must be done; infinite: never.
    arrived: when it came.
    image: the image, and whatever its owner wants back.
  """

  due: float
  number: int
  deadline: float
  arrived: float
  image: Any


class Batch(NamedTuple):
  """Images that start together in a program of `batch` images."""

  lane: Lane
  batch: int
  rows: tuple[Waiting, ...]


@final
class Queues:
  """All that waits.

  Args:
    batches: of how many images there are programs.
    seconds: how long a batch of a lane takes, by its images.
    max_wait: seconds that an image waits for others.
    length: images that may wait in a queue.
  """

  def __init__(
    self,
    batches: Sequence[int],
    seconds: Callable[[Lane, int], float],
    *,
    max_wait: float,
    length: int,
  ):
    self._batches, self._seconds = tuple(sorted(batches)), seconds
    self._max_wait, self._length = max_wait, length
    self._lanes: dict[Lane, list[Waiting]] = {}
    self._numbers = itertools.count()
    self._busy_until = -math.inf

  # --- in ---

  def offer(
    self, lane: Lane, image: Any, now: float, deadline: float = math.inf, *, again: bool = False
  ) -> Waiting:
    """Puts an image at the end of a queue.

    Args:
      lane: which one.
      image: the image.
      now: the time.
      deadline: when it must be done.
      again: it has been through a queue, and was let in there: the queue's bound is not for it.

    Raises:
      FullError: the queue is full.
    """
    rows = self._lanes.setdefault(lane, [])
    if len(rows) >= self._length and not again:
      raise FullError(max(0.0, self.finish(lane, 0, now) - now))
    latest = deadline - self._seconds(lane, self.sizes(lane)[-1]) - SLACK
    row = Waiting(min(now + self._max_wait, latest), next(self._numbers), deadline, now, image)
    bisect.insort(rows, row, key=_order)
    return row

  def room(self, lane: Lane) -> int:
    """How many more images a queue takes."""
    return max(0, self._length - len(self._lanes.get(lane, ())))

  def remove(self, lane: Lane, row: Waiting) -> bool:
    """Takes an image out that nobody waits for any more; tells whether it was still in the queue."""
    rows = self._lanes.get(lane, [])
    at = bisect.bisect_left(rows, _order(row), key=_order)
    if at == len(rows) or rows[at].number != row.number:
      return False
    del rows[at]
    return True

  # --- out ---

  def take(self, now: float) -> Batch | None:
    """Returns the batch that starts now, or None: nothing waits, or all that waits still may.

    It runs in the program that takes the least time for each image that it has: a large one that is half empty may be
    slower than small ones, one after the other. It is no larger than its deadlines allow. From now on the device is
    counted as busy until `done`.
    """
    ready = [lane for lane, rows in self._lanes.items() if rows and self._starts(lane, now)]
    if not ready:
      return None
    lane = min(ready, key=lambda lane: _order(self._lanes[lane][0]))
    rows, sizes = self._lanes[lane], self.sizes(lane)
    batch = self._quickest(lane, len(rows))
    while batch > sizes[0] and any(
      now + self._seconds(lane, batch) > row.deadline for row in rows[:batch]
    ):
      batch = sizes[sizes.index(batch) - 1]
    taken = tuple(rows[:batch])
    del rows[:batch]
    self._busy_until = now + self._seconds(lane, batch)
    return Batch(lane, batch, taken)

  def done(self) -> None:
    """The batch that was taken has ended."""
    self._busy_until = -math.inf

  def expired(self, now: float) -> list[Waiting]:
    """Takes out and returns what would be late even if it started now in the smallest batch."""
    late = []
    for lane, rows in self._lanes.items():
      end = max(now, self._busy_until) + self._seconds(lane, self.sizes(lane)[0])
      late += [row for row in rows if end > row.deadline]
      rows[:] = [row for row in rows if end <= row.deadline]
    return late

  def wake(self) -> float:
    """When `take` next has a batch if nothing else comes; infinite: never."""
    return min((rows[0].due for rows in self._lanes.values() if rows), default=math.inf)

  # --- what is known of them ---

  def finish(self, lane: Lane, images: int, now: float) -> float:
    """Predicts when so many more images would be done: after the batch that runs, and all that waits."""
    counts = {other: len(rows) for other, rows in self._lanes.items() if rows}
    counts[lane] = counts.get(lane, 0) + images
    work = sum(self._work(lane, count) for lane, count in counts.items())
    return max(now, self._busy_until) + work

  def lengths(self) -> Iterator[tuple[Lane, int]]:
    """How much waits in each queue."""
    for lane, rows in self._lanes.items():
      yield lane, len(rows)

  def sizes(self, lane: Lane) -> tuple[int, ...]:
    """Of how many images the batches of a queue may be, the smallest first."""
    return self._batches if lane.batch is None else (lane.batch,)

  def _work(self, lane: Lane, count: int) -> float:
    seconds = 0.0
    while count > 0:
      batch = self._quickest(lane, count)
      batches = max(1, count // batch) if batch == self.sizes(lane)[-1] else 1
      seconds, count = seconds + batches * self._seconds(lane, batch), count - batches * batch
    return seconds

  def _quickest(self, lane: Lane, count: int) -> int:
    """Of how many images the next batch is, where so many wait."""
    return min(self.sizes(lane), key=lambda n: (self._seconds(lane, n) / min(n, count), n))

  def _starts(self, lane: Lane, now: float) -> bool:
    rows = self._lanes[lane]
    return len(rows) >= self.sizes(lane)[-1] or rows[0].due <= now


def _order(row: Waiting) -> tuple[float, int]:
  return row.due, row.number
