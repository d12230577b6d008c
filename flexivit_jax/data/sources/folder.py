"""Images as files, in a folder for each class or without labels."""

import functools
import hashlib
import logging
import os
import pathlib
from collections.abc import Iterable, Sequence
from typing import TypeVar

from flexivit_jax.data import class_names, images
from flexivit_jax.data.sources.base import (
  File,
  Label,
  Record,
  Source,
  labels_of_files,
  listing_of_files,
  select,
)
from flexivit_jax.data.splits import split_names
from flexivit_jax.data.walking import Tree, is_hidden, is_in
from flexivit_jax.errors import UserError, nearest, unknown

_LOG = logging.getLogger(__name__)
_SHOWN = 5  # classes of a long list
_L = TypeVar("_L")
ClassFile = tuple[str, int]


def folder_source(
  *,
  split: str,
  data_dir: str | os.PathLike[str],
  allow_empty: bool = False,
  upright: bool = True,
) -> Source:
  """Images as files: `data_dir/SPLIT/CLASS/**/*.jpg` (also png, webp, bmp, ...).

  The classes are the folders of `train`, or of the split itself where there is no `train`, in the order of
  `class_names.in_order`: as numbers where all are numbers, else as text. A split may lack some of them.
  Files are in a mixed order that depends on their paths alone, so that `train[:90%]` and `train[90%:]` both have all
  classes. What is left out is said and counted; the rules are in docs/image_folders.md.

  Args:
    split: of the folders in `data_dir`.
    data_dir: holds a folder for each split.
    allow_empty: `train` may have classes without images, which is an error otherwise; of other splits a warning.
    upright: turn images as their EXIF data say. False for a published data set, whose numbers are of images as stored.
  """
  root = pathlib.Path(data_dir).expanduser()
  folders = split_folders(root, split)
  names = _class_names(root / ("train" if "train" in folders else split_names(split)[0]))
  stored = {s: _list_images(root, s, names, allow_empty) for s in split_names(split)}
  if not any(stored.values()):
    raise _nothing(root, list(stored))
  files = select(split, stored)
  read = functools.partial(read_files, root, files)
  return Source(
    "folder",
    split,
    len(names),
    names,
    len(files),
    read,
    labels_of_files(files),
    upright,
    str(root),
    listing_of_files(files),
  )


def split_folders(root: pathlib.Path, split: str) -> list[str]:
  """Returns the folders in `root`; raises a UserError if those of the split are not among them."""
  folders = subfolders(root)
  if not folders:
    first = root / split_names(split)[0]
    raise UserError(f"No folders in {root}; expected {first}/CLASS/*.jpg and so on.")
  for name in split_names(split):
    if name not in folders:
      error = unknown(f"split folder in {root}", name, folders)
      raise UserError(f"{error} Expected {root / name}/CLASS/*.jpg and so on.")
  return folders


def subfolders(folder: pathlib.Path) -> list[str]:
  """Returns the sorted names of the folders in a folder, without hidden ones; [] if it does not exist."""
  if not folder.is_dir():
    return []
  with os.scandir(folder) as entries:
    return sorted(e.name for e in entries if e.is_dir() and not is_hidden(e.name))


def has_classes(folder: pathlib.Path) -> bool | None:
  """Whether the images below a folder lie in subfolders, as for classes; None if there are no images."""
  paths = Tree(folder).images if folder.is_dir() else []
  return any(os.sep in path for path in paths) if paths else None


def _class_names(split: pathlib.Path) -> tuple[str, ...]:
  """Returns the class names of the folders in a split, in the order of their labels."""
  folders = subfolders(split)
  class_names.check_distinct(folders, f"the class folders in {split}")
  return tuple(class_names.in_order(class_names.plain(name) for name in folders))


def _list_images(
  root: pathlib.Path, split: str, names: Sequence[str], allow_empty: bool
) -> list[ClassFile]:
  """Returns (path below the root, label) of every image, sorted by a hash of the path."""
  folder = root / split
  folders = _check_classes(folder, names)
  tree = Tree(folder)
  label_of = {name: names.index(class_names.plain(name)) for name in folders}
  parts = ((path, path.partition(os.sep)[0]) for path in tree.images if os.sep in path)
  files = [(os.path.join(split, path), label_of[name]) for path, name in parts if name in label_of]
  say_left_out(tree, root, len(tree.images) - len(files))
  _say_copies(tree)
  present = {label for _, label in files}
  empty = [name for label, name in enumerate(names) if label not in present]
  if empty and files:
    _name_empty(tree, empty, len(names), error=split == "train" and not allow_empty)
  return mixed(files)


def _nothing(root: pathlib.Path, splits: Sequence[str]) -> UserError:
  """Returns (does not raise) the error for splits without any image."""
  shown = []
  for split in splits:
    reasons = Tree(root / split).left_out()
    shown.append(
      f"{root / split} is empty" + (f"; left out {', '.join(reasons)}" if reasons else "")
    )
  return UserError(
    f"{'. '.join(shown)}. Expected {root / splits[0]}/CLASS/*.jpg; files that are read: {images.shown_suffixes()}."
  )


