"""How a run spent its wall time, start by start: RUN/ledger.json."""

import contextlib
import json
import logging
import os
import pathlib
import time
from collections.abc import Iterator, Mapping
from typing import TypedDict

from flexivit_jax import errors, files

PARTS = ("start-up", "compilation", "data wait", "steps", "evaluation", "checkpoints", "lost work")


class Start(TypedDict, total=False):
  """One start of a run as ledger.json holds it; `seconds` are by part, `saves` the seconds until each saved step."""

  from_step: int
  to_step: int
  saves: dict[str, dict[str, float]]
  wall: float
  seconds: dict[str, float]


class Ledger:
  """Divides the time of one start of a run into PARTS; time outside other parts is "start-up", then "steps".

  Args:
    file: RUN/ledger.json, a list of starts; None: nothing is read or written.
    begun: `time.perf_counter()` when this one began, see `process_begun`.
  """

  def __init__(self, file: pathlib.Path | None, begun: float):
    self._file, self._begun = file, begun
    self._seconds = dict.fromkeys(PARTS[:-1], 0.0)
    self._rest = "start-up"
    self._earlier = _read(file) if file else []
    self._start: Start = {}
    self._counted = begun
    self._warned = False
    self.lost = 0.0

  def go_on_from(self, step: int) -> None:
    """Adds this start to those of the run; work that earlier starts did after `step` counts as lost.

    Nothing is written before the next `write`.
    """
    self._start = {"from_step": step, "to_step": step, "saves": {}}
    self.lost = sum(_lose(start, step) for start in self._earlier)

  def steps_begin(self) -> None:
    """From now on, time outside other parts counts as steps."""
    self._count(self._rest)
    self._rest = "steps"
    self.saved(self._start["from_step"])
    self.write()

  @contextlib.contextmanager
  def of(self, part: str) -> Iterator[None]:
    """Counts the time spent inside as this part."""
    self._count(self._rest)
    outer, self._rest = self._rest, part
    try:
      yield
    finally:
      self._count(part)
      self._rest = outer

  def saved(self, step: int) -> None:
    """Records the seconds of each part until now, up to which a later start can resume."""
    self._count(self._rest)
    self._start["saves"][str(step)] = {k: round(v, 3) for k, v in self._seconds.items() if v}

  def write(self, step: int | None = None) -> None:
    """Writes the file, up to `step`; by default the step of the last call."""
    self._count(self._rest)
    if self._file is None or not self._start:
      return
    wall = time.perf_counter() - self._begun
    self._start |= {"wall": wall, "seconds": self._seconds}
    if step is not None:
      self._start["to_step"] = step
    try:
      files.write_atomically(self._file, json.dumps([*self._earlier, self._start]) + "\n")
    except errors.UserError as e:  # times are no reason to stop a run
      if not self._warned:
        logging.getLogger(__name__).warning("%s Training goes on.", e)
      self._warned = True

  def _count(self, part: str) -> None:
    now = time.perf_counter()
    self._seconds[part] += now - self._counted
    self._counted = now


def _lose(start: Start, step: int) -> float:
  """Counts as lost what an earlier start did after `step`, where a later one resumes; returns the newly lost seconds.

  Lost is all work after its last save at or before `step`: a save that was started later may have failed.
  """
  saves = {int(k): seconds for k, seconds in start["saves"].items()}
  if start["to_step"] <= step or not saves:
    return 0.0
  saved = saves[max((k for k in saves if k <= step), default=min(saves))]
  lost = max(start["wall"] - sum(saved.values()), 0.0)
  before = start["seconds"].get("lost work", 0.0)
  if lost <= before:
    return 0.0
  start["seconds"] = saved | {"lost work": lost}
  return lost - before


def process_begun() -> float:
  """Returns `time.perf_counter()` of the start of this process, before any import; the current one if unknown."""
  try:
    fields = pathlib.Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    began = int(fields[19]) / os.sysconf("SC_CLK_TCK")  # seconds since the system started, proc(5)
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - began if began else 0.0
  except (OSError, ValueError, IndexError, AttributeError):  # not Linux
    age = 0.0
  return time.perf_counter() - max(age, 0.0)


def shares(file: pathlib.Path) -> dict[str, float]:
  """Returns the seconds of each part over all starts, and their sum as "wall"; {} without a file."""
  starts = _read(file)
  if not starts:
    return {}
  sums = {part: sum(s["seconds"].get(part, 0.0) for s in starts) for part in PARTS}
  return sums | {"wall": sum(s["wall"] for s in starts)}


def text(seconds_of: Mapping[str, float]) -> str:
  """Returns the shares as text: "3 min 12 s: steps 80.1 %, compilation 12.0 %, ...", of the wall time."""
  minutes, seconds = divmod(round(seconds_of["wall"]), 60)
  total = seconds_of["wall"] or 1.0
  parts = sorted((p for p in PARTS if seconds_of[p] > 0), key=lambda p: -seconds_of[p])
  shown = ", ".join(f"{part} {seconds_of[part] / total:.1%}" for part in parts)
  return f"{minutes} min {seconds} s: {shown}"


def _read(file: pathlib.Path) -> list[Start]:
  try:
    starts = json.loads(file.read_text())
  except (OSError, ValueError):
    return []  # none yet; or cut short by a full disk: times are no reason to stop a run
  return [Start(**start) for start in starts] if _are_starts(starts) else []


def _are_starts(content: object) -> bool:
  """Whether this is what `Ledger.write` writes: a list of starts, with seconds as numbers."""
  return isinstance(content, list) and all(
    isinstance(start, dict)
    and isinstance(start.get("wall"), int | float)
    and _are_seconds(start.get("seconds"))
    and isinstance(start.get("saves"), dict)
    and all(map(_are_seconds, start["saves"].values()))
    for start in content
  )


def _are_seconds(section: object) -> bool:
  return isinstance(section, dict) and all(isinstance(s, int | float) for s in section.values())
