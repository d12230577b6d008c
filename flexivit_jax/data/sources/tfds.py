"""TFDS data sets that were prepared as array_record."""

import bisect
import functools
import gc
import itertools
import os
import pathlib
import re
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple, final

import numpy as np

from flexivit_jax import storage
from flexivit_jax.data import mask_labels, remote_shards
from flexivit_jax.data.remote_shards import RemoteShards
from flexivit_jax.data.sources.annotated import check_on_bad, in_pixels
from flexivit_jax.data.sources.base import Label, Record, Source
from flexivit_jax.data.sources.folder import subfolders
from flexivit_jax.data.sources.tfds_annotations import (
  Boxes,
  Labels,
  boxes_in,
  captions_in,
  labels_of,
  read_boxes,
  read_captions,
)
from flexivit_jax.data.splits import parse_split
from flexivit_jax.errors import UserError, nearest, unknown

_ID_KEYS = ("id", "file_name", "filename", "image/filename", "tfds_id")


def tfds_source(
  name: str,
  *,
  split: str,
  data_dir: str | os.PathLike[str] | None = None,
  image_key: str = "image",
  label_key: str | None = None,
  boxes_key: str | None = None,
  mask_key: str | None = None,
  captions_key: str | None = None,
  num_classes: int | None = None,
  ignore: int = 255,
  labels: str | None = None,
  on_bad: str = "raise",
  cache_gb: float = remote_shards.CACHE_GB,
) -> Source:
  """A TFDS data set that was prepared as array_record, read without TensorFlow.

  Only prepared files are read, never the data set's own code: nothing is downloaded.

  Args:
    name: `NAME`, `NAME/CONFIG`, `NAME:VERSION`.
    split: TFDS split syntax.
    data_dir: where TFDS prepared it, which may be an address in a bucket; None is TFDS's own default.
    image_key: its feature of images.
    label_key: its feature of labels, which may be a sequence of classes (`imagenet2012_real`). None: `label`, unless
      one of the next three is given; then images have no label. With boxes_key: the field of a box's class instead.
    boxes_key: a sequence of boxes, or of dicts with `bbox` and perhaps `label`, `id`, `is_crowd`, `is_difficult`
      (`objects` of `coco/2017`). Without a label there is one class.
    mask_key: images of one channel, whose values are classes.
    captions_key: a text, or a sequence of texts or of dicts with `text`.
    num_classes: needed only where labels or masks are plain integers.
    ignore: the value of a mask's pixels of no class.
    labels: what the values of masks are, see `masks_source`: "train_ids" for `cityscapes/semantic_segmentation`.
    on_bad: a box without area, or outside its image: "raise" makes its example a bad one, "skip" leaves the box out.
    cache_gb: of data in a bucket: GB of this machine's cache folder that hold records.

  Raises:
    UserError: the data set, a feature or the split is unknown, or the classes are.
  """
  check_on_bad(on_bad)
  remote = _remote(name, data_dir, cache_gb)
  builder = _builder(name, data_dir, remote)
  features = builder.info.features
  if label_key is None and not (boxes_key or mask_key or captions_key):
    label_key = "label"
  keys = {"image_key": image_key, "boxes_key": boxes_key}
  keys |= {"label_key": None if boxes_key else label_key}
  keys |= {"mask_key": mask_key, "captions_key": captions_key}
  _check_keys(features, keys, name)
  if labels and not mask_key:
    raise UserError(f"labels={labels!r} is about masks, and no mask_key= is given.")
  boxes, known = None, []
  if boxes_key:
    boxes, classes = boxes_in(features, boxes_key, label_key, name)
    known.append(classes)
  known += [labels_of(features, key) for key in (keys["label_key"], mask_key) if key]
  named = mask_labels.convention(labels).names if labels else None
  if mask_key and named:
    known[-1] = Labels(mask_key, len(named), named)
  number, names = _classes(known, num_classes, name)
  parts = parse_split(split, {s: info.num_examples for s, info in builder.info.splits.items()})
  reading = _Reading(
    image_key,
    keys["label_key"],
    next((key for key in _ID_KEYS if key in features), None),
    boxes,
    mask_key,
    captions_key,
    captions_in(features, captions_key, name) if captions_key else None,
    ignore,
    labels,
    on_bad,
    f"{name}/{split}",
  )
  data = _open(builder, split, [key for key in (image_key, mask_key) if key])
  ahead = None
  if remote is not None:
    data.data_source = records = _Records(remote, builder, split)
    ahead = records.ahead
  read = functools.partial(_read_tfds, data, reading)
  size = sum(p.stop - p.start for p in parts)
  return Source(name, split, number, names, size, read, ahead=ahead)


