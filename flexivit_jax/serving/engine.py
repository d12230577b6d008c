"""The one thread that uses the device, and the event loop's side of the queues."""

import asyncio
import concurrent.futures
import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeVar, final

import numpy as np

from flexivit_jax.serving.metrics import Metrics
from flexivit_jax.serving.queues import Batch, Lane, Queues, Waiting
from flexivit_jax.serving.times import Key, Times

_LOG = logging.getLogger(__name__)
_PASSES = 5  # of a new program, to know its time
T = TypeVar("T")

Program = Callable[[np.ndarray], np.ndarray]  # [batch, h, w, c] -> [batch, d]
Compile = Callable[[str, Any, int], Program]  # of what, size, images


class LateError(Exception):
  """The deadline cannot be met any more; nothing was computed."""


class BrokenError(Exception):
  """The model failed, or gave what is not finite."""


class Answer(NamedTuple):
  """What the model made of an image.

  Attributes:
    output: [d].
    lane: where it waited.
    batch: images of the program that ran it.
    ms: milliseconds of the whole batch on the device.
    wait_ms: milliseconds in the queue.
  """

  output: np.ndarray
  lane: Lane
  batch: int
  ms: float
  wait_ms: float


@final
class Engine:
  """Runs batches of one image shape, one after the other.

  Args:
    compiling: makes a program; called in the device's thread, before the engine is ready.
    keys: the programs that it has.
    shape: of an image.
    queues: what waits.
    times: of the programs; the queues' predictions use them.
    metrics: what counts.
  """

  def __init__(
    self,
    compiling: Compile,
    keys: Iterable[Key],
    shape: tuple[int, ...],
    queues: Queues,
    times: Times,
    metrics: Metrics,
  ):
    self.queues, self.times = queues, times
    self.ready = asyncio.Event()
    self._compile, self._keys, self._shape = compiling, tuple(keys), shape
    self._metrics = metrics
    self._programs: dict[Key, Program] = {}
    self._device = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="device")
    self._came, self._closed = asyncio.Event(), False

  async def run(self, also: Callable[[], None] = lambda: None) -> None:
    """Compiles every program, and `also`, is then ready, and runs batches until it is cancelled."""
    await self.on_device(lambda: self._warm(also))
    self._metrics.is_ready()
    self.ready.set()
    while True:
      self._came.clear()
      now = time.monotonic()
      for row in self.queues.expired(now):
        _resolve(row.image[1], LateError())
      batch = self.queues.take(now)
      self._note_lengths()
      if batch is not None:
        await self._run(batch)
        continue
      pause = self.queues.wake() - now
      with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(self._came.wait(), None if math.isinf(pause) else max(pause, 0.0))

  def close(self) -> None:
    """Ends the device's thread after its batch, or the program that it compiles."""
    self._closed = True
    self._device.shutdown(wait=False, cancel_futures=True)

  async def on_device(self, call: Callable[[], T]) -> T:
    """Runs something else in the device's thread, between batches."""
    return await asyncio.get_running_loop().run_in_executor(self._device, call)

  async def answer(
    self, lane: Lane, image: np.ndarray, deadline: float = math.inf, *, again: bool = False
  ) -> Answer:
    """Puts an image into a queue and waits for its answer; when it is cancelled, the image leaves the queue.

    Raises:
      FullError: see `Queues.offer`.
      LateError: the deadline passed before it started.
      BrokenError: the model failed.
    """
    future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
    row = self.queues.offer(lane, (image, future), time.monotonic(), deadline, again=again)
    self._came.set()
    try:
      return await future
    finally:
      self.queues.remove(lane, row)

  def _warm(self, also: Callable[[], None]) -> None:
    for key in self._keys:
      if self._closed:  # a stop before it is ready does not wait for the rest
        return
      what, size, batch = key
      program = self._programs[key] = self._compile(what, size, batch)
      images = np.zeros((batch, *self._shape), np.float32)
      for _ in range(_PASSES):
        self.times.add(key, _seconds(program, images)[1])
    also()

  async def _run(self, batch: Batch) -> None:
    begin = time.monotonic()
    try:
      outputs, seconds = await self.on_device(lambda: self._compute(batch))
    except Exception:
      _LOG.exception("a batch failed")
      for row in batch.rows:
        _resolve(row.image[1], BrokenError("the model failed"))
      return
    finally:
      self.queues.done()
    self.times.add((batch.lane.what, batch.lane.size, batch.batch), seconds)
    self._metrics.ran(batch, begin, seconds)
    for row, output in zip(batch.rows, outputs, strict=False):  # the rest is padding
      _resolve(row.image[1], _answer(batch, row, output, begin, seconds))

  def _compute(self, batch: Batch) -> tuple[np.ndarray, float]:
    images = np.zeros((batch.batch, *self._shape), np.float32)
    for at, row in enumerate(batch.rows):
      images[at] = row.image[0]
    return _seconds(self._programs[batch.lane.what, batch.lane.size, batch.batch], images)

  def _note_lengths(self) -> None:
    for lane, length in self.queues.lengths():
      self._metrics.waits(lane, length)


def _seconds(program: Program, images: np.ndarray) -> tuple[np.ndarray, float]:
  begin = time.perf_counter()
  outputs = program(images)
  return outputs, time.perf_counter() - begin


def _answer(
  batch: Batch, row: Waiting, output: np.ndarray, begin: float, seconds: float
) -> Answer | Exception:
  if not np.isfinite(output).all():
    return BrokenError("the model's output is not finite")
  wait = max(0.0, begin - row.arrived)
  return Answer(output, batch.lane, batch.batch, 1e3 * seconds, 1e3 * wait)


def _resolve(future: "asyncio.Future[Answer]", result: Answer | Exception) -> None:
  if future.done():  # nobody waits for it any more
    return
  if isinstance(result, Exception):
    future.set_exception(result)
  else:
    future.set_result(result)
