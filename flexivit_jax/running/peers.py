"""Heartbeats of the processes of a run, see `signs`: they tell which process hangs when the others wait for it."""

import contextlib
import json
import os
import pathlib
import re
import secrets
import socket
import sys
import time
from collections.abc import Iterable
from typing import TypedDict

from flexivit_jax import heartbeat
from flexivit_jax.running import exit_codes
from flexivit_jax.running.signs import InFolder, Signs, Word

FOLDER = "processes"
_MARK = "mark"
_SIGN = re.compile(r"\d+\.(json|json\.tmp|tmp|ended)")  # .tmp: of earlier versions
_SEES_S = 30.0  # seconds until a file of another host is visible: NFS caches that long


def clear(folder: pathlib.Path) -> None:
  """Deletes the heartbeats of an earlier start; leaves a folder without our mark alone."""
  if not (folder / _MARK).is_file():
    return
  for path in list(folder.iterdir()):
    if _SIGN.fullmatch(path.name):
      path.unlink(missing_ok=True)
  (folder / _MARK).unlink()  # last, so that an interrupted deletion can be repeated
  with contextlib.suppress(OSError):  # it is not empty
    folder.rmdir()


def mark(folder: pathlib.Path) -> int:
  """Creates the folder, on process 0, and writes and returns a random number there."""
  number = secrets.randbelow(2**31)
  folder.mkdir(parents=True, exist_ok=True)
  (folder / _MARK).write_text(f"{number}\n")
  return number


def sees(folder: pathlib.Path, number: int) -> bool:
  """Whether this process sees the folder with this number; waits, because network folders are slow."""
  end = time.monotonic() + _SEES_S
  while True:
    with contextlib.suppress(OSError):
      if (folder / _MARK).read_text() == f"{number}\n":
        return True
    if time.monotonic() > end:
      return False
    time.sleep(0.2)


class Heartbeat(TypedDict):
  """What a process writes of itself: `written` is its clock, `idle` the seconds since it last did something."""

  pid: int
  host: str
  step: int
  written: float
  idle: float


class Peers:
  """Writes this process's heartbeat and reads those of the others, every few seconds.

  Writes at `tick` alone: one that is made to `blame` leaves the heartbeats as they are.
  Process 0 watches all, the others watch process 0. A process that finds another silent prints which one: the runtime
  does not say it when it ends the run. Only the runtime ends the run, because files may be visible late on other hosts.
  Clocks are not compared: a heartbeat that does not change is silent.

  Args:
    signs: where all heartbeats are, or their folder.
    index, count: the index of this process, and the number of processes.
    limit: seconds without a change after which a process is reported as silent; None: never.
  """

  def __init__(
    self, signs: Signs | pathlib.Path, index: int, count: int, limit: float | None = None
  ):
    self._signs = InFolder(signs) if isinstance(signs, pathlib.Path) else signs
    self._index, self._count, self._limit = index, count, limit
    self._reported = ""
    self._every = max(2.0, count / 4)  # so that the reads a second do not grow with the count
    self.step = 0  # the step of this process
    self._written = -self._every
    self._begun = time.monotonic()
    self._seen: dict[int, tuple[float, Heartbeat]] = {}  # when it changed, and what it holds

  def tick(self) -> None:
    """Writes a heartbeat and reads those of the others, if they are due."""
    now = time.monotonic()
    if now - self._written < self._every:
      return
    self._written = now
    about = Heartbeat(
      pid=os.getpid(),
      host=socket.gethostname(),
      step=self.step,
      written=time.time(),
      idle=heartbeat.idle(),
    )
    self._signs.write(self._index, json.dumps(about) + "\n")
    if self._limit is None:
      return
    self._look(range(self._count) if self._index == 0 else (0,))
    lost = self._silent(self._limit)
    if self._index == 0 and now - self._begun > self._limit:
      lost |= self._missing()
    who = ", ".join(map(str, lost))
    if lost and who != self._reported:
      print(
        f"flexivit: process {self._index}: {'; '.join(lost.values())}. If it is lost the run ends; the same command on"
        " all goes on from the last checkpoint.",
        file=sys.stderr,
        flush=True,
      )
    self._reported = who

  def blame(self) -> str:
    """Returns why a process has ended, or which are silent, or else which is behind or idle for longest."""
    if ended := self._ended():
      return ended
    self._look(range(self._count))
    if lost := self._lost():
      return "; ".join(lost.values())
    # Those that wait are idle since the same moment: the one that they wait for is a step behind.
    last = min(self._seen, key=lambda i: (self._seen[i][1]["step"], -self._seen[i][1]["idle"]))
    return f"{self._who(last)} has done nothing for {self._seen[last][1]['idle']:.0f} s"

  def blame_lost(self) -> str:
    """As `blame`, when a process may just have ended: waits until its next heartbeat would be due."""
    self._look(range(self._count))
    end = time.monotonic() + 4 * self._every
    while time.monotonic() < end:
      time.sleep(0.25)
      self._look(range(self._count))
      if self._ended() or self._lost():
        return self.blame()
    return self.blame()

  def leave_word(self, reason: str) -> None:
    """Records why this process hangs, for the others: its time may be the first to be over."""
    self._signs.leave_word(Word(self._index, exit_codes.HUNG, reason))

  def _look(self, indices: Iterable[int]) -> None:
    for index in indices:
      with contextlib.suppress(ValueError):
        about = json.loads(self._signs.read(index))
        if index not in self._seen or self._seen[index][1]["written"] != about["written"]:
          self._seen[index] = (time.monotonic(), about)

  def _ended(self) -> str:
    word = self._signs.word(self._index)
    return f"process {word.process} has ended: {word.reason:.500}" if word else ""

  def _lost(self) -> dict[int, str]:
    return self._silent(3 * self._every) | self._missing()

  def _missing(self) -> dict[int, str]:
    unseen = (i for i in range(self._count) if i not in self._seen and i != self._index)
    return {i: f"process {i} has no heartbeat" for i in unseen}

  def _silent(self, seconds: float) -> dict[int, str]:
    now = time.monotonic()
    return {
      i: f"{self._who(i)} is silent for {now - changed:.0f} s"
      for i, (changed, _) in sorted(self._seen.items())
      if now - changed > seconds and i != self._index
    }

  def _who(self, index: int) -> str:
    about = self._seen[index][1]
    return f"process {index} ({about['pid']} on {about['host']}, step {about['step']})"
