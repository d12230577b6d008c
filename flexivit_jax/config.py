"""Configs: plain Python files with `get_config(arg="") -> ConfigDict`, checked against the code that they configure.

A section of a config is the keyword arguments of one function, so that function's signature says which keys there
are, which of them are needed, and what the rest default to.
"""

import ast
import contextlib
import importlib.util
import inspect
import numbers
import os
import pathlib
import re
import traceback
import types
import typing
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import ml_collections

from flexivit_jax import errors

# A section of a config: keyword arguments of one function, which checks their types.
Section = Mapping[str, Any]
Function = Callable[..., object]  # what a section configures
Kind = Any  # an annotation: a class, a union, a generic alias

# Sections that a config may leave out, and an override may begin.
OPTIONAL = (
  "checkpoint", "early_stopping", "evals", "flexi", "init", "mesh", "objective", "token_budget", "wandb",
)  # fmt: skip
# Keys whose value may be of another type than the config's own: a number or "auto", a truth value or a name.
OF_SEVERAL_TYPES = ("accumulate", "model.bias", "model.remat", "model.scan", "optim.freeze")

# What to do instead where a key is often looked for.
_LOGGED = (
  " Metrics are always in metrics.jsonl and TensorBoard's tb/; for Weights & Biases give"
  " wandb=dict(project=...)."
)
_ADVICE = {
  **dict.fromkeys(("logger", "loggers", "writers", "log_to", "report_to", "tensorboard"), _LOGGED),
  "best": " Give checkpoint.best.",
  "class_weights": " Give objective.class_weights.",
  "patience": " Give early_stopping.patience.",
  "sampler": " Give input.sampler.",
}

# Annotations that stand for one word, and kinds of annotations, for `fits` and `kind_text`.
_NAMES = {int: "an integer", float: "a number", str: "a string", bool: "True or False"}
_UNIONS = (typing.Union, types.UnionType)
_SEQUENCES = (tuple, list, Sequence)


