"""Downloads, once: into a cache folder, resumed where they broke off, checked each time they are used.

What has arrived of a file is NAME.part; NAME.part.tag holds the version that it is of, as the server calls it (ETag or
Last-Modified), so that halves of two versions are never joined. NAME.sha256 holds the hash of a complete one.
"""

import contextlib
import errno
import hashlib
import http.client
import os
import pathlib
import re
import shutil
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from typing import Any

from flexivit_jax import errors, files, heartbeat

_CHUNK = 2**18
_TIMEOUT = 30.0  # seconds without a byte
_RETRIES = 3
_BUSY = (408, 429, 500, 502, 503, 504)
_PAGES = ("text/html", "application/xhtml+xml", "text/xml", "application/xml")

Stream = Any  # of text, as sys.stderr: anything that print writes to and that has isatty


class _BrokenError(Exception):
  """What another attempt may mend: a connection that broke, a server that is busy."""


def fetch(
  url: str,
  *,
  folder: pathlib.Path | None = None,
  sha256: str | None = None,
  progress: Stream | None = None,
  pause: float = 1.0,
) -> pathlib.Path:
  """Returns the file that stands at `url`; one that was fetched before is checked and asks for nothing.

  Args:
    url: http:// or https://.
    folder: where to keep it; by default `folders.cache_folder()`. Equal names of other addresses do not meet there.
    sha256: what the file must have, in hex. Not given: what it had when it was fetched.
    progress: the text stream where it is shown, by default stderr: one line that moves on a terminal, else two lines.
    pause: seconds before the first of three retries; doubled for each of the others.

  Raises:
    UserError: it cannot be had, is not what was expected (length, hash, a web page instead of a file), or cannot be
      kept. What has arrived stays for the next call, unless it is wrong.
  """
  folder = folder or files.cache_folder()
  path = _place(url, folder)
  with _disk_errors(url, folder):
    if not path.exists():
      folder.mkdir(mode=0o700, parents=True, exist_ok=True)
      path.parent.mkdir(mode=0o700, exist_ok=True)
      with _alone(path):
        if not path.exists():  # another process may have fetched it while this one waited
          return _download(url, path, sha256, progress or sys.stderr, pause)
    return _checked(path, url, sha256)


def is_kept(url: str, folder: pathlib.Path | None = None) -> bool:
  """Tells whether `fetch` finds the file without the network; does not read it."""
  return _place(url, folder or files.cache_folder()).is_file()


def _place(url: str, folder: pathlib.Path) -> pathlib.Path:
  """Where a file is kept: each address has a folder, since many call their files model.safetensors."""
  plain = url.isascii() and url.isprintable() and " " not in url
  scheme, host, path, *_ = urllib.parse.urlsplit(url) if plain else ("", "", "")
  name = path.rpartition("/")[2]
  if scheme not in ("http", "https") or not host or name in ("", ".", ".."):
    raise errors.UserError(
      f"{url!r} is no address of a file; expected https://HOST/.../NAME, spaces and the like as %20."
    )
  return folder / hashlib.sha256(url.encode()).hexdigest()[:16] / name


@contextlib.contextmanager
def _disk_errors(url: str, folder: pathlib.Path) -> Iterator[None]:
  # Errors of the connection are OSErrors too; they are caught where they occur.
  try:
    yield
  except OSError as e:
    raise errors.UserError(
      f"{url} cannot be kept in {folder}: {e.strerror or e}. Make room, or set FLEXIVIT_CACHE to"
      " another folder; what has arrived stays for the next time."
    ) from e


@contextlib.contextmanager
def _alone(path: pathlib.Path) -> Iterator[None]:
  """One process at a time fetches a file, the others wait; without effect where a folder cannot be locked."""
  with contextlib.ExitStack() as stack:
    with contextlib.suppress(ImportError, OSError):
      import fcntl

      folder = os.open(path.parent, os.O_RDONLY)
      stack.callback(os.close, folder)
      fcntl.flock(folder, fcntl.LOCK_EX)
    yield


def _checked(path: pathlib.Path, url: str, sha256: str | None) -> pathlib.Path:
  beside = _hash_file(path)
  expected = sha256 or (beside.read_text().partition(" ")[0] if beside.exists() else "not known")
  got = files.sha256(path)
  if got != expected:
    raise errors.UserError(
      f"{path} is not what was fetched from {url}: its sha256 is {got}, expected {expected}. Delete it"
      " to have it fetched again."
    )
  return path


