"""Whether a value that a user gives is what a function's annotation says.

An int is a float (PEP 484), True is no number, a list is as good as a tuple. Of a class that no config can hold, a
`Teacher` say, the config has the arguments: a section.
"""

import collections.abc
import inspect
import numbers
import os
import pathlib
import types
import typing
from typing import Any

_NAMES = {int: "an integer", float: "a number", str: "a string", bool: "True or False"}
_UNIONS = (typing.Union, types.UnionType)
_SEQUENCES = (tuple, list, collections.abc.Sequence)


def fits(value: Any, kind: Any) -> bool:
  """Whether a value is of a kind: int, float, str, bool, None, a union or a sequence of such, a mapping, a path."""
  origin, args = typing.get_origin(kind) or kind, typing.get_args(kind)
  if kind is Any or kind is inspect.Parameter.empty:
    return True
  if origin in _UNIONS:
    return any(fits(value, k) for k in args)
  if origin is typing.Literal:
    return any(type(value) is type(k) and value == k for k in args)
  if kind in (None, type(None)):
    return value is None
  if kind in (int, float):
    number = numbers.Integral if kind is int else numbers.Real
    return isinstance(value, number) and not isinstance(value, bool)
  if kind in (str, bool):
    return isinstance(value, kind)
  if origin is os.PathLike:
    return isinstance(value, os.PathLike)
  if origin in _SEQUENCES:
    return _fits_each(value, origin, args)
  return isinstance(value, collections.abc.Mapping)


def _fits_each(value: Any, origin: Any, args: tuple[Any, ...]) -> bool:
  if not isinstance(value, collections.abc.Sequence) or isinstance(value, str | bytes):
    return False
  if origin is tuple and args and args[-1] is not ...:
    return len(value) == len(args) and all(map(fits, value, args))
  return all(fits(v, args[0]) for v in value) if args else True


def text(kind: Any) -> str:
  """What a kind is, for a message: "an integer or None", "a tuple, each an integer"."""
  origin, args = typing.get_origin(kind) or kind, typing.get_args(kind)
  if origin in _UNIONS:
    wider = [k for k in args if not (k is int and float in args)]
    return " or ".join(dict.fromkeys(map(text, wider)))
  if origin is typing.Literal:
    return " or ".join(map(repr, args))
  if kind in (None, type(None)):
    return "None"
  if origin in _SEQUENCES:
    if not args or Any in args:
      return "a tuple"
    if origin is tuple and args[-1] is not ...:
      return f"({', '.join(map(text, args))})"
    return f"a tuple, each {text(args[0])}"
  if origin in (os.PathLike, pathlib.Path):
    return "a path"
  return _NAMES.get(kind, "a section of keys and values")
