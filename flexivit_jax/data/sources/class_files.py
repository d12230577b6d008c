"""Class names from a file: a line for each, JSON, or the YAML of a YOLO data set; and their colours in masks."""

import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from flexivit_jax.data import class_names
from flexivit_jax.errors import UserError

Color = tuple[int, int, int]  # red, green, blue
_BETWEEN = r"[\s,;:]+"
_RGB = rf"(?P<r>\d+){_BETWEEN}(?P<g>\d+){_BETWEEN}(?P<b>\d+)"
_NAME_LAST = re.compile(rf"{_RGB}{_BETWEEN}(?P<name>.*\D.*)")
_NAME_FIRST = re.compile(rf"(?P<name>.*?\D.*?){_BETWEEN}{_RGB}[\s,;:]*")
_EXPECTED = (
  "expected one name a line (.txt), a list or {number: name} (.json), or names: of a data.yaml"
)


def find(root: pathlib.Path, classes: str | None, usual: Sequence[str]) -> pathlib.Path | None:
  """Returns the file with the class names of a data set; None if it has none.

  Args:
    root: the folder of the data set.
    classes: the file as the user names it, below the root or with its full path; None: the first that is there of
      `usual`.
    usual: names of files.
  """
  if classes is not None and not isinstance(classes, str):
    raise UserError(f"classes={classes!r:.80} here is a file; {_EXPECTED}.")
  if classes is None:
    return next((root / name for name in usual if (root / name).is_file()), None)
  path = root / pathlib.Path(classes).expanduser()
  if not path.is_file():
    raise UserError(f"No file {path} (classes=); {_EXPECTED}.")
  return path


def read(path: pathlib.Path) -> tuple[str, ...]:
  """Returns the class names in a file, in the order of their numbers.

  Raises:
    UserError: the file cannot be read, or a name is missing, empty, no text, or there twice.
  """
  suffix = path.suffix.lower()
  if suffix == ".json":
    names = _in_order(read_json(path), path)
  elif suffix in (".yaml", ".yml"):
    names = _in_order(read_yaml(path).get("names"), path)
  else:
    lines = read_text(path).split("\n")
    names = [line.strip() for line in lines if line.strip()]
  return checked(names, str(path))


def checked(names: Sequence[object], of: str) -> tuple[str, ...]:
  """Returns the names as a tuple; a UserError if there is none, or one is empty, no text, or there twice."""
  if not names:
    raise UserError(f"{of} names no class; {_EXPECTED}.")
  for number, name in enumerate(names):
    if not isinstance(name, str) or not name.strip():
      raise UserError(f"{of}: the name of class {number} is {name!r}; expected text.")
  texts = tuple(str(name) for name in names)
  class_names.check_distinct(texts, of)
  return texts


def read_colors(colors: Any, root: pathlib.Path) -> dict[str, tuple[Color, ...]]:
  """Returns name -> colours, in their order; a name may have several.

  Args:
    colors: a mapping from names to [r, g, b] or lists of these; or a file of lines `64 128 64 Animal`,
      `Animal,64,128,64` or `Animal:64,128,64::`, or of such a mapping as JSON.
    root: the folder of the data set, in which the file may be.

  Raises:
    UserError: no such file, a line that is none of these, a number outside 0 to 255.
  """
  if isinstance(colors, Mapping):
    return _colors_of(colors, "colors")
  path = root / pathlib.Path(colors).expanduser()
  if not path.is_file():
    raise UserError(f"No file {path} (colors=); expected a mapping {{name: [r, g, b]}}, or a file.")
  if path.suffix.lower() == ".json":
    return _colors_of(read_json(path), str(path))
  found: dict[str, list[list[int]]] = {}
  for number, line in enumerate(read_text(path).split("\n"), 1):
    text = line.strip()
    match = _NAME_LAST.fullmatch(text) or _NAME_FIRST.fullmatch(text)
    if match:
      found.setdefault(match["name"].strip(), []).append([int(match[c]) for c in "rgb"])
    elif text and not text.startswith("#") and not (number == 1 and not re.search(r"\d", text)):
      raise UserError(f"{path} line {number}: {text!r:.80}; expected 'R G B name' or 'name,R,G,B'.")
  return _colors_of(found, str(path))


def _colors_of(value: Any, of: str) -> dict[str, tuple[Color, ...]]:
  if not isinstance(value, Mapping) or not value:
    raise UserError(f"{of} is {value!r:.80}; expected names with colours, {{name: [r, g, b]}}.")
  found = {}
  for name, given in value.items():
    several = bool(given) and isinstance(given, list | tuple) and isinstance(given[0], list | tuple)
    rows = given if several else [given]
    for row in rows:
      fits = isinstance(row, list | tuple) and len(row) == 3
      if not fits or not all(type(v) is int and 0 <= v <= 255 for v in row):
        raise UserError(
          f"{of}: the colour of {name!r} is {row!r:.80}; expected [r, g, b] of 0 to 255."
        )
    found[str(name)] = tuple((row[0], row[1], row[2]) for row in rows)
  checked(list(found), of)
  return found


def read_text(path: pathlib.Path) -> str:
  """Returns a UTF-8 file, with or without a byte order mark, with newlines of one character."""
  try:
    return path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
  except UnicodeDecodeError as error:
    raise UserError(f"{path} is not UTF-8 ({error}); save it as UTF-8.") from None
  except OSError as error:
    raise UserError(f"Cannot read {path}: {error.strerror}.") from None


def read_json(path: pathlib.Path) -> Any:
  """Returns the value in a JSON file; a UserError says where it is damaged."""
  try:
    return json.loads(path.read_bytes())
  except OSError as error:
    raise UserError(f"Cannot read {path}: {error.strerror}.") from None
  except (ValueError, RecursionError) as error:
    raise UserError(f"{path} is not JSON: {error}.") from None


def read_yaml(path: pathlib.Path) -> Mapping[str, Any]:
  """Returns the mapping in a YAML file, in which every scalar is text: `no` is a name, not False.

  YAML of unknown origin is safe here: the loader makes texts, lists and dicts only.
  """
  try:
    value = yaml.load(read_text(path), Loader=yaml.BaseLoader)
  except (yaml.YAMLError, ValueError, RecursionError) as error:
    raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}.") from None
  if not isinstance(value, dict):
    raise UserError(f"{path} is no mapping; expected a line 'names: [...]' and so on.")
  return value


def _in_order(names: object, path: pathlib.Path) -> Sequence[object]:
  """Returns the names of a list, or of a dict whose keys are the numbers from 0."""
  if isinstance(names, list):
    return names
  if not isinstance(names, dict):
    raise UserError(f"{path} has no list of names, but {type(names).__name__}; {_EXPECTED}.")
  wanted = [str(number) for number in range(len(names))]
  if sorted(map(str, names)) != sorted(wanted):
    raise UserError(
      f"{path}: the numbers of the {len(names)} classes are {', '.join(map(str, list(names)[:10]))}; expected 0 to"
      f" {len(names) - 1}."
    )
  by_number = {str(key): name for key, name in names.items()}
  return [by_number[number] for number in wanted]
