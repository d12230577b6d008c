"""Mosaics: an image of several examples, so that objects are seen smaller and there are more of them."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from flexivit_jax.data import annotations, geometry
from flexivit_jax.data.geometry import Affine, Fill, ImageSize
from flexivit_jax.errors import UserError

Example = dict[str, Any]


def mosaic(
  record: Example,
  size: int | Sequence[int],
  probabilities: Sequence[float] = (0.4, 0.3, 0.3),
  fill: Fill | None = None,
  method: str = "linear",
  *,
  tile: Callable[[], Example],
  rng: np.random.Generator,
) -> Example:
  """Puts k x k examples into one image of `size`; boxes and masks follow. Source of the defaults: OWL-ViT.

  The first tile is the example itself. The others are drawn by its generator from all examples, each as likely, and go
  through the operations before this one. All else that an example had is dropped, except `neg_labels` (classes that are
  in no tile) and `not_exhaustive` (those of any tile). An example is 4.3 images to decode on average.

  Args:
    record: the example, decoded.
    size: pixels of the result.
    probabilities: of k = 1, 2, ...
    fill: None: tiles are resized to their place; else they keep their shape, and this value is below and on the right.
    method: see `images.resize_image`.
    tile: gives the next of the other examples.

  Errors: an example with `origin`; tiles of other channels or other keys.
  """
  weights = np.asarray(probabilities, np.float64)
  good = weights.ndim == 1 and len(weights) and (weights >= 0).all()
  if not good or abs(weights.sum() - 1) > 1e-6:
    raise UserError(
      f"mosaic: probabilities={list(probabilities)}; expected numbers >= 0 whose sum is 1."
    )
  h, w = (size, size) if isinstance(size, int) else size
  if min(h, w) < len(weights):
    raise UserError(
      f"mosaic: a size of {(h, w)} pixels; expected at least {len(weights)}, one for each tile of a side."
    )
  k = 1 + int(rng.choice(len(weights), p=weights / weights.sum()))
  rows, columns = (np.arange(k + 1) * n // k for n in (h, w))
  places = [(i, j) for i in range(k) for j in range(k)]
  tiles = []
  for number, (i, j) in enumerate(places):
    hw = int(rows[i + 1] - rows[i]), int(columns[j + 1] - columns[j])
    tiles.append(_fitted(tile() if number else record, hw, fill, method))
  for one in tiles:
    _check_alike(tiles[0], one)
  corners = [(int(rows[i]), int(columns[j])) for i, j in places]
  return _joined(tiles, corners, (h, w))


def _fitted(record: Example, hw: ImageSize, fill: Fill | None, method: str) -> Example:
  """Returns what of an example is in a mosaic, with an image of `hw` pixels."""
  image = record.get("image")
  if not isinstance(image, np.ndarray) or image.ndim != 3:
    raise UserError("mosaic got an image that is not decoded; expected `decode` before.")
  if "origin" in record:
    raise UserError("mosaic: an image of several examples has no origin; leave origin() out.")
  keys = ("image", "boxes", "mask", "neg_labels", "not_exhaustive", *annotations.box_keys(record))
  made = {key: record[key] for key in keys if key in record}
  if fill is None:
    return _moved(made, geometry.resize(image.shape[:2], hw, method))
  made = _moved(made, geometry.resize_keep(image.shape[:2], hw, "contain", method))
  return _moved(made, geometry.pad(made["image"].shape[:2], hw, fill=fill))


def _moved(record: Example, affine: Affine) -> Example:
  hw = record["image"].shape[:2]
  moved = annotations.follow(record, hw, affine, 0.0)
  return moved | {"image": geometry.look(record["image"], affine)}


def _check_alike(first: Example, other: Example) -> None:
  a, b = (one["image"] for one in (first, other))
  if (a.shape[2], a.dtype) != (b.shape[2], b.dtype):
    raise UserError(
      f"mosaic: tiles are {a.dtype} of {a.shape[2]} channels and {b.dtype} of {b.shape[2]}; expected the same."
    )
  if first.keys() - _STATED != other.keys() - _STATED:
    keys = sorted((first.keys() ^ other.keys()) - _STATED)
    raise UserError(f"mosaic: of two tiles only one has {', '.join(keys)}; expected the same keys.")


_STATED = {"neg_labels", "not_exhaustive"}  # what may be said of an image, or not


def _joined(tiles: Sequence[Example], corners: Sequence[tuple[int, int]], hw: ImageSize) -> Example:
  channels, dtype = tiles[0]["image"].shape[2], tiles[0]["image"].dtype
  out: Example = {"image": np.zeros((*hw, channels), dtype)}
  if "mask" in tiles[0]:
    out["mask"] = np.full(hw, annotations.NO_CLASS, tiles[0]["mask"].dtype)
  for one, (top, left) in zip(tiles, corners, strict=True):
    for key in ("image", "mask"):
      if key in out:
        h, w = one[key].shape[:2]
        out[key][top : top + h, left : left + w] = one[key]
  if "boxes" in tiles[0]:
    shifts = [np.array([left, top] * 2, np.float32) for top, left in corners]
    moved = [one["boxes"] + shift for one, shift in zip(tiles, shifts, strict=True)]
    out["boxes"] = np.concatenate(moved)
    for key in annotations.box_keys(tiles[0]):
      out[key] = np.concatenate([one[key] for one in tiles])
  if any("not_exhaustive" in one for one in tiles):
    stated = [one["not_exhaustive"] for one in tiles if "not_exhaustive" in one]
    out["not_exhaustive"] = np.unique(np.concatenate(stated))
  if all("neg_labels" in one for one in tiles):
    absent = set.intersection(*({*np.asarray(one["neg_labels"]).tolist()} for one in tiles))
    out["neg_labels"] = np.array(sorted(absent), np.int64)
  return out
