"""Names, masks, counts and differences of parameter trees."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies as st

from flexivit_jax import trees
from flexivit_jax.errors import UserError


class Pair(NamedTuple):
  x: int
  y: list


TREE = {
  "embedding": {"kernel": np.zeros((3, 4)), "bias": np.zeros(4)},
  "Transformer": {"block0": {"kernel": np.zeros((4, 4))}},
  "head": {"kernel": np.zeros((4, 10)), "bias": np.zeros(10)},
}


def test_flatten_names_every_kind_of_node_in_leaf_order():
  tree = {"b": Pair(1, [2, 3]), "a": {"k": 0}}
  assert trees.flatten(tree) == {"a/k": 0, "b/x": 1, "b/y/0": 2, "b/y/1": 3}
  assert list(trees.flatten(tree).values()) == jax.tree.leaves(tree)


keys = st.text("abc", min_size=1, max_size=3)
nested = st.recursive(st.integers(), lambda t: st.dictionaries(keys, t, min_size=1), max_leaves=9)


@given(st.dictionaries(keys, nested))
def test_unflatten_inverts_flatten(tree):
  assert trees.unflatten(trees.flatten(tree)) == tree


def test_names_that_collide_are_errors():
  with pytest.raises(UserError, match=r"both named 'a/b'"):
    trees.flatten({"a": {"b": 1}, "a/b": 2})
  for flat in ({"a": 1, "a/b": 2}, {"a/b": 2, "a": 1}):
    with pytest.raises(UserError, match="both a leaf and a folder"):
      trees.unflatten(flat)


def test_mask_first_match_wins_and_matches_whole_names():
  got = trees.mask(TREE, [("head/.*", 0.5), (".*/kernel", 1.0)], default=0.0)
  assert trees.flatten(got) == {
    "Transformer/block0/kernel": 1.0,
    "embedding/bias": 0.0,
    "embedding/kernel": 1.0,
    "head/bias": 0.5,
    "head/kernel": 0.5,
  }
  for part in ("kernel", "head", "head/kern"):
    with pytest.raises(UserError, match="matches no whole name"):
      trees.mask(TREE, [(part, 1.0)], default=0.0)


def test_mask_without_effect_is_an_error_that_shows_names_nearby():
  with pytest.raises(UserError, match=r"optim.x: 'head/kernal' matches .* nearby: head/kernel"):
    trees.mask(TREE, [("head/kernal", 1.0)], default=0.0, what="optim.x")
  with pytest.raises(UserError, match=r"'head/.\*' has no effect, patterns before it"):
    trees.mask(TREE, [(".*", 1.0), ("head/.*", 2.0)], default=0.0)
  with pytest.raises(UserError, match=r"'\(' is not a regular expression"):
    trees.mask(TREE, [("(", 1.0)], default=0.0)


def test_count_of_arrays_and_of_shapes():
  assert trees.count(TREE) == 12 + 4 + 16 + 40 + 10
  assert trees.count(jax.eval_shape(lambda: {"a": jnp.zeros((2, 3)), "b": jnp.zeros(())})) == 7


def test_diff_lists_each_kind_of_difference_with_the_nearest_name():
  assert trees.diff(TREE, TREE) == []
  got = {
    "embedding": {"kernel": np.zeros((3, 5)), "bias": np.zeros(4, np.float32)},
    "Transformer": {"block0": {"kernal": np.zeros((4, 4))}},
    "head": TREE["head"],
  }
  assert trees.diff(TREE, got) == [
    "missing Transformer/block0/kernel float64[4,4]. Did you mean 'Transformer/block0/kernal'?",
    "extra Transformer/block0/kernal float64[4,4]",
    "embedding/bias: expected float64[4], got float32[4]",
    "embedding/kernel: expected float64[3,4], got float64[3,5]",
  ]
  lines = trees.diff(TREE, got, max_lines=1)
  assert len(lines) == 2
  assert lines[1] == "... and 3 more"
