"""The lock of a run in a bucket: of two processes that would write it, one is refused."""

import contextlib
import json
import os
import pathlib
import secrets
import socket
import threading
import time
from collections.abc import Mapping

from flexivit_jax import errors, storage

NAME = "lock.json"
_BEAT_S, _EXPIRY_S = 5.0, 30.0


class Lock:
  """The object lock.json, rewritten every few seconds by the process that holds it.

  Each write is on the condition that the object is the one of the write before, so that no two processes hold it. One
  that has not changed for half a minute is of a process that is gone, as far as another machine can know; one of a
  process of this machine that has ended is taken over at once. Clocks are not compared.

  Args:
    bucket: of the run.

  Raises:
    UserError: another process holds it.
  """

  def __init__(self, bucket: storage.Bucket):
    self._bucket = bucket
    self._about = {
      "pid": os.getpid(),
      "host": socket.gethostname(),
      "since": time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime()),
      "machine": _machine(),
      "process": _process(os.getpid()),
      "token": secrets.token_hex(8),
    }
    self._number = 0
    self._writing = threading.Lock()
    self._held_at = time.monotonic()
    version = bucket.create(NAME, self._text()) or self._take_over()
    if version is None:
      raise self._in_use()
    self._version = version
    self._lost = False
    self._ended = threading.Event()
    self._thread = threading.Thread(target=self._beat, name="lock of a bucket", daemon=True)
    self._thread.start()

  def check(self) -> None:
    """Raises a UserError if another process may have the lock; called before anything is written."""
    if not self._lost and time.monotonic() - self._held_at > _EXPIRY_S / 2:
      self._renew()
    if self._lost:
      raise errors.UserError(
        f"{self._bucket.url} was taken over by {self._holder()}: this process was silent for {_EXPIRY_S:.0f} s."
        " It ends, and has written nothing since."
      )

  def release(self) -> None:
    """Deletes the object, unless it is another's."""
    self._ended.set()
    self._thread.join()
    with contextlib.suppress(errors.UserError):
      if not self._lost and (other := self._bucket.stat(NAME)) and other.version == self._version:
        self._bucket.delete(NAME)

  def _beat(self) -> None:
    while not self._ended.wait(_BEAT_S):
      with contextlib.suppress(errors.UserError):  # the next one may get through
        self._renew()

  def _renew(self) -> None:
    with self._writing:
      if self._lost:
        return
      begun, self._number = time.monotonic(), self._number + 1
      version = self._bucket.replace(NAME, self._text(), self._version)
      if version is None:
        self._lost = True
      else:
        self._version, self._held_at = version, begun

  def _take_over(self) -> storage.Version | None:
    end = time.monotonic() + _EXPIRY_S
    seen = self._bucket.stat(NAME)
    if seen is None:  # released in this moment
      return self._bucket.create(NAME, self._text())
    told = _is_gone(self._read())
    while not told and time.monotonic() < end:
      time.sleep(0.5)
      now = self._bucket.stat(NAME)
      if now is None:
        return self._bucket.create(NAME, self._text())
      if now.version != seen.version:
        return None
    return self._bucket.replace(NAME, self._text(), seen.version)

  def _text(self) -> bytes:
    return (json.dumps({**self._about, "written": self._number}) + "\n").encode()

  def _read(self) -> dict[str, object]:
    try:
      content = json.loads(self._bucket.read(NAME) or b"{}")
    except ValueError:
      return {}
    return content if isinstance(content, dict) else {}

  def _holder(self) -> str:
    about = self._read()
    if not about.keys() >= {"pid", "host", "since"}:
      return "another process"
    return f"process {about['pid']} on {about['host']} since {about['since']}"

  def _in_use(self) -> errors.UserError:
    return errors.UserError(
      f"{self._bucket.url} is in use by {self._holder()}; wait for it, stop it, or give another --workdir."
    )


def _machine() -> str:
  """Names this machine since it started, and the numbering of its processes; "" where that is unknown."""
  try:
    boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"
  except OSError:
    return ""


def _process(pid: int) -> str:
  """When a process began, since its number may be given again; "" if there is none."""
  try:
    return (
      pathlib.Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[19]
    )
  except (OSError, IndexError):
    return ""


def _is_gone(about: Mapping[str, object]) -> bool:
  """Whether a holder was a process of this machine, and has ended."""
  pid, here = about.get("pid"), _machine()
  if not here or about.get("machine") != here or not isinstance(pid, int):
    return False
  return _process(pid) != about.get("process")
