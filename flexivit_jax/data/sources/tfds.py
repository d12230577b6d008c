"""TFDS data sets that were prepared as array_record."""

import functools
import gc
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from flexivit_jax.data.sources.base import Label, Record, Source
from flexivit_jax.data.sources.folder import subfolders
from flexivit_jax.data.splits import parse_split
from flexivit_jax.errors import UserError, nearest, unknown

_ID_KEYS = ("id", "file_name", "filename", "tfds_id")


def tfds_source(
  name: str,
  *,
  split: str,
  data_dir: str | os.PathLike[str] | None = None,
  image_key: str = "image",
  label_key: str = "label",
  num_classes: int | None = None,
) -> Source:
  """A TFDS data set that was prepared as array_record, read without TensorFlow.

  Only prepared files are read, never the data set's own code: nothing is downloaded.

  Args:
    name: `NAME`, `NAME/CONFIG`, `NAME:VERSION`.
    split: TFDS split syntax.
    data_dir: where TFDS prepared it; None is TFDS's own default.
    image_key, label_key: its features; the label may be a sequence of classes (`imagenet2012_real`).
    num_classes: needed only where the label is a plain integer.
  """
  builder = _builder(name, data_dir)
  features = builder.info.features
  for key in (image_key, label_key):
    if key not in features:
      raise unknown(f"feature of {name} (image_key=, label_key=)", key, features)
  declared = getattr(features[label_key], "num_classes", None)
  if (declared or num_classes) is None:
    raise UserError(f"Feature {label_key!r} of {name} does not say num_classes; give num_classes=.")
  if None not in (declared, num_classes) and declared != num_classes:
    raise UserError(f"num_classes={num_classes}, but {name} has {declared} classes.")
  parts = parse_split(split, {s: info.num_examples for s, info in builder.info.splits.items()})
  names = tuple(features[label_key].names) if declared else None
  id_key = next((key for key in _ID_KEYS if key in features), None)
  data = _open(builder, split, image_key)
  read = functools.partial(_read_tfds, data, image_key, label_key, id_key, f"{name}/{split}")
  size = sum(p.stop - p.start for p in parts)
  return Source(name, split, declared or num_classes, names, size, read)


def is_prepared(name: str, data_dir: str | os.PathLike[str] | None = None) -> bool:
  """Whether TFDS has prepared a data set there as array_record; arguments as in `tfds_source`."""
  try:
    _builder(name, data_dir)
  except UserError:
    return False
  return True


def _builder(name: str, data_dir: str | os.PathLike[str] | None) -> Any:
  from flexivit_jax.data.sources import SOURCES  # Lazy: that imports this.

  try:
    tfds = _tfds()
  except ModuleNotFoundError as e:
    if e.name != "tensorflow_datasets":
      raise
    raise UserError(
      f"Data set {name!r} is none of {sorted(SOURCES)}.{nearest(name, list(SOURCES))} Others are read by "
      "TensorFlow Datasets, which is not installed (`make demo` leaves it out): "
      f"`{sys.executable} -m pip install tensorflow-datasets`."
    ) from None
  where = None if data_dir is None else os.path.expanduser(data_dir)
  try:
    builder = tfds.core.read_only_builder.builder_from_files(name, data_dir=where)
  except tfds.core.DatasetNotFoundError:
    shown = where or tfds.core.constants.DATA_DIR
    names = [*SOURCES, *subfolders(pathlib.Path(shown))]
    raise UserError(
      f"Data set {name!r} is not prepared in {shown} and is none of {sorted(names)}."
      f"{nearest(name, names)} {_how_to_prepare(name, where)}"
    ) from None
  if "array_record" not in {f.value for f in builder.info.available_file_formats()}:
    file_format = builder.info.file_format.value
    raise UserError(
      f"Data set {name!r} in {builder.data_dir} is prepared as {file_format}, which TensorFlow alone "
      f"reads; expected array_record. {_how_to_prepare(name, where)}"
    )
  return builder


def _how_to_prepare(name: str, data_dir: str | None) -> str:
  where = f" --data_dir {data_dir}" if data_dir else ""
  return (
    f"To prepare a TFDS data set, in another environment: `pip install tensorflow-datasets "
    f"tensorflow && tfds build {name} --file_format=array_record{where}`"
  )


def _open(builder: Any, split: str, image_key: str) -> Any:
  return builder.as_data_source(split, decoders={image_key: _tfds().decode.SkipDecoding()})


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


def _read_tfds(
  data: Any, image_key: str, label_key: str, id_key: str | None, prefix: str, indices: Sequence[int]
) -> list[Record]:
  def record(index: int, raw: dict[str, Any]) -> Record:
    key = raw[id_key] if id_key else f"{prefix}#{index}"
    key = key.decode() if isinstance(key, bytes) else str(key)
    return {"image": raw[image_key], "label": _label(raw[label_key]), "id": key}

  indices = [int(i) for i in indices]
  return [record(i, raw) for i, raw in zip(indices, data.__getitems__(indices), strict=True)]


def _label(value: Any) -> Label:
  return tuple(int(v) for v in value) if np.ndim(value) else int(value)
