"""Objects in a bucket, s3://BUCKET/PATH or gs://BUCKET/PATH: read, written, listed, with back-off where they are busy.

An object is written as a whole or not at all. Both kinds of storage are strongly consistent, and both write under a
condition (only if absent, only if unchanged), which is what a lock of several machines needs. Requests are those of
obstore, a binding of Rust's object_store; credentials are found as it finds them, and in ~/.aws.
"""

import configparser
import importlib
import os
import pathlib
import random
import re
import threading
import time
import types
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

from flexivit_jax import errors

SCHEMES = {"s3": "s3", "gs": "gcs"}  # scheme -> the extra that brings what it needs
PIECE = 8 * 2**20  # bytes of a request for a part of an object
_ADDRESS = re.compile(rf"^({'|'.join(SCHEMES)}):/+(.+)$", re.DOTALL)
_STATUS = re.compile(r"status code: (\d{3})")
_METADATA_SERVER = "169.254.169.254"  # asked for credentials where nothing else gives any
_GONE, _BUSY = (301, 307, 400, 405, 411, 501), (409,)
_Result = TypeVar("_Result")


class Version(NamedTuple):
  """Which content an object has: a tag, and in gs:// the number of the write."""

  tag: str | None
  generation: str | None


class Entry(NamedTuple):
  """An object: the number of its bytes, and its version."""

  size: int
  version: Version


def address(path: str | os.PathLike[str]) -> str | None:
  """Returns the address in a bucket that a path stands for, without a slash at its end; None: it is a local path.

  `pathlib` makes "s3:/bucket/run" of "s3://bucket/run"; both are read.
  """
  match = _ADDRESS.match(os.fspath(path))
  return f"{match[1]}://{match[2].rstrip('/')}" if match else None


