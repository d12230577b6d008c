"""Compiled programs in a bucket: a machine that starts later, or for the first time, compiles nothing.

JAX's persistent cache reads and writes its entries through `etils.epath`, which lets others register what an address
begins with. Here that is `programs+s3://` and `programs+gs://`: an entry is one object, read and written by `storage`.
A bucket that fails costs a compilation and a warning, never the run.
"""

import contextlib
import logging
import threading
from collections.abc import Iterator
from concurrent import futures

from etils import epath

from flexivit_jax import errors, storage

_LOG = logging.getLogger(__name__)
_PREFIX = "programs+"
_AT_ONCE = 4  # programs that are written at the same time
_ATTEMPTS, _LONGEST_S = (
  5,
  2.0,
)  # a program that is not read is compiled: not worth minutes of waiting


class _Place:
  """A folder of a bucket. Its methods raise nothing: after the first failure there is nothing in it, and no writing."""

  def __init__(self, url: str):
    self._bucket = storage.Bucket(url, attempts=_ATTEMPTS, longest_s=_LONGEST_S)
    self._pool = futures.ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="programs to a bucket")
    self._failed = threading.Lock()  # held from the first failure on

  def read(self, name: str) -> bytes | None:
    """Returns a program; None: there is none, or it cannot be read."""
    content = None
    with self._told():
      content = None if self._failed.locked() else self._bucket.read(name)
    return content

  def write(self, name: str, content: bytes) -> None:
    """Writes a program, in a thread, which the process waits for at its end."""
    self._pool.submit(self._write, name, content)

  def _write(self, name: str, content: bytes) -> None:
    with self._told():
      if not self._failed.locked():
        self._bucket.write(name, content)

  @contextlib.contextmanager
  def _told(self) -> Iterator[None]:
    try:
      yield
    except errors.UserError as e:
      if self._failed.acquire(blocking=False):
        _LOG.warning("Compiled programs are not kept in the bucket: %s", e)


_places: dict[str, _Place] = {}


def cache_dir(url: str) -> str:
  """Returns the value of `jax_compilation_cache_dir` with which JAX keeps its programs in a bucket.

  Args:
    url: of a folder in a bucket that nobody else may write to, for what is in it is run.

  Raises:
    UserError: obstore is not installed; or the address is none.
  """
  _places[url] = _places.get(url) or _Place(url)
  return f"{_PREFIX}{url}"


@epath.register_path_cls([f"{_PREFIX}{scheme}://" for scheme in storage.SCHEMES])
class ProgramPath:
  """What JAX's cache asks of a path: the folder itself, or an entry below it."""

  def __init__(self, address: str, name: str = ""):
    self._url, self.name = address.removeprefix(_PREFIX), name
    self._content: bytes | None = None

  def joinpath(self, *names: str) -> "ProgramPath":
    """Returns an entry of this folder; without names the folder."""
    return ProgramPath(self._url, "/".join([self.name, *names] if self.name else names))

  def __truediv__(self, name: str) -> "ProgramPath":
    return self.joinpath(name)

  def mkdir(self, *, parents: bool = False, exist_ok: bool = False) -> None:
    """Does nothing: a bucket has no folders."""
    del parents, exist_ok

  def exists(self) -> bool:
    """Whether there is an entry; reads it, since JAX reads those that are there."""
    self._content = _places[self._url].read(self.name)
    return self._content is not None

  def read_bytes(self) -> bytes:
    """Returns an entry.

    Raises:
      FileNotFoundError: there is none.
    """
    if self._content is None and not self.exists():
      raise FileNotFoundError(f"{self._url}/{self.name}")
    return self._content or b""

  def write_bytes(self, content: bytes) -> int:
    """Writes an entry, soon."""
    _places[self._url].write(self.name, content)
    return len(content)
