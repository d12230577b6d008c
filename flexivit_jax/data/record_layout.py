"""Where the records of an array_record file are, from its footer, so that single ones can be asked for in a bucket.

array_record's own reader reads and checks the records; it takes a path and does not say which bytes it needs. The
format is that of array_record's layout.proto, in chunks of Riegeli's records_file_format.md: the last 64 KiB name the
footer, which lists the chunks. A mistake here cannot give a wrong record: each chunk has a hash.
"""

import struct
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import numpy as np

BLOCK = 2**16
_BLOCK_HEADER, _CHUNK_HEADER = 24, 40
_MAGIC = 0x71930E704FDAE05E
_Result = TypeVar("_Result")
_CODECS = {ord("b"): "brotli", ord("s"): "snappy", ord("z"): "zstd"}


class Layout(NamedTuple):
  """Where the chunks of a file are.

  Attributes:
    records: number of records.
    offsets: int64 [chunks + 1], the first byte of each chunk, and the byte after the last.
    group: records in each chunk but the last.
  """

  records: int
  offsets: np.ndarray
  group: int


class LayoutError(Exception):
  """A file is not one of array_record, or its footer is damaged or of a form unknown here."""


def layout_of(size: int, read: Callable[[int, int], bytes]) -> Layout:
  """Returns the layout of a file.

  Args:
    size: bytes of the file.
    read: (start, end) -> these bytes of it.

  Raises:
    LayoutError: it has none; errors of `read` as they are.
  """
  if size < BLOCK or size % BLOCK:
    raise LayoutError(f"it has {size} bytes, no multiple of 64 KiB")
  begin = size - BLOCK
  end = read(begin, size)
  postscript = _parsed(lambda: _fields(next(_records(end, begin))))
  start = postscript.get(1)
  if postscript.get(2) != _MAGIC or not isinstance(start, int) or not 0 <= start <= begin:
    raise LayoutError("its end is not that of an array_record file")
  footer = read(start, begin) if start < begin else b""
  return _parsed(lambda: _layout(footer, start))


def _parsed(call: Callable[[], _Result]) -> _Result:
  try:
    return call()
  except LayoutError:
    raise
  except Exception as e:  # of a damaged footer
    raise LayoutError(f"its footer cannot be read: {type(e).__name__}: {e}") from e


def _layout(footer: bytes, start: int) -> Layout:
  records = _records(footer, start)
  about = _fields(_fields(next(records))[1])
  chunks = [_fields(record) for record in records]
  counts = [chunk[3] for chunk in chunks]
  offsets = np.array([*(chunk[1] for chunk in chunks), start], np.int64)
  regular = len(set(counts[:-1])) < 2 and all(0 < n <= counts[0] for n in counts)
  number = about.get(3, 0)
  if sum(counts) != number or not regular or np.any(np.diff(offsets) <= 0):
    raise LayoutError("its footer contradicts itself")
  return Layout(number, offsets, counts[0] if counts else 1)


def _records(content: bytes, position: int) -> Iterator[bytes]:
  """Yields the records of the chunk that begins at a position of the file; `content` is what is there."""
  content = _without_block_headers(content, position)
  _, size, _, kind, _ = struct.unpack_from("<5Q", content)
  if kind & 0xFF != ord("r"):
    raise LayoutError(f"a chunk has the type {kind & 0xFF}")
  data = content[_CHUNK_HEADER : _CHUNK_HEADER + size]
  packing = data[0]
  length, start = _varint(data, 1)
  sizes = _unpacked(data[start : start + length], packing)
  values = _unpacked(data[start + length :], packing)
  at = first = 0
  while at < len(sizes):
    number, at = _varint(sizes, at)
    yield values[first : first + number]
    first += number


def _without_block_headers(content: bytes, position: int) -> bytes:
  parts, at = [], position
  while at < position + len(content):
    begin = at + _BLOCK_HEADER if at % BLOCK == 0 else at
    at = (at // BLOCK + 1) * BLOCK
    parts.append(content[begin - position : at - position])
  return b"".join(parts)


def _unpacked(data: bytes, packing: int) -> bytes:
  if not packing:
    return data
  if packing not in _CODECS:
    raise LayoutError(f"its footer has the compression {packing}")
  try:
    import pyarrow
  except ImportError as e:
    raise LayoutError("its footer is compressed, and pyarrow is not installed") from e
  size, start = _varint(data, 0)
  return pyarrow.decompress(data[start:], size, codec=_CODECS[packing], asbytes=True)


def _fields(message: bytes) -> dict[int, Any]:
  """Returns the fields of a Protocol Buffers message by number: integers, or bytes."""
  fields: dict[int, Any] = {}
  at = 0
  while at < len(message):
    tag, at = _varint(message, at)
    if tag & 7 == 0:
      fields[tag >> 3], at = _varint(message, at)
    elif tag & 7 == 1:
      fields[tag >> 3], at = struct.unpack_from("<Q", message, at)[0], at + 8
    elif tag & 7 == 2:
      length, at = _varint(message, at)
      fields[tag >> 3], at = message[at : at + length], at + length
    else:
      raise LayoutError(f"a field has the type {tag & 7}")
  return fields


def _varint(data: bytes, at: int) -> tuple[int, int]:
  """Returns the number at a place, and the place after it."""
  number = shift = 0
  while True:
    byte = data[at]
    number |= (byte & 0x7F) << shift
    at, shift = at + 1, shift + 7
    if byte < 128:
      return number, at
