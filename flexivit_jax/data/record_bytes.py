"""Records of a source as bytes and back: MessagePack, with two extensions for NumPy.

Everything comes back as it was: bytes bit for bit, tuples as tuples, arrays with dtype and shape. Equal records
have equal bytes, since keys are sorted. Nothing is pickled, so reading foreign bytes runs no code.
"""

from typing import Any

import msgpack
import numpy as np

from flexivit_jax.data.sources.base import Record
from flexivit_jax.errors import UserError

_ARRAY, _SCALAR = 1, 2  # MessagePack's numbers of our extensions
_KINDS = "biuf"  # NumPy's bool, int, unsigned, float
_PLAIN = (bytes, str, bool, int, float, type(None))
# Names of files that are not UTF-8 are text with lone surrogates.
_TEXT = "surrogateescape"


def encode(record: Record) -> bytes:
  """Returns a record as bytes.

  Raises:
    UserError: a value is none of bytes, str, bool, int (64 bits), float, None, a tuple of these, a NumPy array or
      scalar of numbers; names its key.
  """
  try:
    plain = {key: _plain(record[key], key) for key in sorted(record)}
    return msgpack.packb(plain, unicode_errors=_TEXT)
  except OverflowError as e:
    raise UserError(f"A record has an int of more than 64 bits: {e}.") from e


def decode(data: bytes) -> Record:
  """Returns the record that `encode` was given; its arrays are writable copies.

  Raises:
    ValueError: the bytes are no record.
  """
  record = msgpack.unpackb(data, use_list=False, unicode_errors=_TEXT, ext_hook=_from_extension)
  if not isinstance(record, dict):
    raise ValueError(f"expected a record, got a {type(record).__name__}")
  return record


def _plain(value: Any, key: str) -> Any:
  """Returns what MessagePack writes in the place of a value."""
  if type(value) in _PLAIN:
    return value
  if type(value) is tuple:
    return [_plain(item, key) for item in value]
  if isinstance(value, np.ndarray | np.generic) and value.dtype.kind in _KINDS:
    kind = _ARRAY if isinstance(value, np.ndarray) else _SCALAR
    little = np.asarray(value, value.dtype.newbyteorder("<"))
    content = [little.dtype.str, list(little.shape), little.tobytes()]
    return msgpack.ExtType(kind, msgpack.packb(content))
  what = f"an array of {value.dtype}" if isinstance(value, np.ndarray) else type(value).__name__
  raise UserError(
    f"{key!r} is {what}, which a packed record cannot hold; expected bytes, text, numbers, None, tuples of these, or an"
    " array of numbers."
  )


def _from_extension(kind: int, data: bytes) -> np.ndarray | np.generic:
  if kind not in (_ARRAY, _SCALAR):
    raise ValueError(f"expected an array, got extension {kind} of MessagePack")
  dtype, shape, content = msgpack.unpackb(data)
  array = np.frombuffer(content, np.dtype(dtype)).reshape(shape)
  return array.copy() if kind == _ARRAY else array[()]