def _check_classes(folder: pathlib.Path, names: Sequence[str]) -> list[str]:
  """Returns the class folders of a split; a UserError if there is none, or one of no class."""
  folders = subfolders(folder)
  class_names.check_distinct(folders, f"the class folders in {folder}")
  if not folders and (flat := Tree(folder).images):
    raise UserError(
      f"{folder} has {len(flat)} images and no class folders; expected {folder}/CLASS/*.jpg and so on. Images without"
      f" labels are the data set 'images': name='images', split='all', data_dir={str(folder)!r}."
    )
  for name in folders:
    if class_names.plain(name) not in names:
      raise UserError(
        f"{folder} has a class folder {name!r} that the train split has not; that has {class_names.shown(names)}."
        f"{nearest(name, names)}"
      )
  return folders


def _name_empty(tree: Tree, empty: Sequence[str], classes: int, *, error: bool) -> None:
  """Names the classes of a split that have no images."""
  shown = [f"{name!r} ({_why_empty(tree, name)})" for name in empty[:_SHOWN]]
  more = f" and {len(empty) - _SHOWN} more" if len(empty) > _SHOWN else ""
  message = (
    f"{tree.folder}: {len(empty)} of {classes} classes without images: {', '.join(shown)}{more}."
  )
  if not error:
    _warn(message)
    return
  raise UserError(
    f"{message} Files that are read: {images.shown_suffixes()}. Put images there, or remove the folder; or allow it, by"
    " allow_empty=True of the data (--config.input.data.allow_empty=True)."
  )


def _why_empty(tree: Tree, name: str) -> str:
  folder = pathlib.Path(tree.folder) / name
  again = dict(tree.again)
  if name in again:
    return f"the same folder as {again[name]!r}"
  if not folder.is_dir():
    return "no such folder"
  return "; ".join(Tree(folder).left_out()) or "an empty folder"


def say_left_out(tree: Tree, root: pathlib.Path, unlabelled: int = 0) -> None:
  """Says in one line what was left out of a tree, and in another where links led into other parts of the data."""
  reasons = tree.left_out()
  if unlabelled:
    what = "1 image that is" if unlabelled == 1 else f"{unlabelled:,} images that are"
    reasons.append(f"{what} in no class folder")
  if reasons:
    _warn(f"{tree.folder}: left out {', '.join(reasons)}")
  here, whole = os.path.realpath(tree.folder), os.path.realpath(root)
  for link, target in tree.followed.items():
    if is_in(target, whole) and not is_in(target, here):
      _warn(
        f"{tree.folder}: the link {link!r} leads to {target}: images of another split are in this one, too"
      )


def _say_copies(tree: Tree) -> None:
  """Warns of images that are one file by several paths. All are kept: examples may be repeated on purpose."""
  copies = tree.copies()
  classes = [{path.partition(os.sep)[0] for path in group} for group in copies]
  if conflicts := [group for group, names in zip(copies, classes, strict=True) if len(names) > 1]:
    first = " and ".join(map(repr, conflicts[0][:2]))
    _warn(
      f"{tree.folder}: {len(conflicts)} images are linked in several classes and keep each of these labels, the first:"
      f" {first}"
    )
  if len(copies) > len(conflicts):
    again = sum(len(group) - 1 for group in copies) - sum(len(group) - 1 for group in conflicts)
    _warn(f"{tree.folder}: {again} images are links to others of their class; all are kept")


@functools.cache
def _warn(message: str) -> None:
  """Warns once: a command opens the same folder several times."""
  _LOG.warning("%s", message)


def images_below(folder: pathlib.Path, root: pathlib.Path, label: Label) -> list[File]:
  """Returns (path below the root, label) of every image below a folder, in a mixed order."""
  tree = Tree(folder)
  say_left_out(tree, folder)
  return mixed((os.path.relpath(tree.at(path), root), label) for path in tree.images)


def mixed(files: Iterable[tuple[str, _L]]) -> list[tuple[str, _L]]:
  """Returns the files sorted by a hash of the path."""
  return sorted(files, key=lambda file: hashlib.sha256(os.fsencode(file[0])).digest())


def read_files(root: pathlib.Path, files: Sequence[File], indices: Sequence[int]) -> list[Record]:
  """Returns the records of these files, undecoded."""
  chosen = [files[i] for i in indices]
  return [{"image": (root / p).read_bytes(), "label": k, "id": p} for p, k in chosen]


def images_source(*, split: str, data_dir: str | os.PathLike[str], upright: bool = True) -> Source:
  """Opens every image below a folder, without labels: the split `all`, in an order that depends on the paths alone.

  The label is 0 of one class. Slices divide it: `all[:90%]` and `all[90%:]`. `upright` as of
  `folder_source`.
  """
  root = pathlib.Path(data_dir).expanduser()
  if not root.is_dir():
    raise UserError(f"{root} is no folder; give one with images below it.")
  labelled = images_below(root, root, 0)
  if not labelled:
    raise UserError(
      f"No images below {root}; expected files that end in {images.shown_suffixes()}."
    )
  files = select(split, {"all": labelled})
  read = functools.partial(read_files, root, files)
  return Source(
    "images",
    split,
    1,
    None,
    len(files),
    read,
    labels_of_files(files),
    upright,
    str(root),
    listing_of_files(files),
  )
