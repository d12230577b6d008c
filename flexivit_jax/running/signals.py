"""Signals and hangs: a run that gets a signal saves before it stops; a run that hangs reports where.

SIGTERM or SIGINT: the current step is finished and saved, and the process ends with `exit_codes.STOPPED`; the same
command resumes there. At start-up, in compilation, in an evaluation and while waiting for data it ends at once. A
second signal ends it in any case.
"""

import contextlib
import faulthandler
import os
import signal
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from flexivit_jax import heartbeat
from flexivit_jax.running import exit_codes

DATA_NOTE_S = 10.0  # seconds of waiting for data after which a line says so
_WORD_S = 5.0  # seconds to leave a word for the other processes
_AGAIN_S = 1.0  # seconds until `Stopped` is raised again
_SOON_S = 0.01
_COUNTING = (__file__, contextlib.__file__)  # the files that `Stop.interruptible` runs in


class Stopped(BaseException):
  """A signal has asked the run to stop; not an error."""


class Stop:
  """Records whether a signal has arrived; see `catch`."""

  def __init__(self, reached: Callable[[int], bool] | None = None) -> None:
    self.signal: str | None = None
    self._at_once = 0
    self._reached = reached

  def check(self) -> None:
    """Raises `Stopped` if a signal has arrived."""
    if self.signal:
      raise Stopped(self.signal)

  def check_after(self, step: int) -> None:
    """As `check`, after a step: several processes all stop after the same step."""
    if self._reached is not None and self._reached(step):
      raise Stopped("SIGTERM to one of the processes")
    self.check()

  @contextlib.contextmanager
  def interruptible(self) -> Iterator[None]:
    """Code inside may be interrupted anywhere: a signal raises `Stopped` there, at once.

    An error that leaves the code after that is `Stopped` too: a library that catches everything (`except:`, the
    initialization of an extension module) makes an error of its own of it, which says nothing about the run.
    """
    self._at_once += 1
    try:
      self.check()
      yield
    except Exception as error:
      if self.signal is None:
        raise
      raise Stopped(self.signal) from error
    finally:
      self._at_once -= 1

  def _handle(self, number: int, frame: types.FrameType | None) -> None:
    name = signal.Signals(number).name
    if self.signal:
      os.write(2, f"second signal, {name}: ended at once\n".encode())
      os._exit(128 + number)
    self.signal = name
    self._obey(number, frame)

  def _obey(self, number: int, frame: types.FrameType | None) -> None:
    """Raises `Stopped` if the code is interruptible, and again a second later.

    Signals also arrive in a __del__ or a callback of the garbage collector, where Python only prints the exception;
    and between two lines of `interruptible`, which would lose count.
    """
    del number
    if self._at_once and frame is not None and frame.f_code.co_filename in _COUNTING:
      signal.setitimer(signal.ITIMER_REAL, _SOON_S)
    elif self._at_once:
      signal.setitimer(signal.ITIMER_REAL, _AGAIN_S)
      raise Stopped(self.signal)


@contextlib.contextmanager
def catch(reached: Callable[[int], bool] | None = None) -> Iterator[Stop]:
  """Handles SIGTERM and SIGINT; does nothing outside the main thread, where Python handles no signals.

  Args:
    reached: for several processes: whether all must stop after a step. Then JAX's preemption service handles SIGTERM,
      SIGINT becomes SIGTERM, and neither ends anything at once.
  """
  stop = Stop(reached)
  if threading.current_thread() is not threading.main_thread():
    yield stop
    return
  handlers: dict[int, Any] = dict.fromkeys((signal.SIGTERM, signal.SIGINT), stop._handle)
  handlers[signal.SIGALRM] = stop._obey
  if reached is not None:
    handlers = {signal.SIGINT: lambda *_: os.kill(os.getpid(), signal.SIGTERM)}
  before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
  try:
    yield stop
  finally:
    if signal.SIGALRM in handlers:
      signal.setitimer(signal.ITIMER_REAL, 0)
    for number, old in before.items():
      signal.signal(number, old)


def leave_at_once(code: int = exit_codes.STOPPED) -> None:
  """From now on SIGTERM and SIGINT end this process with a code: before a run has begun, and after its end.

  `catch` handles them in between. Only for a process whose only work is the run, and in its main thread.
  """

  def end(number: int, frame: object) -> None:
    del frame
    if code == exit_codes.STOPPED:
      name = signal.Signals(number).name
      os.write(2, f"flexivit: stopped by {name}; the same command goes on\n".encode())
    os._exit(code)

  sys.stdout.flush()
  sys.stderr.flush()
  signal.signal(signal.SIGTERM, end)
  signal.signal(signal.SIGINT, end)


def leave() -> NoReturn:
  """Ends the process with `exit_codes.STOPPED` without waiting for threads, one of which may still compile."""
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(exit_codes.STOPPED)


class Watchdog:
  """A thread that ends the process when it hangs.

  Args:
    limit: seconds without a heartbeat after which the stacks of all threads go to standard error and the process
      ends with `exit_codes.HUNG`; None: never.
    note: called with a line when data has been awaited for a while, once each time.
    tick: called a few times a second.
    blame: returns, for the last message, which of several processes hangs.
    leave_word: called with that message's reason, for the other processes; it has a few seconds.
  """

  def __init__(
    self,
    limit: float | None,
    note: Callable[[str], None],
    *,
    tick: Callable[[], None] = lambda: None,
    blame: Callable[[], str] = lambda: "",
    leave_word: Callable[[str], None] = lambda reason: None,
  ):
    self._limit, self._note, self._waiting = limit, note, False
    self._tick, self._blame, self._leave_word = tick, blame, leave_word
    heartbeat.beat()
    self._ended = threading.Event()
    self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
    self._thread.start()

  @contextlib.contextmanager
  def data(self) -> Iterator[None]:
    """Marks that the code inside waits for data."""
    heartbeat.beat()
    self._waiting = True
    try:
      yield
    finally:
      self._waiting = False
      heartbeat.beat()

  def close(self) -> None:
    """Stops the thread."""
    self._ended.set()
    self._thread.join()

  def _watch(self) -> None:
    told = -1.0
    while not self._ended.wait(0.25):
      self._tick()
      began = heartbeat.last()
      silence = time.monotonic() - began
      if self._waiting and silence > DATA_NOTE_S and told != began:
        told = began
        self._note(f"waiting for data for {silence:.0f} s")
      if self._limit is not None and silence > self._limit:
        self._end(silence, self._limit)

  def _end(self, silence: float, limit: float) -> NoReturn:
    what = "waiting for data" if self._waiting else "in a step, a compilation or an evaluation"
    reason = f"nothing has gone on for {silence:.0f} s ({what}), more than hang_after={limit:g}"
    if blamed := self._blame():
      reason += f"; {blamed}"
    print(
      f"flexivit: error: {reason}; the stacks of all threads follow. The same command goes on from the last"
      " checkpoint.",
      file=sys.stderr,
      flush=True,
    )
    faulthandler.dump_traceback(all_threads=True)
    # In a thread: the folder or the process that takes the word may be what hangs.
    leaving = threading.Thread(target=self._leave_word, args=(reason,), daemon=True)
    leaving.start()
    leaving.join(timeout=_WORD_S)
    os._exit(exit_codes.HUNG)
