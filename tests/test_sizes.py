import pytest

from flexivit_jax import errors, sizes
from flexivit_jax.sizes import size_args, size_key, size_name, size_text


def test_sizes_on_the_command_line():
  assert sizes.parse("5, 8,4x6") == (5, 8, (4, 6))
  for bad in ("", "5,", "0", "4x", "1x2x3", "-5", "x"):
    with pytest.raises(errors.UserError, match="no size"):
      sizes.parse(bad)


def test_all_is_every_size_that_is_known_here_or_an_error_that_says_what_to_give():
  assert sizes.parse("all", [5, (4, 6)]) == (5, (4, 6))
  assert sizes.parse("8", [5]) == (8,)
  with pytest.raises(errors.UserError, match=r"--seqhw=all: x lists none; give them, e.g. --seqhw"):
    sizes.parse("all", (), "x lists none")
  with pytest.raises(errors.UserError, match="'all' is no size"):
    sizes.parse("5,all", [5])


def test_one_size():
  assert sizes.parse_one("4x6", "") == (4, 6)
  for text in ("4,6", "all"):
    with pytest.raises(
      errors.UserError, match=f"--seqhw={text}: a folder holds one; give one size"
    ):
      sizes.parse_one(text, "a folder holds one")


def test_sizes_of_a_record_and_of_a_file_are_those_that_were_written():
  assert sizes.trained({"trained": {"seqhw": [5, [4, 6]]}}) == (5, (4, 6))
  assert sizes.trained({"trained": {"grid_hw": [[6, 8]]}}) == ((6, 8),)
  assert sizes.trained({}) == sizes.trained({"trained": {"seqhw": None}}) == ()
  assert [sizes.from_text(size_text(s)) for s in (5, (4, 6))] == [5, (4, 6)]


@pytest.mark.parametrize(
  ("size", "name"),
  [
    ({"seqhw": 8}, "seqhw=8"),
    ({"grid_hw": (4, 8)}, "grid_hw=4x8"),
    ({"seqhw": 8, "depth": 3}, "depth=3 seqhw=8"),
    ({}, "default size"),
  ],
)
def test_size_has_a_name_for_people_and_a_key(size, name):
  assert size_name(size) == name
  assert size_key(size) == size_key(dict(reversed(size.items())))
  assert dict(size_key(size)) == size


def test_sizes_are_integers_or_pairs():
  assert size_args(8) == {"seqhw": 8}
  assert size_args((2, 4)) == {"grid_hw": (2, 4)}
  assert [size_text(s) for s in (8, (2, 4))] == [8, "2x4"]
