"""Where the processes of a run leave their heartbeats, and why one has ended: in a folder, or with process 0."""

import contextlib
import json
import pathlib
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from flexivit_jax import errors, files
from flexivit_jax.running import exit_codes

_LOOK_S = 0.5  # between looks for the word of a process that ends
_READ_S = 10.0  # process 0 waits so long for the others to read it
_KEY = "flexivit/signs"


class Word(NamedTuple):
  """Which process has ended, with which exit code, and why."""

  process: int
  code: int
  reason: str


class InFolder:
  """Heartbeats and words as files in a folder that all processes see."""

  def __init__(self, folder: pathlib.Path):
    self._folder = folder
    folder.mkdir(parents=True, exist_ok=True)

  def write(self, index: int, text: str) -> None:
    """Writes a heartbeat."""
    with contextlib.suppress(errors.UserError):  # a heartbeat is no reason to end a run
      files.write_atomically(self._folder / f"{index}.json", text)

  def read(self, index: int) -> str:
    """Returns the last heartbeat of a process; "" if there is none."""
    try:
      return (self._folder / f"{index}.json").read_text()
    except (OSError, ValueError):
      return ""

  def leave_word(self, word: Word) -> None:
    """Records why a process ends, so that the others can report it."""
    with contextlib.suppress(OSError):
      (self._folder / f"{word.process}.ended").write_text(word.reason)

  def word(self, index: int) -> Word | None:
    """Returns that of the process that ended first, except `index`; the others may have ended because of it."""
    ended = [(f.stat().st_mtime, int(f.stem), f.read_text()) for f in self._folder.glob("*.ended")]
    others = [Word(i, exit_codes.HUNG, reason) for _, i, reason in sorted(ended) if i != index]
    return others[0] if others else None

  def wait_until_read(self) -> None:
    """Returns: files stay."""

  def close(self) -> None:
    """Does nothing."""


class InService:
  """Heartbeats and words in JAX's coordination service, in the memory of process 0; no file system is shared.

  A thread asks, because process 0 may not answer. The first word is kept.

  Args:
    client: of the service, see `distributed.service`.
    index, count: the index of this process, and the number of processes.
    heed: called by the thread with the word of another process that ended with `exit_codes.ERROR`.
  """

  def __init__(self, client: Any, index: int, count: int, heed: Callable[[Word], None]):
    self._client, self._index, self._count, self._heed = client, index, count, heed
    self._every = max(1.0, count / 8)  # so that the requests a second do not grow with the count
    self._mine, self._heartbeats = "", dict[int, str]()
    self._word: Word | None = None
    self._ends = False
    self._ended = threading.Event()
    self._thread = threading.Thread(target=self._run, name="signs of processes", daemon=True)
    self._thread.start()

  def write(self, index: int, text: str) -> None:
    """Has a heartbeat of this process sent."""
    del index
    self._mine = text

  def read(self, index: int) -> str:
    """Returns the last heartbeat of a process; "" if there is none."""
    return self._heartbeats.get(index, "")

  def leave_word(self, word: Word) -> None:
    """Records why this process ends; the others end, too."""
    self._ends = True
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # another was first
      self._client.key_value_set(f"{_KEY}/word", json.dumps(word))
    with contextlib.suppress(jax.errors.JaxRuntimeError):
      self._client.key_value_set(f"{_KEY}/read/{self._index}", "", allow_overwrite=True)

  def word(self, index: int) -> Word | None:
    """Returns that of the process that ended first, except `index`."""
    return self._word if self._word is not None and self._word.process != index else None

  def wait_until_read(self) -> None:
    """Waits until the others have read the word: the service ends with process 0."""
    end = time.monotonic() + _READ_S
    while self._index == 0 and time.monotonic() < end:
      with contextlib.suppress(jax.errors.JaxRuntimeError):
        if len(self._client.key_value_dir_get(f"{_KEY}/read/")) == self._count:
          return
      time.sleep(0.1)

  def close(self) -> None:
    """Ends the thread."""
    self._ended.set()
    self._thread.join(timeout=_READ_S)

  def _run(self) -> None:
    due = 0.0
    while not self._ended.wait(_LOOK_S):
      # Its error: there is no word yet, or the service has ended.
      with contextlib.suppress(jax.errors.JaxRuntimeError):
        self._word = Word(*json.loads(self._client.key_value_try_get(f"{_KEY}/word")))
        self._client.key_value_set(f"{_KEY}/read/{self._index}", "", allow_overwrite=True)
      if (word := self.word(self._index)) and word.code == exit_codes.ERROR and not self._ends:
        self._heed(word)
      if time.monotonic() > due:
        due = time.monotonic() + self._every
        with contextlib.suppress(jax.errors.JaxRuntimeError):
          self._exchange()

  def _exchange(self) -> None:
    if self._mine:
      key = f"{_KEY}/heartbeat/{self._index}"
      self._client.key_value_set(key, self._mine, allow_overwrite=True)
    for key, text in self._client.key_value_dir_get(f"{_KEY}/heartbeat/"):
      self._heartbeats[int(key.rpartition("/")[2])] = text


Signs = InFolder | InService
