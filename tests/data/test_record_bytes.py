"""Records are bytes and come back as they were."""

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import pytest

from flexivit_jax.data import record_bytes
from flexivit_jax.errors import UserError

DTYPES = st.sampled_from(("?", "u1", "i2", "<i4", "<i8", "<u8", "<f2", "<f4", "<f8"))
ARRAYS = hnp.arrays(DTYPES, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4))
SCALARS = st.one_of(
  st.binary(),
  st.text(),
  st.booleans(),
  st.none(),
  st.integers(-(2**63), 2**64 - 1),
  st.floats(),
  hnp.arrays(DTYPES, ()).map(lambda a: a[()]),
)
VALUES = st.one_of(SCALARS, st.lists(SCALARS).map(tuple), ARRAYS)


def same(a, b):
  if isinstance(a, tuple):
    return type(b) is tuple and len(a) == len(b) and all(map(same, a, b))
  if isinstance(a, np.ndarray | np.generic):
    alike = type(a) is type(b) and (a.dtype, a.shape) == (b.dtype, b.shape)
    return alike and a.tobytes() == b.tobytes()
  return type(a) is type(b) and (a == b or (a != a and b != b))


@hypothesis.given(st.dictionaries(st.text(), VALUES, max_size=6))
def test_a_record_comes_back_as_it_was(record):
  data = record_bytes.encode(record)
  back = record_bytes.decode(data)
  assert back.keys() == record.keys()
  assert all(same(record[key], back[key]) for key in record), (record, back)
  reordered = {key: record[key] for key in reversed(record)}
  assert record_bytes.encode(reordered) == data == record_bytes.encode(back)


def test_what_a_source_may_hold_comes_back():
  boxes = np.array([[0, 0, 2.5, 3]], np.float32)
  record = {
    "image": bytes(range(256)),
    "id": "a/\udce9.jpg",  # a name that is not UTF-8
    "label": (3, 1),
    "boxes": boxes[:, ::-1][:, ::-1],  # not contiguous
    "box_labels": np.array([7]),
    "box_crowd": np.zeros(1, bool),
    "mask": np.zeros((2, 3), np.int32),
    "captions": ("a cat", ""),
    "annotated_hw": (3, 4),
  }
  back = record_bytes.decode(record_bytes.encode(record))
  assert all(same(record[key], back[key]) for key in record) and back["boxes"].flags.writeable
  big = np.arange(3, dtype=">i4")
  assert record_bytes.decode(record_bytes.encode({"a": big}))["a"].tolist() == [0, 1, 2]


@pytest.mark.parametrize(
  ("value", "said"),
  [
    ([1], "'a' is list, which"),
    ({"b": 1}, "'a' is dict, which"),
    (np.array(["x"]), "'a' is an array of <U1, which"),
    (np.array([None]), "'a' is an array of object, which"),
    ((1, [2]), "'a' is list, which"),
    (2**64, "more than 64 bits"),
  ],
)
def test_nothing_is_cast(value, said):
  with pytest.raises(UserError, match=said):
    record_bytes.encode({"a": value})


def test_other_bytes_are_no_record():
  for data in (b"\x01", b"\x81", b"\xd4\x05\x00"):
    with pytest.raises(ValueError):
      record_bytes.decode(data)
