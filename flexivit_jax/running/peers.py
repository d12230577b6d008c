"""Signs of life of the processes of a run, in RUN/processes: who stands still, when the others can only wait."""

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

from flexivit_jax import errors, files, heartbeat

FOLDER = "processes"
_MARK = "mark"
_SIGN = re.compile(r"\d+\.(json|json\.tmp|tmp|ended)")  # .tmp: of earlier versions
_SEES_S = 30.0  # in which a file of another host is seen; NFS looks again after so long


def clear(folder: pathlib.Path) -> None:
  """Deletes what the processes of an earlier start wrote there; a folder without our mark is another's."""
  if not (folder / _MARK).is_file():
    return
  for path in list(folder.iterdir()):
    if _SIGN.fullmatch(path.name):
      path.unlink(missing_ok=True)
  (folder / _MARK).unlink()  # the last: until then this can be done again
  with contextlib.suppress(OSError):  # it is not empty
    folder.rmdir()


def mark(folder: pathlib.Path) -> int:
  """Makes the folder, on the first process, and returns a number that is written there."""
  number = secrets.randbelow(2**31)
  folder.mkdir(parents=True, exist_ok=True)
  (folder / _MARK).write_text(f"{number}\n")
  return number


def sees(folder: pathlib.Path, number: int) -> bool:
  """Whether this process sees the folder that was marked with this number; waits for it as network folders need."""
  end = time.monotonic() + _SEES_S
  while True:
    with contextlib.suppress(OSError):
      if (folder / _MARK).read_text() == f"{number}\n":
        return True
    if time.monotonic() > end:
      return False
    time.sleep(0.2)


def leave_word(folder: pathlib.Path, index: int, reason: str) -> None:
  """Writes why a process ends, for the others to say."""
  with contextlib.suppress(OSError):
    (folder / f"{index}.ended").write_text(reason)


class Heartbeat(TypedDict):
  """What a process writes of itself: `written` is its clock, `idle` the seconds since it last did something."""

  pid: int
  host: str
  step: int
  written: float
  idle: float


class Peers:
  """What this process writes of itself and reads of the others, every few seconds.

  The first process looks at all, the others at the first. Whoever finds one silent says so, and who it is, which the
  runtime does not say when it ends the run; it alone decides that, for files may be seen late on other hosts. Clocks
  are not compared: silent is what does not change.

  Args:
    folder: of all processes.
    index, count: of this process, and how many there are.
    limit: seconds of silence after which it is said; None: never.
  """

  def __init__(self, folder: pathlib.Path, index: int, count: int, limit: float | None = None):
    self._folder, self._index, self._count, self._limit = folder, index, count, limit
    self._said = ""
    self._every = max(2.0, count / 4)  # files that are read in a second do not grow with the count
    self.step = 0  # that this process is at
    self._written = -self._every
    self._begun = time.monotonic()
    self._seen: dict[int, tuple[float, Heartbeat]] = {}  # when it changed, and what it says
    folder.mkdir(parents=True, exist_ok=True)
    self.tick()

  def tick(self) -> None:
    """Writes a sign of life and looks at the others', if it is time to."""
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
    with contextlib.suppress(errors.UserError):  # a heartbeat is no reason to end a run
      files.write_atomically(self._folder / f"{self._index}.json", json.dumps(about) + "\n")
    if self._limit is None:
      return
    self._look(range(self._count) if self._index == 0 else (0,))
    lost = self._silent(self._limit)
    if self._index == 0 and now - self._begun > self._limit:
      lost |= self._missing()
    who = ", ".join(map(str, lost))
    if lost and who != self._said:
      print(
        f"flexivit: process {self._index}: {'; '.join(lost.values())}. If it is lost the run ends; the same command on"
        " all goes on from the last checkpoint.",
        file=sys.stderr,
        flush=True,
      )
    self._said = who

  def blame(self) -> str:
    """Says why one has ended, or which are silent, or else which one is behind or has done nothing for longest."""
    return self._blame()[0]

  def _blame(self) -> tuple[str, bool]:
    """What `blame` says, and whether a process is gone: it has ended, is silent, or has left no sign."""
    if ended := self._ended():
      return ended, True
    self._look(range(self._count))
    if gone := self._silent(3 * self._every) | self._missing():
      return "; ".join(gone.values()), True
    # All that wait have been idle since the same moment: the one that they wait for is a step behind.
    last = min(self._seen, key=lambda i: (self._seen[i][1]["step"], -self._seen[i][1]["idle"]))
    return f"{self._who(last)} has done nothing for {self._seen[last][1]['idle']:.0f} s", False

  def blame_lost(self) -> str:
    """As `blame`, when one may just have gone: waits until it would have given a sign."""
    self._look(range(self._count))
    end = time.monotonic() + 4 * self._every
    while time.monotonic() < end:
      time.sleep(0.25)
      text, is_gone = self._blame()
      if is_gone:
        return text
    return self.blame()

  def _look(self, indices: Iterable[int]) -> None:
    for index in indices:
      with contextlib.suppress(OSError, ValueError):
        about = json.loads((self._folder / f"{index}.json").read_text())
        if index not in self._seen or self._seen[index][1]["written"] != about["written"]:
          self._seen[index] = (time.monotonic(), about)

  def _ended(self) -> str:
    """What the first that left word has said; the others may have ended because it did."""
    words = [(f.stat().st_mtime, int(f.stem), f.read_text()) for f in self._folder.glob("*.ended")]
    others = [word for word in sorted(words) if word[1] != self._index]
    return f"process {others[0][1]} has ended: {others[0][2]:.500}" if others else ""

  def _missing(self) -> dict[int, str]:
    unseen = (i for i in range(self._count) if i not in self._seen)
    return {i: f"process {i} has left no sign" for i in unseen}

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
