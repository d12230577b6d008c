"""Sizes of public data sets, to plan a run without the data: examples of each split, and classes.

Sources: the pages of TFDS's catalogue, https://www.tensorflow.org/datasets/catalog/NAME, or what a comment says.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from flexivit_jax.data.sources import SOURCES, Label, Record, Source, make_source
from flexivit_jax.data.splits import parse_split
from flexivit_jax.errors import UserError

_HW = (375, 500)  # a usual photograph of ImageNet


class Known(NamedTuple):
  """A public data set: the number of examples of each stored split, and of classes; what images have."""

  splits: dict[str, int]
  num_classes: int
  what: str = "label"  # or "boxes", "captions", "mask"


KNOWN: dict[str, Known] = {
  # In its own folder, see `ade20k_source`; arXiv 1608.05442.
  "ade20k": Known({"training": 20_210, "validation": 2000}, 150, "mask"),
  "cifar10": Known({"train": 50_000, "test": 10_000}, 10),
  "cifar100": Known({"train": 50_000, "test": 10_000}, 100),
  # In its own folders, see `cityscapes_source`, where TFDS's "validation" is "val"; arXiv 1604.01685.
  "cityscapes": Known({"train": 2975, "val": 500, "validation": 500}, 19, "mask"),
  # Karpathy's splits.
  "coco_captions": Known(
    {"train": 82_783, "val": 5000, "test": 5000, "restval": 30_504}, 0, "captions"
  ),
  "food101": Known({"train": 75_750, "validation": 25_250}, 101),
  "imagenet2012": Known({"train": 1_281_167, "validation": 50_000}, 1000),
  "imagenet2012_real": Known({"validation": 50_000}, 1000),
  # No TFDS data set. Images: ImageNet's own count, as third parties quote it (aiwiki.ai/wiki/imagenet: of 21,841
  # classes); how many big_vision's copy of 21,843 classes has, no source tells that we could read.
  "imagenet21k": Known({"full": 14_197_122}, 21_843),
  "imagenet_a": Known({"test": 7500}, 1000),  # of 200 of them
  "imagenet_r": Known({"test": 30_000}, 1000),  # of 200 of them
  "imagenet_sketch": Known({"test": 50_889}, 1000),
  "imagenet_v2": Known({"test": 10_000}, 1000),
  # In its own files, see `lvis_source`; version 1, lvisdataset.org.
  "lvis": Known({"train": 100_170, "val": 19_809, "validation": 19_809}, 1203, "boxes"),
  "oxford_flowers102": Known({"train": 1020, "validation": 1020, "test": 6149}, 102),
  "oxford_iiit_pet": Known({"train": 3680, "test": 3669}, 37),
  "sun397": Known({"train": 76_128, "validation": 10_875, "test": 21_750}, 397),
}


_BOX: Record = {
  "boxes": np.array([[100, 100, 300, 200]], np.float32),
  "box_labels": np.zeros(1, np.int64),
  "box_ids": np.ones(1, np.int64),
  "box_crowd": np.zeros(1, bool),
}


def planned_source(*, name: str, split: str, **options: Any) -> Source:
  """As `make_source`; a public data set is replaced by a stand-in of its size, which holds one grey image.

  Raises:
    UserError: the data set is neither here nor in KNOWN.
  """
  known = KNOWN.get(name.partition("/")[0].partition(":")[0])
  if known is None:
    try:
      return make_source(name=name, split=split, **options)
    except UserError as e:
      here = "the data set" if name in SOURCES else f"one of {', '.join(KNOWN)}, or have it here"
      raise UserError(f"{e} To plan, give {here}.") from e
  size = sum(part.stop - part.start for part in parse_split(split, known.splits))
  if known.what == "boxes":
    names = tuple(f"class {k}" for k in range(known.num_classes))
    return Source(name, split, known.num_classes, names, size, _grey(_BOX))
  if known.what != "label":
    value: Any = ("grey",) if known.what == "captions" else np.zeros(_HW, np.uint8)
    return Source(name, split, known.num_classes, None, size, _grey({known.what: value}))
  label: Label = (0,) if options.get("label_key") == "real_label" else 0
  labels = lambda: [label] * size  # noqa: E731
  return Source(name, split, known.num_classes, None, size, _grey({"label": label}), labels)


def _grey(values: Record) -> Callable[..., list[Record]]:
  """Reads one grey image, with these other values."""
  record: Record = {"image": np.full((*_HW, 3), 128, np.uint8), **values}
  return lambda indices: [{**record, "id": str(i)} for i in indices]
