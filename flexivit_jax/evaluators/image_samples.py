"""Samples of classification to look at: images that some size gets wrong, with the class that each size gives them."""

import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from flexivit_jax.data import images
from flexivit_jax.evaluators import pictures
from flexivit_jax.evaluators.base import Batches
from flexivit_jax.evaluators.image_scores import ImageScores
from flexivit_jax.running import distributed
from flexivit_jax.trees import Json

LOOKED_AT = 128  # images of which the samples are taken
LONGEST = 160  # pixels of the longer side
LAST = 2**32  # ids are below


class Sample(NamedTuple):
  """An image, and what each size says of it; sizes by their names."""

  id: int  # the number of the example in its data set and split
  label: int  # -1: it has none
  predicted: Mapping[str, int]
  right: Mapping[str, bool]  # of an image with several labels several classes are right


def name_of(sample_id: int) -> str:
  """Returns the name of an image's file."""
  return f"{sample_id}.jpg"


class Album:
  """Keeps small copies of `LOOKED_AT` images, drawn by their ids. `chosen` takes the samples from these.

  The draw does not depend on the order of the images, nor on which process reads them: a data set may be sorted by
  class, and topologies give the same samples. Images that are neither grey nor RGB are not kept.
  """

  def __init__(self) -> None:
    self._small: dict[int, UInt8[np.ndarray, "_ _ c"]] = {}

  def watched(self, batches: Batches) -> Iterator[Mapping[str, np.ndarray]]:
    """Yields the batches as they are, of "image" float32 [n, h, w, c] in [-1, 1], "_mask" and "_id".

    On the way it keeps what may be chosen; without "_id" nothing.
    """
    self._small.clear()
    for batch in batches:
      if "_id" in batch and batch["image"].shape[-1] in (1, 3):
        self._keep(batch)
      yield batch

  def _keep(self, batch: Mapping[str, np.ndarray]) -> None:
    full = len(self._small) == LOOKED_AT
    limit = max(map(_rank, self._small)) if full else LAST
    ranks = np.where(batch["_mask"] > 0, _rank(batch["_id"].astype(np.int64)), LAST)
    for i in np.argsort(ranks, kind="stable")[:LOOKED_AT].tolist():
      if ranks[i] >= limit:
        break
      image = batch["image"][i]
      hw = pictures.small_hw((image.shape[0], image.shape[1]), LONGEST)
      small = images.resize_image(pictures.grey_levels(image), hw, "area")
      self._small[int(batch["_id"][i])] = small
    for surplus in sorted(self._small, key=_rank)[LOOKED_AT:]:
      del self._small[surplus]

  def files(self, samples: Sequence[Sample]) -> dict[str, bytes]:
    """Returns a JPEG of each sample by name, on every process; all must call it."""
    mine = {one.id: pictures.jpeg(self._small[one.id]) for one in samples if one.id in self._small}
    archive = io.BytesIO()
    arrays: dict[str, Any] = {name_of(i): np.frombuffer(file, np.uint8) for i, file in mine.items()}
    np.savez(archive, **arrays)
    parts = [np.load(io.BytesIO(data)) for data in distributed.blobs(archive.getvalue())]
    return {name: part[name].tobytes() for part in parts for name in part.files}


def chosen(scores: ImageScores, number: int) -> list[Sample]:
  """Returns images that some size gets wrong, sorted by class.

  Images that another size gets right are taken before those that all sizes get wrong.

  Args:
    scores: of all images, with the classes that were predicted.
    number: the most that are returned.
  """
  right = np.stack([*scores.right.values()]).astype(bool)
  ranks = _rank(scores.ids.astype(np.int64))
  drawn = np.argsort(ranks, kind="stable")[:LOOKED_AT]
  wrong = [int(i) for i in drawn if not right[:, i].all()]
  first = sorted(wrong, key=lambda i: not right[:, i].any())[:number]
  made = [
    Sample(
      int(scores.ids[i]),
      int(scores.labels[i]),
      {size: int(values[i]) for size, values in scores.predicted.items()},
      {size: bool(values[i]) for size, values in scores.right.items()},
    )
    for i in first
  ]
  return sorted(made, key=lambda one: (one.label, one.id))


def row(samples: Sequence[Sample], size: str) -> list[Json]:
  """Returns what a row of this size says of the samples."""
  return [
    {"id": one.id, "label": one.label, "predicted": one.predicted[size], "right": one.right[size]}
    for one in samples
  ]


def _rank(ids: Any) -> Any:
  """Places of ids, a number or an array, in an order that looks random: different places of different ids."""
  # An odd factor, so that it can be undone. Knuth, The Art of Computer Programming 3, 6.4.
  return ids * 2654435761 % LAST