def _hash_file(path: pathlib.Path) -> pathlib.Path:
  return path.with_name(f"{path.name}.sha256")


def _download(
  url: str, path: pathlib.Path, sha256: str | None, stream: Stream, pause: float
) -> pathlib.Path:
  part = path.with_name(f"{path.name}.part")
  got = _retried(url, part, stream, pause)
  if sha256 not in (None, got):
    _drop(part)
    raise errors.UserError(
      f"{url}: the file that arrived has the sha256 {got}, expected {sha256}; it was deleted. Try"
      " again; if it stays so, the file there is another one."
    )
  _hash_file(path).write_text(f"{got}  {path.name}\n")  # the format of sha256sum
  part.replace(path)
  _tag(part).unlink(missing_ok=True)
  return path


def _retried(url: str, part: pathlib.Path, stream: Stream, pause: float) -> str:
  for retry in range(_RETRIES + 1):
    try:
      return _attempt(url, part, stream)
    except _BrokenError as e:
      cause = e
    if retry < _RETRIES:
      time.sleep(pause * 2**retry)
  raise errors.UserError(
    f"{url}: {cause}; tried {_RETRIES + 1} times. What has arrived is kept: the same again resumes."
  ) from cause


def _attempt(url: str, part: pathlib.Path, stream: Stream) -> str:
  """Asks once for what is missing, and appends it to `part`; returns the sha256 of the whole."""
  size, version = _kept(part)
  with _open(url, part, size, version) as response:
    start, total = _extent(response)
    if start not in (0, size) or (start and _version(response) not in ("", version)):
      _drop(part)
      raise _BrokenError("the server sent a piece of another version of the file")
    if refusal := _refusal(response, start, total):
      _drop(part)
      raise errors.UserError(f"{url}: {refusal}")
    if not start:
      part.write_bytes(b"")
      _tag(part).write_text(_version(response))
    digest = _append(response, part, total, _Progress(stream, url, start, total))
  got = part.stat().st_size
  if total is not None and got != total:
    raise _BrokenError(f"expected {total} bytes, got {got}")
  return digest


def _kept(part: pathlib.Path) -> tuple[int, str]:
  """(bytes that are there, version that they are of); (0, "") if they cannot be told from those of another."""
  version = _tag(part).read_text() if _tag(part).exists() else ""
  return (part.stat().st_size, version) if version and part.exists() else (0, "")


def _tag(part: pathlib.Path) -> pathlib.Path:
  return part.with_name(f"{part.name}.tag")


def _drop(part: pathlib.Path) -> None:
  part.unlink(missing_ok=True)
  _tag(part).unlink(missing_ok=True)


def _open(url: str, part: pathlib.Path, size: int, version: str) -> http.client.HTTPResponse:
  headers = {"User-Agent": "flexivit_jax"}
  if size:
    headers |= {"Range": f"bytes={size}-", "If-Range": version}
  opener = urllib.request.build_opener(_Redirects)
  try:
    return opener.open(urllib.request.Request(url, headers=headers), timeout=_TIMEOUT)
  except urllib.error.HTTPError as e:
    with e:
      answer = f"the server answers {e.code} {e.reason}"
    if e.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
      _drop(part)  # it is longer than the file, which is another one then
    elif e.code not in _BUSY:
      raise errors.UserError(
        f"{url}: {answer}, expected the file; is the address right, and open to all?"
      ) from e
    raise _BrokenError(answer) from e
  except urllib.error.URLError as e:
    if not size:  # never reached: more attempts would only make the user wait
      raise errors.UserError(f"{url} cannot be reached: {e.reason}. Is there a network?") from e
    raise _BrokenError(f"it cannot be reached: {e.reason}") from e
  except (OSError, http.client.HTTPException) as e:
    raise _BrokenError(f"the connection broke: {e!r}") from e


class _Redirects(urllib.request.HTTPRedirectHandler):
  """Follows to https, and from http to http: never to a scheme that is less safe."""

  def redirect_request(
    self,
    req: urllib.request.Request,
    fp: Any,
    code: int,
    msg: str,
    headers: http.client.HTTPMessage,
    newurl: str,
  ) -> urllib.request.Request | None:
    if urllib.parse.urlsplit(newurl).scheme not in ("https", req.type):
      fp.close()
      raise errors.UserError(f"{req.full_url} leads to {newurl}, which is not safe to follow.")
    return super().redirect_request(req, fp, code, msg, headers, newurl)


