"""Parameter trees by name: "/"-joined names, values by regular expression, counts, differences."""

import collections
import difflib
import hashlib
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from flexivit_jax.errors import UserError, nearest

Params = dict[str, Any]  # a model's: nested dicts of arrays, or of their shapes and dtypes
Arrays = dict[str, np.ndarray]  # arrays by full name, not nested
Tree = Any  # a pytree: nested containers of arrays, or of anything else
Json = dict[str, Any]  # a JSON object, as a record or a config.json holds it


def flatten(tree: Tree) -> Params:
  """Returns `{"a/b/c": leaf}` in the order of `jax.tree.leaves`.

  Raises:
    UserError: two leaves get the same name (a key that contains "/").
  """
  named = [(_name(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]
  flat = dict(named)
  if len(flat) != len(named):
    twice = next(n for n, times in collections.Counter(n for n, _ in named).items() if times > 1)
    raise UserError(f"Two leaves are both named {twice!r}; use keys without '/'.")
  return flat


def unflatten(flat: Mapping[str, Any]) -> Params:
  """Returns the nested dicts that `flatten` gives back as `flat`.

  Raises:
    UserError: a name is both a leaf and the beginning of another name.
  """
  tree: Params = {}
  for name, leaf in flat.items():
    *parents, last = name.split("/")
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
      if not isinstance(node, dict):
        raise UserError(f"{name!r}: {parent!r} is both a leaf and a folder; rename one of them.")
    if last in node:
      raise UserError(f"{name!r} is both a leaf and a folder; rename one of them.")
    node[last] = leaf
  return tree


def overlaid(params: Mapping[str, Any], others: Mapping[str, Any]) -> Params:
  """Returns a tree of dicts in which the leaves of the second stand in the place of those of the first."""
  out = dict(params)
  for name, value in others.items():
    both = isinstance(value, Mapping) and isinstance(out.get(name), Mapping)
    out[name] = overlaid(out[name], value) if both else value
  return out


def map_named(f: Callable[[str, Any], Any], tree: Tree) -> Tree:
  """Returns the tree of `f(name, leaf)`."""
  return jax.tree_util.tree_map_with_path(lambda path, leaf: f(_name(path), leaf), tree)


def mask(
  tree: Tree, patterns: Iterable[Sequence[Any]], *, default: Any, what: str = "patterns"
) -> Tree:
  """Returns a tree of values: of the first `(regex, value)` whose regex matches the whole name.

  Args:
    tree: any tree; only its names are used.
    patterns: pairs `(regex, value)`, the most specific first. A value None would vanish from a JAX
      tree; use another one.
    default: the value of leaves that no regex matches.
    what: what the patterns are, for the error.

  Raises:
    UserError: a regex is invalid, or decides no leaf at all: a pattern without effect is a mistake.
  """
  compiled = [(_compile(regex, what), value) for regex, value in patterns]
  names = list(flatten(tree))
  first = {name: _first_match(name, compiled) for name in names}
  for i, (regex, _) in enumerate(compiled):
    if i not in first.values():
      raise _no_effect(regex, names, what)
  values = [*(value for _, value in compiled), default]
  return map_named(lambda name, _: values[first[name]], tree)


def count(tree: Tree) -> int:
  """Returns the number of scalars in a tree of arrays or shapes."""
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def size_in_bytes(tree: Tree) -> int:
  """Bytes of all arrays, or of what has their shapes and dtypes."""
  return sum(math.prod(x.shape) * np.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree))


def digest(tree: Tree) -> str:
  """Returns a sha256 of the names, shapes, dtypes and values of a tree of arrays."""
  sha = hashlib.sha256()
  for name, leaf in sorted(flatten(tree).items()):
    array = np.ascontiguousarray(leaf)
    sha.update(f"{name} {array.dtype} {array.shape}\n".encode())
    sha.update(array.tobytes())
  return sha.hexdigest()


def diff(expected: Tree, got: Tree, *, max_lines: int = 20) -> list[str]:
  """Returns one line per difference in names, shapes and dtypes between trees; no line when equal.

  A missing name is shown with the nearest one of the names that are there but not expected. After
  `max_lines` lines, one more says how many were left off.
  """
  expected, got = flatten(expected), flatten(got)
  extra = [name for name in got if name not in expected]
  missing = [name for name in expected if name not in got]
  changed = [n for n in expected if n in got and _spec(expected[n]) != _spec(got[n])]
  # The nearest name costs a search through all, so lines are made only for those that are shown.
  todo = [
    *(lambda n=n: f"missing {n} {_spec(expected[n])}.{nearest(n, extra)}" for n in missing),
    *(lambda n=n: f"extra {n} {_spec(got[n])}" for n in extra),
    *(lambda n=n: f"{n}: expected {_spec(expected[n])}, got {_spec(got[n])}" for n in changed),
  ]
  left_off = len(todo) - max_lines
  return [line() for line in todo[:max_lines]] + ([f"... and {left_off} more"] * (left_off > 0))


def _name(path: tuple[Any, ...]) -> str:
  return jax.tree_util.keystr(path, simple=True, separator="/")


def _compile(regex: str, what: str) -> re.Pattern[str]:
  try:
    return re.compile(regex)
  except re.error as e:
    raise UserError(f"{what}: {regex!r} is not a regular expression: {e}.") from e


def _first_match(name: str, compiled: Sequence[tuple[re.Pattern[str], Any]]) -> int:
  """Returns the index of the first pattern that matches, or -1."""
  return next((i for i, (regex, _) in enumerate(compiled) if regex.fullmatch(name)), -1)


def _no_effect(regex: re.Pattern[str], names: Sequence[str], what: str) -> UserError:
  if any(regex.fullmatch(name) for name in names):
    return UserError(
      f"{what}: {regex.pattern!r} has no effect, patterns before it take all its names;"
      " put the specific patterns first."
    )
  plain = re.sub(r"[\\^$*+?()\[\]{}|]|\.(?=[*+?])", "", regex.pattern)
  near = difflib.get_close_matches(plain, names, n=5, cutoff=0.0)
  return UserError(
    f"{what}: {regex.pattern!r} matches no whole name of {len(names)};"
    f" names nearby: {', '.join(near)}."
  )


def _spec(leaf: Any) -> str:
  """Returns e.g. `float32[3,4]`; leaves without a dtype give their type's name."""
  if not hasattr(leaf, "dtype"):
    return type(leaf).__name__
  return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"