class Bucket:
  """The objects whose names begin with an address and a slash; names are relative to it.

  Args:
    url: s3://BUCKET/PATH or gs://BUCKET/PATH.
    attempts: how often a request is made before it is given up.
    wait_s, longest_s: seconds before the second attempt, which double up to the longest; a random half is left out.

  Attributes:
    url: the address.
    repeated: number of requests that were made once more.

  Raises:
    UserError: the package is not installed; or the address names no bucket.
  """

  def __init__(self, url: str, *, attempts: int = 9, wait_s: float = 0.2, longest_s: float = 20.0):
    self.url, self.repeated = url.rstrip("/"), 0
    self._attempts, self._wait, self._longest = attempts, wait_s, longest_s
    self._counting = threading.Lock()
    self._obstore = _obstore(self.url)
    limits = {"timeout": "120s", "connect_timeout": "10s", "allow_http": _plain_http()}
    options: dict[str, Any] = dict(client_options=limits, **_aws_files(self.url))
    once = dict(max_retries=0, retry_timeout=timedelta(minutes=2))
    # The parts of a large object are repeated by obstore: one of a thousand must not repeat them all.
    parts = dict(max_retries=attempts, retry_timeout=timedelta(minutes=5))
    try:
      from_url = self._obstore.store.from_url
      self._store = from_url(self.url, retry_config=once, **options)
      self._large = from_url(self.url, retry_config=parts, **options)
    except self._obstore.exceptions.BaseError as e:
      raise errors.UserError(f"{url} is no address of a bucket: {_first_line(e)}.") from e

  def read(self, name: str) -> bytes | None:
    """Returns the content of a small object; None: there is none."""
    return self._found(name, lambda: bytes(self._obstore.get(self._store, name).bytes()))

  def read_range(self, name: str, start: int, end: int, version: Version | None = None) -> bytes:
    """Returns the bytes [start, end) of an object.

    Args:
      name: of the object.
      start, end: the range.
      version: the content that the object must have; None: any.

    Raises:
      UserError: there is no such object; or it has another version, or is shorter.
    """

    def call() -> tuple[Version, bytes]:
      result = self._obstore.get(self._store, name, options={"range": (start, end)})
      return _version(result.meta), bytes(result.bytes())

    found = self._found(name, call)
    if found is None:
      raise errors.UserError(f"{self.of(name)} is gone.")
    if version is not None and found[0].tag != version.tag:  # a listing need not say the generation
      raise errors.UserError(
        f"{self.of(name)} has changed since it was opened; what was read before may not fit it. Start again, and leave"
        " objects in use as they are."
      )
    if len(found[1]) != end - start:
      raise errors.UserError(
        f"{self.of(name)}: bytes {start:,} to {end - 1:,} were asked for, and {len(found[1]):,} bytes came."
      )
    return found[1]

  def stat(self, name: str) -> Entry | None:
    """Returns size and version of an object; None: there is none."""
    return self._found(name, lambda: _entry(self._obstore.head(self._store, name)))

  def write(self, name: str, content: bytes) -> None:
    """Writes an object, in the place of one of this name."""
    self._call(name, lambda: self._put(name, content))

  def create(self, name: str, content: bytes) -> Version | None:
    """Writes an object that is not there yet and returns its version; None: it is there."""
    return self._conditional(name, content, "create")

  def replace(self, name: str, content: bytes, version: Version) -> Version | None:
    """Writes an object in the place of this version and returns the new one; None: it has changed, or is gone."""
    named = {"e_tag": version.tag, "version": version.generation}
    return self._conditional(name, content, {k: v for k, v in named.items() if v is not None})

  def delete(self, name: str) -> None:
    """Deletes an object, if it is there."""
    self._found(name, lambda: self._obstore.delete(self._store, name))

  def entries(self, prefix: str = "") -> dict[str, Entry]:
    """Returns {name: entry} of the objects below a prefix, which is a folder: "checkpoints/20"."""

    def call() -> dict[str, Entry]:
      listed = self._obstore.list(self._store, prefix=prefix or None)
      return {meta["path"]: _entry(meta) for chunk in listed for meta in chunk}

    return self._call(prefix, call)

  def upload(self, file: pathlib.Path, name: str) -> None:
    """Writes an object with the content of a file, which may be larger than the memory."""
    if file.stat().st_size <= PIECE:
      self.write(name, file.read_bytes())
      return
    self._call(name, lambda: self._obstore.put(self._large, name, file))

  def download(self, name: str, file: pathlib.Path) -> bool:
    """Writes an object's content to a file, piece by piece; returns whether there is such an object."""
    if (entry := self.stat(name)) is None:
      return False
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("wb") as out:
      for piece in self._pieces(name, entry):
        out.write(piece)
    return True

  def check(self, name: str, content: bytes = b"") -> tuple[float, float]:
    """Writes an object of this name, reads it, replaces it under a condition, and deletes it.

    Args:
      name: of no object that is there.
      content: what is written; by default a few random bytes.

    Returns:
      The seconds that writing and reading took.

    Raises:
      UserError: no credentials, no such bucket, no permission, no connection; other content than was written; or a
        server that ignores conditions, with which two runs could write one folder.
    """
    content, begun = content or os.urandom(16), time.perf_counter()
    self.write(name, content)
    written, begun = time.perf_counter() - begun, time.perf_counter()
    got = self.read(name)
    read = time.perf_counter() - begun
    if got != content:
      shown = "nothing" if got is None else f"{len(got)} other bytes"
      raise errors.UserError(f"{self.of(name)} was written, and {shown} read.")
    if self.create(name, content + b".") is not None:
      self.delete(name)
      raise errors.UserError(
        f"{self.of(name)}: the server replaces an object though it was to be written only where there is none, so that"
        " two runs could write one folder; use one that supports If-None-Match, or mount the bucket."
      )
    self.delete(name)
    return written, read

  def of(self, name: str) -> str:
    """The address of an object."""
    return f"{self.url}/{name}" if name else self.url

  def _pieces(self, name: str, entry: Entry) -> Iterator[bytes]:
    return (
      self.read_range(name, start, min(start + PIECE, entry.size))
      for start in range(0, entry.size, PIECE)
    )

  def _put(self, name: str, content: bytes, **options: Any) -> Any:
    return self._obstore.put(self._store, name, content, use_multipart=False, **options)

  def _conditional(self, name: str, content: bytes, mode: Any) -> Version | None:
    known = self._obstore.exceptions
    try:
      return self._call(name, lambda: _version(self._put(name, content, mode=mode)))
    except (known.AlreadyExistsError, known.PreconditionError, FileNotFoundError):
      # An answer may have been lost on its way: the request was repeated, and met what it had written.
      entry = self.stat(name)
      mine = entry is not None and self.read(name) == content
      return entry.version if mine and entry is not None else None

  def _found(self, name: str, call: Callable[[], _Result]) -> _Result | None:
    try:
      return self._call(name, call)
    except FileNotFoundError:
      return None

  def _call(self, name: str, call: Callable[[], _Result]) -> _Result:
    """Makes a request, and repeats it where another attempt may go better.

    Raises:
      UserError: it is refused, or is given up; names the object.
      FileNotFoundError, AlreadyExistsError, PreconditionError: as they are.
    """
    known, wait = self._obstore.exceptions, self._wait
    for attempt in range(1, self._attempts + 1):
      try:
        return call()
      except (known.AlreadyExistsError, known.PreconditionError):
        raise
      except (FileNotFoundError, known.BaseError) as e:
        if (refusal := self._refusal(name, e)) is not None:
          raise refusal from e
        if isinstance(e, FileNotFoundError):
          raise
        if attempt == self._attempts:
          raise errors.UserError(
            f"{self.of(name)}: given up after {attempt} attempts: {_first_line(e)}"
          ) from e
      with self._counting:
        self.repeated += 1
      time.sleep(wait * random.uniform(0.5, 1.0))
      wait = min(2 * wait, self._longest)
    raise AssertionError("unreachable")

  def _refusal(self, name: str, error: Exception) -> errors.UserError | None:
    """Returns the error for a request of which another attempt would end in the same way; None: it may not."""
    known, text, where = self._obstore.exceptions, str(error), self.of(name)
    status = int(match[1]) if (match := _STATUS.search(text)) else None
    if _METADATA_SERVER in text or "metadata.google.internal" in text:
      return errors.UserError(f"{where}: no credentials are found; {_credentials(self.url)}.")
    if "NoSuchBucket" in text or "specified bucket does not exist" in text:
      bucket = self.url.split("/")[2]
      return errors.UserError(
        f"{where}: there is no bucket {bucket!r}; make it, or give another address."
      )
    if isinstance(error, known.UnauthenticatedError) or status == 401:
      return errors.UserError(
        f"{where}: the credentials are refused: {_first_line(error)}; {_credentials(self.url)}."
      )
    if isinstance(error, known.PermissionDeniedError) or status == 403:
      return errors.UserError(
        f"{where}: no permission: {_first_line(error)}. A run reads, writes, lists and deletes below its address."
      )
    if isinstance(error, known.GenericError) and status in _GONE:
      return errors.UserError(f"{where}: refused: {_first_line(error)}")
    return None


