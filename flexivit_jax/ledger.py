"""Where a run's wall time went, start by start: RUN/ledger.json."""

import contextlib
import json
import logging
import pathlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from flexivit_jax import errors, folders

PARTS = ("start-up", "compilation", "data wait", "steps", "evaluation", "checkpoints", "lost work")


class Ledger:
  """Divides the time of one start of a run; what belongs to no other part is "steps", or before them "start-up".

  Args:
    file: RUN/ledger.json, a list of starts; None: nothing is read or written.
    begun: `time.perf_counter()` when this one began.
    step: from which it goes on; what the start before did after it is lost.
  """

  def __init__(self, file: pathlib.Path | None, begun: float, step: int):
    self._file, self._begun = file, begun
    self._seconds = dict.fromkeys(PARTS[:-1], 0.0)
    self._rest = "start-up"
    self._earlier = _read(file) if file else []
    self._own: dict[str, Any] = {"from_step": step, "saves": {}}
    self._counted = begun
    self._warned = False
    if self._earlier:
      self.lost = self._lose(step)
    else:
      self.lost = 0.0

  def steps_begin(self) -> None:
    """From now on time that belongs to no other part is that of steps."""
    self._count(self._rest)
    self._rest = "steps"

  @contextlib.contextmanager
  def of(self, part: str) -> Iterator[None]:
    """Counts what happens inside as a part of its own."""
    self._count(self._rest)
    outer, self._rest = self._rest, part
    try:
      yield
    finally:
      self._count(part)
      self._rest = outer

  def saved(self, step: int) -> None:
    """Notes that work up to here is not lost."""
    self._own["saves"] = {str(step): self._elapsed()}

  def write(self, step: int) -> None:
    """Brings the file up to date, after `step`."""
    self._count(self._rest)
    if self._file is None:
      return
    self._own |= {"to_step": step, "wall": self._elapsed(), "seconds": self._seconds}
    try:
      folders.write(self._file, json.dumps([*self._earlier, self._own]) + "\n")
    except errors.UserError as e:  # times are no reason to stop a run
      if not self._warned:
        logging.getLogger(__name__).warning("%s Training goes on.", e)
      self._warned = True

  def _elapsed(self) -> float:
    return time.perf_counter() - self._begun

  def _count(self, part: str) -> None:
    now = time.perf_counter()
    self._seconds[part] += now - self._counted
    self._counted = now

  def _lose(self, step: int) -> float:
    """Calls lost what the start before did after the step that this one goes on from."""
    last = self._earlier[-1]
    if last.get("to_step", 0) <= step:
      return 0.0
    lost = max(last["wall"] - last["saves"].get(str(step), 0.0), 0.0)
    left = last["wall"] - lost
    total = sum(last["seconds"].values()) or 1.0
    last["seconds"] = {k: v * left / total for k, v in last["seconds"].items()} | {
      "lost work": lost
    }
    return lost


def shares(file: pathlib.Path) -> dict[str, float]:
  """Returns each part's seconds over all starts, and "wall", what the starts took in all; {} without a file."""
  starts = _read(file)
  if not starts:
    return {}
  sums = {part: sum(s["seconds"].get(part, 0.0) for s in starts) for part in PARTS}
  return sums | {"wall": sum(s["wall"] for s in starts)}


def text(found: Mapping[str, float]) -> str:
  """What `shares` found, for a reader: "3 min 12 s: steps 80.1 %, compilation 12.0 %, ..."; they sum to 100."""
  minutes, seconds = divmod(round(found["wall"]), 60)
  total = sum(found[part] for part in PARTS) or 1.0
  parts = sorted((p for p in PARTS if found[p] > 0), key=lambda p: -found[p])
  shown = ", ".join(f"{part} {found[part] / total:.1%}" for part in parts)
  return f"{minutes} min {seconds} s: {shown}"


def _read(file: pathlib.Path) -> list[dict[str, Any]]:
  try:
    found: Sequence[Mapping[str, Any]] = json.loads(file.read_text())
  except (
    OSError,
    ValueError,
  ):  # none yet; or cut short by a full disk: times are no reason to stop a run
    return []
  return [dict(start) for start in found]
