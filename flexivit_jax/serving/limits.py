"""What a stranger may send: how many bytes, for how long, of how many pixels; and the images in it.

Every limit holds before the work that it bounds: bytes while they are read, pixels before they are decoded.
"""

import asyncio
import contextlib
import logging
from collections.abc import Iterator
from typing import Any, NamedTuple, final

import numpy as np
from python_multipart import multipart
from starlette.requests import Request

from flexivit_jax import errors
from flexivit_jax.data import images
from flexivit_jax.inference import predictor

# It warns of each byte that a stranger sends wrong; the stranger gets an answer, and the log stays readable.
logging.getLogger("python_multipart").setLevel(logging.CRITICAL)
RAW = ("application/octet-stream", "application/x-www-form-urlencoded", "")  # and image/*


class Limits(NamedTuple):
  """Limits of a request.

  Attributes:
    body_bytes: of a body.
    all_bytes: of all bodies that are in memory at the same time.
    pixels: of an image, by its header.
    images: of a request.
    read_s: seconds in which a request's head must be here, and then in which its body must be.
  """

  body_bytes: int = 10 * 2**20
  all_bytes: int = 256 * 2**20
  pixels: int = 2**26
  images: int = 16
  read_s: float = 10.0


class RefusedError(Exception):
  """A request that gets no answer.

  Attributes:
    status: of HTTP.
    text: why, for the client: no path, no traceback.
    headers: of the response.
  """

  def __init__(self, status: int, text: str, headers: dict[str, str] | None = None):
    super().__init__(status, text)
    self.status, self.text, self.headers = status, text, headers or {}


CLOSE = {"Connection": "close"}  # where a body is left unread


@final
class Memory:
  """The bytes of all bodies that are in memory."""

  def __init__(self, most: int):
    self.held, self._most = 0, most

  @contextlib.contextmanager
  def body(self) -> Iterator["Held"]:
    """One body; its bytes count until the end of the block."""
    held = Held()
    try:
      yield held
    finally:
      self.held -= len(held.content)

  def add(self, held: "Held", chunk: bytes) -> None:
    """Adds bytes to a body; refuses the request when there would be too many."""
    if self.held + len(chunk) > self._most:
      raise RefusedError(429, "too many bodies at the same time", {"Retry-After": "1", **CLOSE})
    self.held += len(chunk)
    held.content += chunk


@final
class Held:
  """The bytes of a body so far."""

  def __init__(self) -> None:
    self.content = bytearray()


async def read(request: Request, limits: Limits, memory: Memory, held: Held) -> bytes:
  """Reads a body.

  Raises:
    RefusedError: too long (413), too slow (408), no room for it (429).
    ClientDisconnect: the client is gone.
  """
  too_long = RefusedError(413, f"the body has more than {limits.body_bytes} bytes", CLOSE)
  declared = request.headers.get("content-length", "0")
  if not declared.isdecimal() or int(declared[:20]) > limits.body_bytes:
    raise too_long
  try:
    async with asyncio.timeout(limits.read_s):
      async for chunk in request.stream():
        if len(held.content) + len(chunk) > limits.body_bytes:
          raise too_long
        memory.add(held, chunk)
  except TimeoutError:
    text = f"the body was not here within {limits.read_s:g} seconds"
    raise RefusedError(408, text, CLOSE) from None
  return bytes(held.content)


def split(request: Request, body: bytes, limits: Limits) -> tuple[list[bytes], bool]:
  """Returns the encoded images of a body, and whether they came as a form of several.

  Raises:
    RefusedError: no image (400), too many (413), a content that is neither an image nor a form (415).
  """
  kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
  if kind == "multipart/form-data":
    return _parts(request.headers["content-type"], body, limits), True
  if kind not in RAW and not kind.startswith("image/"):
    raise RefusedError(
      415,
      f"Content-Type {kind[:80]!r}; expected image/*, application/octet-stream or multipart/form-data",
    )
  if not body:
    raise RefusedError(400, "the body is empty; expected the bytes of an image file")
  return [body], False


@final
class _Form:
  """Collects the parts of a form that were sent to their end: (whether it is a file, its bytes)."""

  def __init__(self, boundary: bytes, most: int):
    self.parts: list[tuple[bool, bytes]] = []
    self._most = most
    self._field = self._value = self._disposition = b""
    self._content = bytearray()
    names = ("part_begin", "part_data", "part_end", "header_field", "header_value", "header_end")
    callbacks: Any = {f"on_{name}": getattr(self, f"_{name}") for name in names}
    self.parser = multipart.MultipartParser(boundary, callbacks)

  def _part_begin(self) -> None:
    if len(self.parts) == self._most:
      raise RefusedError(413, f"more than {self._most} images")
    self._disposition, self._content = b"", bytearray()

  def _part_data(self, data: bytes, start: int, end: int) -> None:
    self._content += data[start:end]

  def _part_end(self) -> None:
    options = multipart.parse_options_header(self._disposition)[1]
    self.parts.append((b"filename" in options, bytes(self._content)))

  def _header_field(self, data: bytes, start: int, end: int) -> None:
    self._field += data[start:end]

  def _header_value(self, data: bytes, start: int, end: int) -> None:
    self._value += data[start:end]

  def _header_end(self) -> None:
    if self._field.lower() == b"content-disposition":
      self._disposition = self._value
    self._field = self._value = b""


def _parts(kind: str, body: bytes, limits: Limits) -> list[bytes]:
  """The files of a form; `kind` is its Content-Type. No temporary files, unlike Starlette's own parser."""
  boundary = multipart.parse_options_header(kind)[1].get(b"boundary")
  if not boundary:
    raise RefusedError(400, "no form: its Content-Type has no boundary")
  try:
    form = _Form(boundary, limits.images)
    form.parser.write(body)
    form.parser.finalize()
  except (ValueError, LookupError, AssertionError):  # the parser's own, of what no client sends
    raise RefusedError(400, "no form: damaged multipart data") from None
  if not all(is_file for is_file, _ in form.parts):
    raise RefusedError(
      400, "a part has no filename; expected files alone, options are in the query"
    )
  if not form.parts:
    raise RefusedError(400, "the form has no files; expected one or more images")
  return [content for _, content in form.parts]


def decode(prepare: predictor.Prepare, encoded: bytes, limits: Limits) -> np.ndarray:
  """Returns an image as `predict` prepares it: [h, w, c].

  Raises:
    RefusedError: too many pixels, or no image that can be read (400).
  """
  try:
    images.check_photo(encoded, max_pixels=limits.pixels)
  except errors.UserError as e:
    raise RefusedError(400, str(e)) from None
  except Exception as e:  # Damaged files raise nearly everything.
    raise RefusedError(400, f"not an image: {e}") from None
  image = predictor.attempt(prepare, encoded)
  if isinstance(image, str):
    raise RefusedError(400, image)
  return image