def load(spec: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
  """Returns the config of "path/to/file.py:arg" as plain dicts, with overrides like "optim.lr=1e-3".

  "digits", "digits.py" and "configs/digits.py" are also the configs that ship with the package, unless there is such
  a file. A path may hold colons: the file is the shortest beginning that is one, up to a colon or the end.

  Raises:
    UserError: no such file, a bad argument, or an override that is not `key=value`.
  """
  file, arg = _divide(spec)
  module_spec = importlib.util.spec_from_file_location(file.stem, file)
  if module_spec is None or module_spec.loader is None:
    raise errors.UserError(f"{file} is not a Python file: its name does not end in .py.")
  module = importlib.util.module_from_spec(module_spec)
  with _one_line(file):
    module_spec.loader.exec_module(module)
  if not hasattr(module, "get_config"):
    raise errors.UserError(f"{file} has no get_config; a config is `def get_config(arg=''): ...`.")
  with _one_line(file):
    config = module.get_config(arg)
  if not isinstance(config, ml_collections.ConfigDict):
    raise errors.UserError(
      f"{file}: get_config returns a {type(config).__name__}; expected an ml_collections.ConfigDict."
    )
  config.lock()
  for override in overrides:
    _override(config, override)
  return config.to_dict()


# NAME or NAME=VALUE and a comma or the end; a value in quotes may hold commas.
_PART = re.compile(r"""([^=,]*)(?:=('[^']*'|"[^"]*"|[^,]*))?(,|$)""")


@contextlib.contextmanager
def _one_line(file: pathlib.Path) -> Iterator[None]:
  """An error of a config's own code as one line, with the line of the file in which it is."""
  try:
    yield
  except errors.UserError:
    raise
  except Exception as e:
    frames = traceback.extract_tb(e.__traceback__)
    lines = [f.lineno for f in frames if f.filename == str(file)]
    line = e.lineno if isinstance(e, SyntaxError) else lines[-1] if lines else None
    where = file if line is None else f"{file}:{line}"
    text = " ".join(str(e).split())
    raise errors.UserError(f"{where}: {type(e).__name__}: {text}.") from e


def parse_arg(arg: str, **defaults: Any) -> ml_collections.ConfigDict:
  """Parses "fixed=8,debug" against defaults, whose types the values have; a lone name means True.

  A value that holds a comma is written in quotes, "data_dir='a,b'"; nothing in the quotes is read in another way.

  Raises:
    UserError: an unknown name or a value of another type.
  """
  values, before = dict(defaults), None
  for name, text in _parts(arg):
    if name not in defaults:
      raise errors.UserError(
        f"{errors.unknown('config argument', name, defaults)}{_quotes(before)}"
      )
    what, like = f"config argument {name}", defaults[name]
    if text is None and not isinstance(like, bool):
      raise errors.UserError(f"{what} needs a value: {name}={like!r}.")
    before = (name, text) if isinstance(like, str) else None
    quoted = isinstance(like, str) and len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    values[name] = text[1:-1] if quoted else _typed(what, "True" if text is None else text, like)
  return ml_collections.ConfigDict(values)


def _parts(arg: str) -> Iterator[tuple[str, str | None]]:
  """The names in an argument with their values; None for a name that stands alone."""
  at = 0
  while at < len(arg):
    match = _PART.match(arg, at)
    at = match.end()
    if match[1] or match[2] is not None:
      yield match[1], match[2]


def _quotes(before: tuple[str, str] | None) -> str:
  """What to do about an unknown name that may be the rest of the value before it."""
  if before is None:
    return ""
  name, text = before
  return f" A value that holds a comma is written in quotes: \"FILE:{name}='{text},...'\"."


def choose(what: str, name: str, table: Any) -> Any:
  """Returns what an argument of a config chooses: `table[name]`, or the name itself of a sequence of names.

  Raises:
    UserError: it is not among them.
  """
  if name not in table:
    raise errors.unknown(f"config argument {what}", name, table)
  return table[name] if isinstance(table, Mapping) else name


def grids(side: int, least: int = 8, most: int = 48) -> tuple[int, ...]:
  """Tokens a side whose patches of `least` to `most` pixels divide an image of `side` pixels.

  Raises:
    UserError: there are none.
  """
  sides = tuple(n for n in range(-(-side // most), side // least + 1) if n > 0 and side % n == 0)
  if not sides:
    raise errors.UserError(
      f"res={side}: no patch of {least} to {most} pixels divides an image of {side} pixels; take a multiple of"
      f" {least}, like 224 or 240."
    )
  return sides


def check(
  where: str,
  section: object,
  *functions: Function,
  given: Sequence[str] = (),
  needed: Mapping[str, Kind] = {},
  optional: Mapping[str, Kind] = {},
) -> Section:
  """Returns a section whose keys are arguments of the functions that it configures, and its values what they take.

  Args:
    where: the section's name, e.g. "optim".
    section: the keys and values of the user.
    *functions: what the section configures.
    given: arguments that the program itself provides; not the user's to set.
    needed: keys that are no function's arguments, and have to be there; and what their values are, as an annotation.
    optional: keys that are no function's arguments, and may be there; likewise.

  Raises:
    UserError: a key that is none of these, with the nearest that is; one that is missing; a value of another type.
  """
  keys = check_known(where, section, *functions, given=given, optional=(*needed, *optional))
  parameters = _parameters(functions, given)
  required = [p.name for p in parameters if p.default is inspect.Parameter.empty]
  missing = [k for k in (*needed, *required) if k not in keys]
  if missing:
    raise errors.UserError(
      f"The config lacks {', '.join(_prefixed(where, dict.fromkeys(missing)))}."
    )
  kinds = [*needed.items(), *optional.items(), *((p.name, p.annotation) for p in parameters)]
  for key, kind in kinds:
    if key in keys and not fits(keys[key], kind):
      raise _wrong(_prefixed(where, [key])[0], keys[key], kind)
  return keys


@contextlib.contextmanager
def naming(section: str) -> Iterator[None]:
  """Errors of what a section configures say which it is."""
  try:
    yield
  except errors.UserError as e:
    raise errors.UserError(f"{section}: {e}" if section else str(e)) from e


def check_known(
  where: str,
  section: object,
  *functions: Function,
  given: Sequence[str] = (),
  optional: Sequence[str] = (),
) -> Section:
  """As `check`, of unknown keys only: nothing has to be there."""
  if not isinstance(section, Mapping):
    raise _wrong(where, section, Mapping)
  known = list(dict.fromkeys([*(p.name for p in _parameters(functions, given)), *optional]))
  for key in section:
    if key not in known:
      if not where and key in _ADVICE:
        raise errors.UserError(f"Unknown config key {key!r}.{_ADVICE[key]}")
      raise errors.unknown(
        "config key", f"{where}.{key}" if where else key, _prefixed(where, known)
      )
  return section


def _wrong(key: str, value: object, kind: Kind) -> errors.UserError:
  return errors.UserError(f"The config's {key} is {value!r:.80}; expected {kind_text(kind)}.")


def _parameters(functions: Sequence[Function], given: Sequence[str]) -> list[inspect.Parameter]:
  parameters = [p for f in functions for p in inspect.signature(f).parameters.values()]
  kinds = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
  return [p for p in parameters if p.kind in kinds and p.name not in given]


def _prefixed(where: str, names: Iterable[str]) -> list[str]:
  return [f"{where}.{name}" if where else name for name in names]


def fits(value: object, kind: Kind) -> bool:
  """Whether a value of a config is what an annotation says: a number, text, None, a union, a sequence, a path.

  An int is a float (PEP 484), True is no number, a list is as good as a tuple. A class that no config can hold, such
  as `Teacher`, is configured by its arguments: any mapping fits.
  """
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
  return isinstance(value, Mapping)


def _fits_each(value: object, origin: Kind, args: tuple[Kind, ...]) -> bool:
  if not isinstance(value, Sequence) or isinstance(value, str | bytes):
    return False
  if origin is tuple and args and args[-1] is not ...:
    return len(value) == len(args) and all(map(fits, value, args))
  return all(fits(v, args[0]) for v in value) if args else True


def kind_text(kind: Kind) -> str:
  """Returns the annotation in words, for messages: "an integer or None", "a tuple, each an integer"."""
  origin, args = typing.get_origin(kind) or kind, typing.get_args(kind)
  if origin in _UNIONS:
    wider = [k for k in args if not (k is int and float in args)]
    return " or ".join(dict.fromkeys(map(kind_text, wider)))
  if origin is typing.Literal:
    return " or ".join(map(repr, args))
  if kind in (None, type(None)):
    return "None"
  if origin in _SEQUENCES:
    if not args or Any in args:
      return "a tuple"
    if origin is tuple and args[-1] is not ...:
      return f"({', '.join(map(kind_text, args))})"
    return f"a tuple, each {kind_text(args[0])}"
  if origin in (os.PathLike, pathlib.Path):
    return "a path"
  return _NAMES.get(kind, "a section of keys and values")


def _divide(spec: str) -> tuple[pathlib.Path, str]:
  """The file and the argument of "path/to/file.py:arg"; either may hold colons."""
  ends = [i for i, character in enumerate(spec) if character == ":"]
  for end in (*ends, len(spec)):
    if pathlib.Path(spec[:end]).is_file():
      return pathlib.Path(spec[:end]), spec[end + 1 :]
  path, _, arg = spec.partition(":")
  return _find(path), arg


def _find(path: str) -> pathlib.Path:
  file, here = pathlib.Path(path), pathlib.Path(__file__).parent
  shipped = [folder for folder in (here / "configs", here.parent / "configs") if folder.is_dir()]
  by_name = shipped if str(file.parent) in (".", "configs") and file.suffix in ("", ".py") else ()
  for candidate in (file, *(folder / f"{file.stem}.py" for folder in by_name)):
    if candidate.is_file():
      return candidate
  names = sorted(
    f.stem
    for folder in shipped
    for f in folder.glob("*.py")
    if f.stem not in ("__init__", "common")
  )
  raise errors.unknown("config", path, names)


def _override(config: ml_collections.ConfigDict, override: str) -> None:
  key, equals, text = override.partition("=")
  if not equals:
    raise errors.UserError(f"--config.{override}: expected --config.{override}=VALUE.")
  *sections, leaf = key.split(".")
  node = config
  if sections and sections[0] in OPTIONAL and node.get(sections[0]) is None:
    with node.unlocked(), node.ignore_type():
      node[sections[0]] = ml_collections.ConfigDict()
  for section in sections:
    if not isinstance(node.get(section), ml_collections.ConfigDict):
      raise errors.unknown(
        "config section", key, [k for k in node if isinstance(node[k], ml_collections.ConfigDict)]
      )
    node = node[section]
  if sections == ["evals"] and literal(text) is None:
    _leave_out(node, leaf)
    return
  like = None if key in OF_SEVERAL_TYPES else node.get(leaf)
  value = _typed(f"--config.{key}", text, like)
  with (
    node.unlocked(),
    node.ignore_type(),
  ):  # a key that the file leaves to its default is checked later
    try:
      node[leaf] = value
    except (TypeError, ValueError) as e:  # a section's key with a dot, or that is no text
      raise errors.UserError(f"--config.{key} cannot be {text}: {e}") from e


def _leave_out(evals: ml_collections.ConfigDict, name: str) -> None:
  """An evaluation is a section, so None can only mean that there is none."""
  if name not in evals:
    raise errors.unknown("evaluation", name, evals)
  with evals.unlocked():
    del evals[name]


def literal(text: str) -> Any:
  """The Python literal that a text of the command line is; the text itself where it is none."""
  try:
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")  # of a backslash in quotes
      return ast.literal_eval(text)
  except (ValueError, SyntaxError, MemoryError, RecursionError):
    return text


def _typed(what: str, text: str, like: Any) -> Any:
  """The value that a text stands for, of the type of `like`; None can stand anywhere and be anything."""
  value = literal(text)
  if value is None or like is None:
    return value
  if isinstance(like, str):
    return value if isinstance(value, str) else text  # A folder may be called 2024.
  if isinstance(like, float) and isinstance(value, int) and not isinstance(value, bool):
    return float(value)
  if isinstance(like, list | tuple) and isinstance(value, list | tuple):
    return type(like)(value)
  if isinstance(like, ml_collections.ConfigDict):
    if isinstance(value, dict):
      return value
    raise errors.UserError(f"{what} is {value!r}; expected one of its keys: {', '.join(like)}.")
  if type(value) is not type(like):
    raise errors.UserError(f"{what} is {value!r}; expected a {type(like).__name__}, like {like!r}.")
  return value
