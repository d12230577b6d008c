"""What the start of a run says of boxes: those beyond the tokens of each size, crowds, repetitions."""

import dataclasses

import numpy as np
import pytest

from flexivit_jax.data import box_lines
from flexivit_jax.data.sources import Source
from flexivit_jax.errors import UserError

PP = "decode|pad_boxes(9)|keep('image', 'boxes')"


def record(number: int, crowds: int = 0, repeated: int = 0) -> dict:
  corners = np.arange(number)[:, None] + np.array([0, 0, 1, 1])
  corners[:repeated] = corners[-1:]
  return {
    "boxes": corners.astype(np.float32),
    "box_labels": np.zeros(number, np.int64),
    "box_crowd": np.arange(number) < crowds,
    "id": "x",
  }


def source(*records: dict, listed: bool = True) -> Source:
  made = Source("boxes", "train", 1, ("cat",), len(records), lambda at: [records[i] for i in at])
  return dataclasses.replace(made, listing=lambda: iter(records)) if listed else made


def test_boxes_beyond_the_tokens_are_counted_at_each_size():
  data = source(*(record(n) for n in (30, 40, 1, 26)))
  for listed in (data, dataclasses.replace(data, listing=None)):
    assert box_lines(listed, PP, [48, 25, 36, 25, 64]) == [
      "at 25 tokens 21 of 97 boxes have no token, at 36 tokens 4; at 48 tokens each has one"
    ]
  assert box_lines(data, PP, [10]) == ["at 10 tokens 66 of 97 boxes have no token"]
  (line,) = box_lines(data, PP, [40])
  assert line == "each of 97 boxes has a token at each size; at most 40 are in an image"
  (line,) = box_lines(data, "decode|mosaic(8)|keep('boxes')", [40])
  assert line.endswith("; a mosaic has the boxes of all its tiles")


def test_crowds_repetitions_and_images_without_boxes_are_counted():
  data = source(record(5, crowds=2), record(0), record(4, repeated=2))
  lines = box_lines(data, "decode|without_crowd|keep('image', 'boxes')", [3])
  assert lines == [
    "at 3 tokens 1 of 7 boxes have no token",
    "1 of 3 images has no box",
    "2 boxes stand for a crowd, and are left out",
    "2 boxes repeat another one, class and corners; merge_boxes() in input.pp joins such",
  ]
  for pp in (PP, "decode|keep('image', 'boxes', 'box_crowd')"):
    with pytest.raises(UserError, match=r"boxes 'train' has 2 boxes .* crowd.*without_crowd\(\)"):
      box_lines(data, pp, [4])
  lines = box_lines(data, "decode|without_crowd|merge_boxes|keep('image')", [4])
  assert lines[0].startswith("each of 7 boxes") and "and are left out" in lines[2]
  assert len(lines) == 3


def test_what_has_no_boxes_or_cannot_be_read_is_counted():
  assert box_lines(source({"label": 3, "id": "x"}), PP, [4]) == []
  assert box_lines(source(record(0), record(0)), PP, [4]) == ["2 of 2 images have no box"]
  far = dataclasses.replace(source(record(9), listed=False), ahead=lambda at: None)
  assert box_lines(far, PP, [4]) == []
  many = source(*(record(3) for _ in range(300)), listed=False)
  (line,) = box_lines(many, PP, [2])
  assert line == "at 2 tokens 200 of 600 boxes have no token (in 200 of 300 images)"
  broken = dataclasses.replace(many, read=lambda at: 1 / 0)
  assert box_lines(broken, PP, [2]) == ["200 of 200 images that were tried cannot be read"]
