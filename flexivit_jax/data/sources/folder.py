"""Images as files, in a folder for each class or without labels."""

import functools
import hashlib
import itertools
import logging
import os
import pathlib
from collections.abc import Iterable, Sequence

from flexivit_jax import class_names
from flexivit_jax.data.sources.base import File, Label, Record, Source, labels_of_files, select
from flexivit_jax.data.splits import split_names
from flexivit_jax.errors import UserError, nearest, unknown

_LOG = logging.getLogger(__name__)
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")


def folder_source(*, split: str, data_dir: str | os.PathLike[str]) -> Source:
  """Images as files: `data_dir/SPLIT/CLASS/**/*.jpg` (also png, webp, bmp, ...).

  The classes are the folders of `train`, or of the split itself where there is no `train`, in the order of
  `class_names.in_order`: as numbers where all are numbers, else as text. A split may lack some of them.
  Files are in a mixed order that depends on their paths alone, so that `train[:90%]` and `train[90%:]` both have all
  classes. Files of other kinds are left out, with a warning that counts them.
  """
  root = pathlib.Path(data_dir).expanduser()
  folders = split_folders(root, split)
  names = _class_names(root / ("train" if "train" in folders else split_names(split)[0]))
  stored = {s: _list_images(root / s, names) for s in split_names(split)}
  files = select(split, stored)
  read = functools.partial(read_files, root, files)
  return Source("folder", split, len(names), names, len(files), read, labels_of_files(files))


def split_folders(root: pathlib.Path, split: str) -> list[str]:
  """Returns the folders in `root`; raises a UserError if those of the split are not among them."""
  folders = subfolders(root)
  if not folders:
    first = root / split_names(split)[0]
    raise UserError(f"No folders in {root}; expected {first}/CLASS/*.jpg and so on.")
  for name in split_names(split):
    if name not in folders:
      raise unknown(f"split folder in {root}", name, folders)
  return folders


def subfolders(folder: pathlib.Path) -> list[str]:
  """Returns the names of the folders in a folder, sorted; none where there is no folder."""
  if not folder.is_dir():
    return []
  with os.scandir(folder) as entries:
    return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))


def _class_names(split: pathlib.Path) -> tuple[str, ...]:
  """The classes of the folders in a split, in the order of their labels."""
  found = subfolders(split)
  class_names.check_distinct(found, f"the class folders in {split}")
  return tuple(class_names.in_order(class_names.plain(name) for name in found))


def _list_images(folder: pathlib.Path, names: Sequence[str]) -> list[File]:
  """Returns (path below the root, label) of every image, sorted by a hash of the path."""
  found = subfolders(folder)
  class_names.check_distinct(found, f"the class folders in {folder}")
  numbers = {name: k for k, name in enumerate(names)}
  for name in found:
    if class_names.plain(name) not in numbers:
      raise UserError(
        f"{folder} has a class folder {name!r} that the train split has not; that has {class_names.shown(names)}."
        f"{nearest(name, names)}"
      )
  classes = (
    images_below(folder / name, folder.parent, numbers[class_names.plain(name)]) for name in found
  )
  return mixed(itertools.chain.from_iterable(classes))


def images_below(folder: pathlib.Path, root: pathlib.Path, label: Label) -> list[File]:
  """Returns (path below the root, label) of every image below a folder, in a mixed order."""
  paths = _walk(folder)
  found = [path for path in paths if path.lower().endswith(IMAGE_SUFFIXES)]
  if others := len(paths) - len(found):
    _LOG.warning("%s: left out %d files that are not %s", folder, others, " ".join(IMAGE_SUFFIXES))
  return mixed((os.path.relpath(path, root), label) for path in found)


def mixed(files: Iterable[File]) -> list[File]:
  """Sorted by a hash of the path."""
  return sorted(files, key=lambda file: hashlib.sha256(os.fsencode(file[0])).digest())


def _walk(folder: pathlib.Path) -> list[str]:
  walk = os.walk(folder, followlinks=True)
  return [os.path.join(d, f) for d, _, files in walk for f in files if not f.startswith(".")]


def read_files(root: pathlib.Path, files: Sequence[File], indices: Sequence[int]) -> list[Record]:
  """Returns the records of these files, undecoded."""
  found = [files[i] for i in indices]
  return [{"image": (root / p).read_bytes(), "label": k, "id": p} for p, k in found]


def images_source(*, split: str, data_dir: str | os.PathLike[str]) -> Source:
  """Every image below a folder, without labels: `all`, in an order that depends on the paths alone.

  The label is 0 of one class. Slices divide it: `all[:90%]` and `all[90%:]`.
  """
  root = pathlib.Path(data_dir).expanduser()
  if not root.is_dir():
    raise UserError(f"{root} is no folder; give one with images below it.")
  found = images_below(root, root, 0)
  if not found:
    raise UserError(
      f"No images below {root}; expected files that end in {' '.join(IMAGE_SUFFIXES)}."
    )
  files = select(split, {"all": found})
  read = functools.partial(read_files, root, files)
  return Source("images", split, 1, None, len(files), read, labels_of_files(files))
