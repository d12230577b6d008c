"""ObjectNet's folders of images."""

import functools
import logging
import os
import pathlib

from flexivit_jax.data import label_maps
from flexivit_jax.data.sources.base import Source, labels_of_files, listing_of_files, select
from flexivit_jax.data.sources.folder import (
  images_below,
  mixed,
  read_files,
  split_folders,
  subfolders,
)
from flexivit_jax.data.splits import split_names
from flexivit_jax.errors import UserError

_LOG = logging.getLogger(__name__)


def objectnet_source(*, split: str, data_dir: str | os.PathLike[str]) -> Source:
  """ObjectNet's images of the 113 classes that ImageNet has too: `data_dir/SPLIT/CLASS/**/*.png`.

  The label is the tuple of ImageNet-1k's classes that are right: `pp` makes `multihot(1000)` of it. The folders of the
  other 200 classes are left out, and counted in the log. In the archive as it comes the split is called `images`.
  """
  root, classes = pathlib.Path(data_dir).expanduser(), label_maps.objectnet()
  split_folders(root, split)
  for name in split_names(split):
    _check_objectnet(root / name)
  stored = {
    name: mixed(
      file for c, label in classes.items() for file in images_below(root / name / c, root, label)
    )
    for name in split_names(split)
  }
  files = select(split, stored)
  read = functools.partial(read_files, root, files)
  return Source(
    "objectnet",
    split,
    label_maps.NUM_I1K,
    None,
    len(files),
    read,
    labels_of_files(files),
    where=str(root),
    listing=listing_of_files(files),
  )


def _check_objectnet(folder: pathlib.Path) -> None:
  folders, classes = subfolders(folder), label_maps.objectnet()
  if missing := [c for c in classes if c not in folders]:
    raise UserError(
      f"{folder} lacks {len(missing)} of ObjectNet's {len(classes)} classes that ImageNet has too, the first"
      f" {missing[0]!r}; expected {folder}/{missing[0]}/*.png and so on."
    )
  others = len(folders) - len(classes)
  _LOG.info("%s: left out %d folders of classes that ImageNet does not have", folder, others)