def _extent(response: http.client.HTTPResponse) -> tuple[int, int | None]:
  """(first byte, length of the whole file) of a response: -1 or None where it does not say."""
  if response.status != http.HTTPStatus.PARTIAL_CONTENT:
    return 0, response.length
  extent = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", ""))
  return (int(extent[1]), int(extent[2])) if extent else (-1, None)


def _version(response: http.client.HTTPResponse) -> str:
  """What a server calls this version, if bytes of it can be asked for by that (RFC 9110, 13.1.5)."""
  etag = response.headers.get("ETag", "")
  return etag if etag.startswith('"') else response.headers.get("Last-Modified", "")


def _refusal(response: http.client.HTTPResponse, start: int, total: int | None) -> str:
  """Why a response is not the file, or cannot be checked; an empty string if it can."""
  with _connection_errors():
    begin = response.peek(64).lstrip()
  kind, coding = response.headers.get_content_type(), response.headers.get("Content-Encoding")
  # The first eight bytes of a .safetensors file are a number, which may begin with "<" but has zeros.
  if kind in _PAGES or (not start and begin[:1] == b"<" and b"\0" not in begin):
    return f"expected a file, got a page ({kind}); a login or a network's portal may be in between."
  if coding not in (None, "identity"):
    return f"expected the file as it is, got it packed ({coding}); fetch it with another program."
  if total is None and not response.chunked:
    return "the server does not say how long the file is; fetch it with another program."
  return ""


def _append(
  response: http.client.HTTPResponse, part: pathlib.Path, total: int | None, show: "_Progress"
) -> str:
  """Writes all that a response holds behind what is in `part`; returns the sha256 of both."""
  done = part.stat().st_size
  free = shutil.disk_usage(part.parent).free
  if total is not None and total - done > free:
    missing = f"it takes {_mb(total - done)} more, {_mb(free)} are free"
    raise OSError(errno.ENOSPC, missing)
  with contextlib.closing(show), part.open("r+b") as file:
    digest = hashlib.file_digest(file, "sha256")
    while chunk := _read(response):
      file.write(chunk)
      digest.update(chunk)
      done += len(chunk)
      show(done)
      heartbeat.beat()
  return digest.hexdigest()


def _read(response: http.client.HTTPResponse) -> bytes:
  with _connection_errors():
    return response.read(_CHUNK)


@contextlib.contextmanager
def _connection_errors() -> Iterator[None]:
  try:
    yield
  except (OSError, http.client.HTTPException) as e:
    raise _BrokenError(f"the connection broke: {e!r}") from e


class _Progress:
  """Shows how far a download is: a line that moves on a terminal, else one at the start and one at the end."""

  def __init__(self, stream: Stream, url: str, start: int, total: int | None):
    self._stream, self._name = stream, url.rpartition("/")[2]
    self._start, self._done, self._total = start, start, total
    self._moves = stream.isatty()
    self._begin = self._shown = time.monotonic()
    if not self._moves:
      of = "" if total is None else f", {_mb(total)}"
      print(f"fetching {url}{of}" + f", from {_mb(start)} on" * bool(start), file=stream)

  def __call__(self, done: int) -> None:
    """Takes the bytes that are there, those of earlier attempts too."""
    self._done = done
    if self._moves and time.monotonic() - self._shown > 0.1:
      self._shown = time.monotonic()
      print(f"\r{self}\x1b[K", end="", file=self._stream, flush=True)

  def close(self) -> None:
    """Ends the line."""
    print(f"\r{self}\x1b[K" if self._moves else str(self), file=self._stream)

  def __str__(self) -> str:
    seconds = max(time.monotonic() - self._begin, 1e-3)
    rate = (self._done - self._start) / seconds
    text = f"{self._name}: {_mb(self._done)}"
    if self._total is None or self._done == self._total or not rate:
      return f"{text} in {seconds:.0f} s"
    left = (self._total - self._done) / rate
    return f"{text} of {_mb(self._total)}, {_mb(rate)}/s, {left:.0f} s left"


def _mb(count: float) -> str:
  return f"{count / 1e6:.1f} MB"