class _Reading(NamedTuple):
  """What is read of an example; a key is None where it is not read.

  Attributes:
    text: the field of `captions` that holds the texts, see `captions_in`.
    labels: of masks.
    prefix: of ids where the data set has none.
  """

  image: str
  label: str | None
  id: str | None
  boxes: Boxes | None
  mask: str | None
  captions: str | None
  text: str | None
  ignore: int
  labels: str | None
  on_bad: str
  prefix: str


def _check_keys(features: Any, keys: dict[str, str | None], name: str) -> None:
  given = {argument: key for argument, key in keys.items() if key}
  for key in given.values():
    if key not in features:
      arguments = ", ".join(f"{argument}=" for argument in given)
      raise unknown(f"feature of {name} ({arguments})", key, features)


def _classes(
  known: Sequence[Labels], num_classes: int | None, name: str
) -> tuple[int, tuple[str, ...] | None]:
  """Returns the number of classes and their names; 0 where there are no labels."""
  if not known:
    if num_classes is not None:
      raise UserError(f"num_classes={num_classes}, but no labels of {name} are read.")
    return 0, None
  first = known[0]
  for other in known[1:]:
    if other[1:] != first[1:]:
      raise UserError(
        f"{first.key!r} and {other.key!r} of {name} have other classes ({first.number} and {other.number}); a data set"
        " has one list of classes, so read them as two."
      )
  if (first.number or num_classes) is None:
    raise UserError(f"Feature {first.key!r} of {name} does not say num_classes; give num_classes=.")
  if None not in (first.number, num_classes) and first.number != num_classes:
    raise UserError(f"num_classes={num_classes}, but {name} has {first.number} classes.")
  return first.number or num_classes, first.names


def is_prepared(name: str, data_dir: str | os.PathLike[str] | None = None) -> bool:
  """Whether TFDS has prepared a data set there as array_record; arguments as in `tfds_source`."""
  try:
    _builder(name, data_dir, _remote(name, data_dir, remote_shards.CACHE_GB))
  except UserError:
    return False
  return True


def _remote(
  name: str, data_dir: str | os.PathLike[str] | None, cache_gb: float
) -> RemoteShards | None:
  """Opens the folder of a data set in a bucket; None: it is in a folder of this machine."""
  url = storage.address(data_dir or "")
  if url is None:
    return None
  return RemoteShards(url, below=re.split("[/:]", name)[0], cache_gb=cache_gb)


def _builder(
  name: str, data_dir: str | os.PathLike[str] | None, remote: RemoteShards | None
) -> Any:
  from flexivit_jax.data.sources import SOURCES  # Lazy: that imports this.

  try:
    tfds = _tfds()
  except ModuleNotFoundError as e:
    if e.name != "tensorflow_datasets":
      raise
    raise UserError(
      f"Data set {name!r} is none of {sorted(SOURCES)}.{nearest(name, list(SOURCES), 0.75)} Others are read by "
      "TensorFlow Datasets, which is not installed (`make demo` leaves it out): "
      f"`{sys.executable} -m pip install tensorflow-datasets`."
    ) from None
  where = place = None if data_dir is None else os.path.expanduser(data_dir)
  if remote is not None:  # of its files TFDS gets those that say what is in the others
    where, place = remote.url, str(_copies(remote))
  try:
    builder = tfds.core.read_only_builder.builder_from_files(name, data_dir=place)
  except tfds.core.DatasetNotFoundError:
    shown = where or tfds.core.constants.DATA_DIR
    names = [*SOURCES, *subfolders(pathlib.Path(place or shown))]
    raise UserError(
      f"Data set {name!r} is not prepared in {shown} and is none of {sorted(names)}."
      f"{nearest(name, names, 0.75)} {_how_to_prepare(name, where)}"
    ) from None
  if "array_record" not in {f.value for f in builder.info.available_file_formats()}:
    file_format = builder.info.file_format.value
    raise UserError(
      f"Data set {name!r} in {remote.url if remote else builder.data_dir} is prepared as {file_format}, which"
      f" TensorFlow alone reads; expected array_record. {_how_to_prepare(name, where)}"
    )
  return builder


