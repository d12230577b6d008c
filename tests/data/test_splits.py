"""Splits select what TFDS selects."""

import hypothesis
import hypothesis.strategies as st
import pytest
from tensorflow_datasets.core.splits import ReadInstruction, SplitDict, SplitInfo

from flexivit_jax.data.splits import Part, parse_split
from flexivit_jax.errors import UserError

pytestmark = pytest.mark.faults

SIZES = {"train": 1797, "test": 360, "one": 1}


def tfds_parts(split: str, sizes: dict[str, int]) -> list[tuple[str, int, int]]:
  infos = [SplitInfo(name=k, shard_lengths=[n], num_bytes=0) for k, n in sizes.items()]
  infos = {info.name: info for info in SplitDict(infos).values()}
  found = ReadInstruction.from_spec(split).to_absolute(infos)
  return [(p.splitname, p.from_ or 0, sizes[p.splitname] if p.to is None else p.to) for p in found]


@st.composite
def specs(draw, size: int, name: str) -> str:
  number = st.integers(-size, size).map(str)
  percent = st.one_of(st.integers(-100, 100), st.decimals(-100, 100, places=1)).map("{}%".format)
  bound = draw(st.sampled_from([number, percent]))
  start, stop = draw(bound | st.just("")), draw(bound | st.just(""))
  return f"{name}[{start}:{stop}]" if start or stop else name


@hypothesis.given(data=st.data(), size=st.integers(1, 5000))
def test_same_as_tfds(data, size):
  sizes = {"train": size, "test": 100}
  split = data.draw(specs(size, "train")) + "+test"
  expected = tfds_parts(split, sizes)
  for (name, start, stop), part in zip(expected, parse_split(split, sizes), strict=True):
    assert part.name == name
    assert range(part.start, part.stop) == range(start, stop), split


@hypothesis.given(size=st.integers(1, 10**7), percent=st.integers(0, 100))
def test_two_parts_of_a_split_are_the_split(size, percent):
  parts = parse_split(f"train[:{percent}%]+train[{percent}%:]", {"train": size})
  assert [i for p in parts for i in (p.start, p.stop)] == [0, parts[0].stop, parts[0].stop, size]


def test_the_order_is_as_written():
  assert parse_split("test+train[:-1797]+train[10:20]", SIZES) == (
    Part("test", 0, 360),
    Part("train", 0, 0),
    Part("train", 10, 20),
  )


@pytest.mark.parametrize(
  ("split", "message"),
  [
    ("tran[:5]", "Unknown split 'tran'; known: one, test, train. Did you mean 'train'"),
    ("train[5]", "Cannot read 'train.5.'"),
    ("train[:5", "Cannot read"),
    ("train[a:]", "Cannot read bound 'a'"),
    ("train[:2000]", "outside its 1797 examples"),
    ("train[5:5]", "is empty"),
    ("one[:10%]", "is empty"),
    ("", "Cannot read"),
  ],
)
def test_errors(split, message):
  with pytest.raises(UserError, match=message):
    parse_split(split, SIZES)
