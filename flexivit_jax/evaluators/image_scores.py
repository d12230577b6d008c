"""Which images were right at each size: eval_images.npz beside eval.json.

Imports no JAX: `flexivit report` reads it.
"""

import hashlib
import io
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
from jaxtyping import Integer, UInt8

from flexivit_jax.errors import UserError

MAX_BYTES = 2**28  # of arrays in a file: 50,000 images at 5,000 sizes


class ImageScores(NamedTuple):
  """Images in the order of their ids; `right` holds for each size, by `size_name`, 1 for each image that is right.

  An id is the number of the example in its data set and split. `labels`, -1 where there is none, check that equal ids
  mean equal images. `predicted` are the classes that were found; a file does not keep them.
  """

  ids: Integer[np.ndarray, "n"]
  labels: Integer[np.ndarray, "n"]
  right: Mapping[str, UInt8[np.ndarray, "n"]]
  predicted: Mapping[str, Integer[np.ndarray, "n"]] = MappingProxyType({})


def size_name(row: Mapping[str, object]) -> str:
  """Returns the name of a row's size: "8", "8x6", "8 depth=6"."""
  depth = row.get("depth")
  return str(row["seqhw"]) + ("" if depth is None else f" depth={depth}")


def file_of(path: Path) -> Path:
  """Where the scores are that belong to a file: eval_images.npz beside eval.json."""
  return path.with_name(f"{path.stem}_images.npz")


def digest(data: bytes) -> str:
  """Returns what an eval.json says of its file of scores."""
  return hashlib.sha256(data).hexdigest()


def of_batches(
  sizes: Mapping[str, Sequence[Mapping[str, np.ndarray]]], scored: str
) -> ImageScores | None:
  """Joins batches of all processes: of images whose "_mask" [n] is not 0, sorted by "_id" [n].

  Args:
    sizes: by name the batches, the same images for all: "_mask", "_id", "label", "predicted" and `scored`, each [n].
    scored: key of the values that are 1 for images that are right.

  Returns:
    None if two images have one id: then ids say nothing.
  """
  joined = {
    size: {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    for size, parts in sizes.items()
  }
  first = next(iter(joined.values()))
  real = np.flatnonzero(first["_mask"] > 0)
  order = real[np.argsort(first["_id"][real], kind="stable")]
  ids = first["_id"][order]
  if (np.diff(ids) == 0).any():
    return None
  right = {size: values[scored][order].astype(np.uint8) for size, values in joined.items()}
  predicted = {size: values["predicted"][order] for size, values in joined.items()}
  return ImageScores(ids, first["label"][order], right, predicted)


def encoded(scores: ImageScores) -> bytes:
  """Returns the bytes of a file; equal scores have equal bytes."""
  file = io.BytesIO()
  np.savez_compressed(
    file,
    ids=scores.ids.astype(np.int64),
    labels=scores.labels.astype(np.int32),
    sizes=np.array([*scores.right], np.str_),
    right=np.packbits(np.stack([*scores.right.values()]), axis=1),
  )
  return file.getvalue()


def read(path: Path, expected: str | None) -> ImageScores:
  """Reads the scores that belong to an eval.json.

  Args:
    path: of the eval.json.
    expected: the digest that it gives.

  Raises:
    UserError: there are none, or they are not those that were written with this eval.json. It gives names of files
      without folders: a page that says it may be shown to anybody.
  """
  file = file_of(path)
  if expected is None:
    raise UserError(f"{path.name} says nothing of single images; run `flexivit eval` again.")
  try:
    data = file.read_bytes()
  except OSError as error:
    raise UserError(
      f"{file.name} cannot be read ({error.strerror}); run `flexivit eval` again."
    ) from error
  if digest(data) != expected:
    raise UserError(
      f"{file.name} is not the one that was written with {path.name}; run `flexivit eval` again."
    )
  try:
    return _decoded(data)
  except (
    OSError,
    EOFError,
    ValueError,
    KeyError,
    MemoryError,
    zipfile.BadZipFile,
    zlib.error,
  ) as error:
    raise UserError(
      f"{file.name} holds no scores of images ({error}); run `flexivit eval` again."
    ) from error


def _decoded(data: bytes) -> ImageScores:
  with zipfile.ZipFile(io.BytesIO(data)) as archive:
    if sum(info.file_size for info in archive.infolist()) > MAX_BYTES:
      raise ValueError(f"over {MAX_BYTES} bytes")
  with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
    ids, labels, sizes, packed = (arrays[key] for key in ("ids", "labels", "sizes", "right"))
  shapes = (ids.ndim, labels.shape, packed.shape)
  if shapes != (1, ids.shape, (len(sizes), -(-len(ids) // 8))) or (np.diff(ids) <= 0).any():
    raise ValueError(f"arrays of {ids.shape}, {labels.shape}, {packed.shape}, or ids out of order")
  right = np.unpackbits(packed, axis=1, count=len(ids))
  return ImageScores(ids, labels, dict(zip(map(str, sizes), right, strict=True)))