def _how_to_prepare(name: str, data_dir: str | None) -> str:
  where = f" --data_dir {data_dir}" if data_dir else ""
  return (
    f"To prepare a TFDS data set, in another environment: `pip install tensorflow-datasets "
    f"tensorflow && tfds build {name} --file_format=array_record{where}`"
  )


def _open(builder: Any, split: str, encoded: Sequence[str]) -> Any:
  skip = _tfds().decode.SkipDecoding()
  return builder.as_data_source(split, decoders=dict.fromkeys(encoded, skip))


def _copies(remote: RemoteShards) -> pathlib.Path:
  return remote.copies([name for name in remote.entries if name.endswith((".json", ".txt"))])


@final
class _Records:
  """The records of a split in a bucket, as array_record's own source has those of a local folder."""

  def __init__(self, remote: RemoteShards, builder: Any, split: str):
    from tensorflow_datasets.core import data_sources

    found = data_sources.base.file_instructions(builder.info, split)
    folder = pathlib.Path(builder.data_dir).relative_to(_copies(remote))
    self._remote = remote
    self._names = [str(folder / os.path.basename(f.filename)) for f in found]
    self._ranges = [range(f.skip, f.skip + f.take) for f in found]
    self._ends = list(itertools.accumulate(map(len, self._ranges)))
    remote.expect({name: f.examples_in_shard for name, f in zip(self._names, found, strict=True)})

  def __len__(self) -> int:
    return self._ends[-1] if self._ends else 0

  def __getitems__(self, indices: Sequence[int]) -> list[bytes]:
    self.ahead(indices)  # all shards at once
    records = [b""] * len(indices)
    for name, pairs in self._places(indices).items():
      try:
        found = self._remote.read(name, [n for _, n in pairs])
      except ValueError as e:
        if isinstance(e, UserError):
          raise
        raise UserError(f"{self._remote.of(name)} is damaged: {e}.") from e
      for (k, _), record in zip(pairs, found, strict=True):
        records[k] = record
    return records

  def ahead(self, indices: Sequence[int]) -> None:
    """Begins to fetch records."""
    places = self._places(indices)
    self._remote.begin({name: [n for _, n in pairs] for name, pairs in places.items()})

  def _places(self, indices: Sequence[int]) -> dict[str, list[tuple[int, int]]]:
    """Returns shard -> [(place among the indices, number of the record)]."""
    places: dict[str, list[tuple[int, int]]] = {}
    for k, index in enumerate(indices):
      number = bisect.bisect_right(self._ends, index)
      first = self._ends[number] - len(self._ranges[number])
      places.setdefault(self._names[number], []).append((k, self._ranges[number][index - first]))
    return places


def _tfds() -> Any:
  """Imports TensorFlow Datasets when it is first needed; takes half a second.

  The garbage collector is off meanwhile: etils replaces `__import__` during this import, and a finaliser that imports
  something, such as that of a semaphore, would fail.
  """
  collecting = gc.isenabled()
  gc.disable()
  try:
    import tensorflow_datasets as tfds
  finally:
    if collecting:
      gc.enable()
  return tfds


def _read_tfds(data: Any, reading: _Reading, indices: Sequence[int]) -> list[Record]:
  indices = [int(i) for i in indices]
  raws = data.__getitems__(indices)
  return [_record(raw, reading, i) for i, raw in zip(indices, raws, strict=True)]


def _record(raw: dict[str, Any], reading: _Reading, index: int) -> Record:
  key = raw[reading.id] if reading.id else f"{reading.prefix}#{index}"
  key = key.decode() if isinstance(key, bytes) else str(key)
  record = {"image": raw[reading.image], "id": key}
  if reading.label:
    record["label"] = _label(raw[reading.label])
  if reading.captions:
    record["captions"] = read_captions(raw[reading.captions], reading.text)
  if reading.mask:
    record |= {"mask": raw[reading.mask], "mask_ignore": reading.ignore}
    record |= {"mask_labels": reading.labels} if reading.labels else {}
  if reading.boxes:
    record |= read_boxes(raw, reading.boxes, reading.on_bad)
    record = in_pixels(record, upright=False)
  return record


def _label(value: Any) -> Label:
  return tuple(int(v) for v in value) if np.ndim(value) else int(value)