def _obstore(url: str) -> types.ModuleType:
  scheme = url.partition(":")[0]
  try:
    importlib.import_module("obstore.store")
    importlib.import_module("obstore.exceptions")
    return importlib.import_module("obstore")
  except ImportError as e:
    raise errors.UserError(
      f"{url} needs the package obstore ({e}); pip install 'flexivit_jax[{SCHEMES[scheme]}]', or pip install obstore."
    ) from e


def _plain_http() -> bool:
  """Whether the user names a server without encryption, as an emulator or one in the same rack."""
  named = (os.environ.get(key, "") for key in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"))
  return any(value.startswith("http://") for value in named)


def _aws_files(url: str) -> dict[str, str]:
  """Returns keys and region from ~/.aws, where the environment names none: object_store does not read these files."""
  if not url.startswith("s3:"):
    return {}
  found = configparser.ConfigParser()
  home = pathlib.Path("~/.aws").expanduser()
  profile = os.environ.get("AWS_PROFILE", "default")
  named = {
    os.environ.get("AWS_SHARED_CREDENTIALS_FILE", str(home / "credentials")): profile,
    os.environ.get("AWS_CONFIG_FILE", str(home / "config")): profile
    if profile == "default"
    else f"profile {profile}",
  }
  values: dict[str, str] = {}
  for file, section in named.items():
    found.read(file)
    values |= dict(found[section]) if found.has_section(section) else {}
  options: dict[str, str] = {}
  keys = ("aws_access_key_id", "aws_secret_access_key", "aws_session_token")
  if "AWS_ACCESS_KEY_ID" not in os.environ:
    options |= {key: values[key] for key in keys if key in values}
  if not os.environ.keys() & {"AWS_REGION", "AWS_DEFAULT_REGION"} and "region" in values:
    options["aws_region"] = values["region"]
  return options


def _credentials(url: str) -> str:
  if url.startswith("s3:"):
    return (
      "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE to one of ~/.aws that has keys"
      " (`aws configure export-credentials --format env` prints those of others)"
    )
  return "run `gcloud auth application-default login`, or set GOOGLE_APPLICATION_CREDENTIALS to a key file"


def _first_line(error: Exception) -> str:
  """Returns what an error says, with the code that the server gives, without how it was come by."""
  lines = [" ".join(line.split()) for line in str(error).splitlines()] or [type(error).__name__]
  code = match[0] if (match := re.search(r"<Code>\w+</Code>", str(error))) else ""
  return (lines[0] if code in lines[0] else f"{lines[0]} {code}")[:400]


def _entry(meta: Any) -> Entry:
  return Entry(meta["size"], _version(meta))


def _version(result: Any) -> Version:
  return Version(result["e_tag"], result["version"])
