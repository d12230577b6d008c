"""Files of our own: the cache folder, paths that Orbax misreads, atomic writes, the sha256 of a file."""

import contextlib
import hashlib
import os
import pathlib
import re
import uuid
from collections.abc import Iterator

from flexivit_jax import errors

_ODD = re.compile(r"[\[\]*?\\\ud800-\udfff]")  # lone surrogates stand for bytes that are not UTF-8
_REMOTE = ("gs", "s3", "az", "hf")  # first folders of a path that etils.epath reads as a bucket
_DESCRIPTORS = pathlib.Path("/proc/self/fd")


def cache_folder() -> pathlib.Path:
  """$FLEXIVIT_CACHE, else flexivit_jax in $XDG_CACHE_HOME where that is an absolute path, else in ~/.cache.

  Raises:
    UserError: it begins with ~ and no home folder is known.
  """
  cache, shared = os.environ.get("FLEXIVIT_CACHE"), os.environ.get("XDG_CACHE_HOME", "")
  named = pathlib.Path(cache or shared)
  if not cache and named.parts[:1] != ("~",) and not named.is_absolute():  # empty, too
    named = pathlib.Path("~/.cache")
  try:
    return named.expanduser() if cache else named.expanduser() / "flexivit_jax"
  except RuntimeError as e:
    raise errors.UserError(
      f"No home folder is known, so {named} is none; set FLEXIVIT_CACHE to a folder for files that can be made again."
    ) from e


def oddities(folder: pathlib.Path) -> str:
  """What in an absolute path Orbax and TensorStore read as something else than a name; "" where there is nothing.

  Orbax looks for the parts of a checkpoint by a glob pattern that starts with the path, TensorStore takes a backslash
  for a slash and refuses what is not UTF-8, and etils.epath takes /gs, /s3, /az and /hf for buckets.
  """
  odd = sorted(set(_ODD.findall(str(folder))))
  names = ["bytes that are not UTF-8" if c > "\ud7ff" and c < "\ue000" else c for c in odd]
  remote = [f"/{folder.parts[1]}" for _ in (0,) if folder.parts[1:2] and folder.parts[1] in _REMOTE]
  return " ".join(dict.fromkeys(names + remote))


def plain(folder: pathlib.Path) -> pathlib.Path:
  """An absolute path without ".." and without a double slash at the beginning; of others the same."""
  direct = ".." not in folder.parts and not str(folder).startswith("//")
  return folder if direct else pathlib.Path(os.path.realpath(folder))


class Alias:
  """Another path of a folder, without oddities: that of a descriptor which this process holds open until `close`.

  Attributes:
    path: the folder itself where it has no oddities (without ".." and a double slash at the beginning, which
      TensorStore takes out by the text alone); of a folder that does not exist a path that does not exist either.
  """

  def __init__(self, folder: pathlib.Path):
    """Opens the folder.

    Raises:
      UserError: this system names no descriptors, as only Linux does.
    """
    self._descriptor: int | None = None
    self.folder, self.path = folder, plain(folder)
    if not (odd := oddities(self.path)):
      return
    if not has_aliases():
      raise no_alias(folder, odd)
    if not folder.is_dir():
      self.path = pathlib.Path(os.devnull, "missing")
      return
    self._descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    self.path = _DESCRIPTORS / str(self._descriptor)

  def in_words(self, text: str) -> str:
    """A text of others with the folder's own path."""
    return text if self._descriptor is None else text.replace(str(self.path), str(self.folder))

  def close(self) -> None:
    """Closes the descriptor; the path is of no use any more."""
    if self._descriptor is not None:
      os.close(self._descriptor)
      self._descriptor = None


def has_aliases() -> bool:
  """Whether this system names the descriptors of a process."""
  return _DESCRIPTORS.is_dir()


def of_descriptor(number: int) -> pathlib.Path:
  """A path of a file that this process holds open, which is that file even if another has its name by now."""
  return (_DESCRIPTORS if has_aliases() else pathlib.Path("/dev/fd")) / str(number)


def no_alias(folder: pathlib.Path, odd: str) -> errors.UserError:
  """Returns the error for a folder whose path has oddities, where these cannot be got around."""
  plain = re.sub(r"-+", "-", _ODD.sub("-", folder.name)).strip("-") or "run"
  return errors.UserError(
    f"{printable(folder)} has {odd} in its path, which the checkpoints' library reads as something else than a name;"
    f" give a path without, e.g. one that ends in {plain!r}."
  )


def printable(path: pathlib.Path) -> str:
  """A path as one line of text."""
  text = str(path)
  return text if text.isprintable() else repr(text)


def write_atomically(
  path: pathlib.Path, data: str | bytes, *, unique: bool = False, durable: bool = False
) -> None:
  """Writes a whole file, or leaves the old one as it is: a crash at any moment leaves one of the two.

  Args:
    path: the file, in a folder that exists.
    data: its content; text is written as UTF-8.
    unique: other processes may write the same file at the same time: each writes a temporary file of its own name.
    durable: waits until the content is on the disk, so that a power failure leaves one of the two, too.

  Raises:
    UserError: the file cannot be written, as on a full disk; names the path.
  """
  content = data.encode() if isinstance(data, str) else data
  with replacing(path, unique=unique) as part, write_errors(path), part.open("wb") as file:
    file.write(content)
    if durable:
      file.flush()
      os.fsync(file.fileno())


@contextlib.contextmanager
def replacing(path: pathlib.Path, *, unique: bool = False) -> Iterator[pathlib.Path]:
  """Yields a temporary path next to `path` and renames it to `path` at the end; removes it after an error.

  For files that are too large to be held in memory; `write_atomically` is for all others.

  Args:
    path: the file to write or to replace.
    unique: see `write_atomically`.

  Raises:
    UserError: the file cannot be renamed.
  """
  part = path.with_name(f"{path.name}{f'.{uuid.uuid4().hex}' if unique else ''}.tmp")
  try:
    yield part
    with write_errors(path):
      os.replace(part, path)
  finally:
    with contextlib.suppress(OSError):
      part.unlink(missing_ok=True)


@contextlib.contextmanager
def write_errors(path: pathlib.Path) -> Iterator[None]:
  """Turns the system's refusal to write `path`, as on a full disk, into a UserError."""
  try:
    yield
  except OSError as e:
    raise errors.UserError(f"{path} cannot be written: {e.strerror or e}.") from e


def sha256(path: pathlib.Path, *, without_last: int = 0) -> str:
  """Returns the sha256 of a file's bytes in hex, without its last `without_last` bytes, where it may hold the sum."""
  digest, left = hashlib.sha256(), path.stat().st_size - without_last
  with path.open("rb") as file:
    while left > 0 and (chunk := file.read(min(left, 2**20))):
      digest.update(chunk)
      left -= len(chunk)
  return digest.hexdigest()
