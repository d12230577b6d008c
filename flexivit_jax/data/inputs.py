"""Image files named on a command line: files, folders and patterns."""

import fnmatch
import glob
import itertools
import os
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from flexivit_jax.data import images
from flexivit_jax.data.walking import Tree, is_hidden


class Input(NamedTuple):
  """A file to read, or a name without a file and the reason (`error`)."""

  path: str
  error: str | None = None


def find_images(
  names: Iterable[str | os.PathLike[str]], note: Callable[[str], None] = lambda text: None
) -> list[Input]:
  """Lists the files that names stand for, in the order of the names.

  A name is that of a file, taken whatever its suffix; of a folder, which stands for every image below it, sorted (see
  `walking.Tree`); or, where nothing has that name, a pattern. In a pattern `*` and `?` do not match "/", `**` matches
  any number of folders, and what matches is taken as if it had been named; of a pattern that ends in `*` or `**` alone
  only images are. Hidden files are left out unless the pattern asks for them (`.*`). A name that comes twice is listed
  twice.

  Args:
    names: files, folders and patterns; "~" is the home folder where nothing has that name.
    note: called with a line about what is left out of a folder.
  """
  return [file for name in names for file in _find(os.fspath(name), note)]


def _find(name: str, note: Callable[[str], None]) -> list[Input]:
  if not name:
    return [Input(name, "the name is empty; expected a file, a folder or a pattern")]
  if not os.path.lexists(name):
    name = os.path.expanduser(name)
  if os.path.lexists(name):
    return _below(name, note) if os.path.isdir(name) else [Input(name)]
  if not glob.has_magic(name):
    return [Input(name, _why_missing(name))]
  matches = _match(name, note)
  if not matches:
    return [Input(name, "no file matches this pattern")]
  listed = (_below(path, note) if os.path.isdir(path) else [Input(path)] for path in matches)
  return list(dict.fromkeys(itertools.chain.from_iterable(listed)))


def _why_missing(name: str) -> str:
  try:
    os.lstat(name)
  except OSError as e:
    return (e.strerror or "cannot be found").lower()
  return "no such file"  # It came meanwhile.


def _below(folder: str, note: Callable[[str], None]) -> list[Input]:
  tree = Tree(folder)
  left_out = ", ".join(tree.left_out())
  if not tree.images:
    why = f"; left out {left_out}" if left_out else ""
    return [Input(folder, f"no images below this folder ({images.shown_suffixes()}){why}")]
  if left_out:
    note(f"{folder}: left out {left_out}")
  return [Input(tree.at(path)) for path in sorted(tree.images, key=_by_parts)]


def _by_parts(path: str) -> list[str]:
  return path.split(os.sep)


def _match(pattern: str, note: Callable[[str], None]) -> list[str]:
  """Returns the sorted paths that match; a pattern with `**` matches files only."""
  parts = pathlib.PurePath(pattern).parts
  # A part that exists under exactly this name is no pattern: a folder may be called "scans [2]".
  fixed = next(i for i in range(len(parts)) if not os.path.lexists(os.path.join(*parts[: i + 1])))
  root, wanted = os.path.join("", *parts[:fixed]), parts[fixed:]
  if "**" in wanted:
    paths = [p for p in _files_below(root or ".") if _matches(p.split(os.sep), wanted)]
  else:
    paths = glob.glob(os.path.join(*wanted), root_dir=root or None)
    paths = [p for p in paths if wanted[-1].startswith(".") or not is_hidden(os.path.basename(p))]
  if wanted[-1] in ("*", "**"):
    paths = _images_among(root, paths, lambda text: note(f"{pattern}: {text}"))
  return sorted((os.path.join(root, path) for path in paths), key=_by_parts)


def _images_among(root: str, paths: Sequence[str], note: Callable[[str], None]) -> list[str]:
  """Returns the images and folders among the paths, as in a folder; `*` says nothing about the kind of a file."""
  chosen = [
    path
    for path in paths
    if os.path.splitext(path)[1].lower() in images.suffixes()
    or os.path.isdir(os.path.join(root, path))
  ]
  if others := len(paths) - len(chosen):
    note(
      f"left out {others} {'file that is no image' if others == 1 else 'files that are no images'}"
    )
  return chosen


def _files_below(root: str) -> Iterable[str]:
  """Yields the paths below a folder; follows links to folders, but enters no folder twice."""
  entered = set()
  for folder, folders, files in os.walk(root, followlinks=True):
    entry = os.stat(folder)
    if (entry.st_dev, entry.st_ino) in entered:
      folders.clear()
      continue
    entered.add((entry.st_dev, entry.st_ino))
    folders[:] = sorted(name for name in folders if not is_hidden(name))
    yield from (os.path.relpath(os.path.join(folder, name), root) for name in files)


def _matches(parts: Sequence[str], pattern: Sequence[str]) -> bool:
  if not pattern:
    return not parts
  first, rest = pattern[0], pattern[1:]
  if first == "**" and rest:
    return any(_matches(parts[i:], rest) for i in range(len(parts)))
  if first == "**":
    return not is_hidden(parts[-1])
  if not parts or (is_hidden(parts[0]) and not first.startswith(".")):
    return False
  return fnmatch.fnmatchcase(parts[0], first) and _matches(parts[1:], rest)
