"""Data sets: TFDS, folders of images with and without labels, boxes, masks or captions, ObjectNet, digits, synthetic.

A source is a list of records, see `base.Record`: each has "image" and "id", and "label", boxes, a mask or captions.
"""

import dataclasses
import functools
import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flexivit_jax import storage
from flexivit_jax.data.sources.base import Label, Record, Source
from flexivit_jax.data.sources.captions import captions_source
from flexivit_jax.data.sources.coco import coco_source, lvis_source
from flexivit_jax.data.sources.digits import digits_source
from flexivit_jax.data.sources.folder import folder_source, images_source
from flexivit_jax.data.sources.masks import ade20k_source, cityscapes_source, masks_source
from flexivit_jax.data.sources.objectnet import objectnet_source
from flexivit_jax.data.sources.packed import packed_source
from flexivit_jax.data.sources.scenes import scenes_source
from flexivit_jax.data.sources.synthetic import synthetic_source
from flexivit_jax.data.sources.tfds import is_prepared, tfds_source
from flexivit_jax.data.sources.voc import voc_source
from flexivit_jax.data.sources.yolo import yolo_source
from flexivit_jax.errors import UserError

SOURCES: dict[str, Callable[..., Source]] = {
  "ade20k": ade20k_source,
  "captions": captions_source,
  "cityscapes": cityscapes_source,
  "coco": coco_source,
  "digits": digits_source,
  "folder": folder_source,
  "images": images_source,
  "lvis": lvis_source,
  "masks": masks_source,
  "objectnet": objectnet_source,
  "packed": packed_source,
  "scenes": scenes_source,
  "synthetic": synthetic_source,
  "voc": voc_source,
  "yolo": yolo_source,
}

__all__ = [
  "SOURCES",
  "Label",
  "Record",
  "Source",
  "is_prepared",
  "make_source",
]


def make_source(
  *,
  name: str,
  split: str,
  data_dir: str | os.PathLike[str] | None = None,
  image_key: str | None = None,
  label_key: str | None = None,
  image_size: int | Sequence[int] | None = None,
  num_classes: int | None = None,
  num_examples: int | None = None,
  seed: int | None = None,
  annotated: bool | None = None,
  allow_empty: bool | None = None,
  upright: bool | None = None,
  annotations: str | None = None,
  images: str | None = None,
  masks: str | None = None,
  classes: str | Sequence[str] | None = None,
  ignore: int | None = None,
  labels: str | None = None,
  colors: str | Mapping[str, Any] | None = None,
  boxes_key: str | None = None,
  mask_key: str | None = None,
  captions_key: str | None = None,
  on_bad: str | None = None,
  objects: Sequence[int] | None = None,
  sides: Sequence[int] | None = None,
  names: str | None = None,
  backgrounds: str | None = None,
  with_masks: bool | None = None,
  cache_gb: float | None = None,
  by_number: bool = False,
) -> Source:
  """Opens a data set.

  Args:
    name: a key of `SOURCES`, or any TFDS name (`cifar10`, `imagenet_v2/matched-frequency:3.0.0`).
    split: TFDS split syntax, e.g. `train[:99%]`; see `splits.parse_split`.
    data_dir: of TFDS (default: its own default), or the root of a folder of images; of TFDS and packed data the address
      of a folder in a bucket, too.
    image_key, label_key, boxes_key, mask_key: TFDS only; see `tfds_source`.
    num_classes: TFDS, masks and synthetic.
    image_size, num_examples, seed: synthetic and scenes; annotated: synthetic only. See `synthetic_source`.
    objects, sides, names, backgrounds, with_masks: scenes only; see `scenes_source`.
    allow_empty, upright: folders of images only; see `folder_source`.
    annotations, images, masks, classes: folders with annotations; see `coco_source`, `yolo_source`, `voc_source`,
      `masks_source`, `captions_source`.
    ignore, labels, captions_key, on_bad: of annotations, in folders and TFDS.
    colors: of masks in a folder.
    cache_gb: of TFDS and packed data in a bucket: GB of this machine's cache folder that hold records, see
      `remote_shards`.
    by_number: drops the class names, so that classes are matched to those of a model by number.

  Raises:
    UserError: the data set or split is unknown or empty, or does not take an argument.
  """
  given = dict(locals())  # each argument by its name
  options = {key: value for key, value in given.items() if key not in _ALWAYS and value is not None}
  build = SOURCES.get(name) or functools.partial(tfds_source, name)
  _check(name, build, options)
  source = build(split=split, **options)
  return dataclasses.replace(source, class_names=None) if by_number else source


_ALWAYS = ("name", "split", "by_number")  # arguments that are of every data set


def _check(name: str, build: Callable[..., Source], options: Mapping[str, Any]) -> None:
  """Raises a UserError for options that a data set does not take, lacks, or takes of this machine alone."""
  takes = inspect.signature(build).parameters
  for key in options:
    if key not in takes:
      raise UserError(f"Data set {name!r} takes no {key!r}; it takes {list(takes)}.")
  for key, parameter in takes.items():
    if key not in options and key != "split" and parameter.default is parameter.empty:
      raise UserError(f"Data set {name!r} needs {key}=.")
  url = storage.address(options.get("data_dir", ""))
  if name in SOURCES and name != "packed" and url:
    raise UserError(
      f"Data set {name!r} is read from a folder of this machine, and data_dir={url} is an address; pack it (`flexivit"
      " pack`) and copy the pack there, or mount the bucket."
    )
