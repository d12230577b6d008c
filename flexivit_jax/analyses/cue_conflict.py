"""Cue conflicts: images with the shape of one category and the texture of another; which one a classifier follows.

The protocol of Geirhos et al. 2019 (arXiv 1811.12231), with the mean over classes that its authors recommend
(github.com/rgeirhos/texture-vs-shape, README).
"""

import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from flexivit_jax import errors
from flexivit_jax.evaluators import intervals

ALL = "all"  # category of the row over all shapes


class Conflict(NamedTuple):
  """An image file, and the different categories of its shape and of its texture."""

  path: pathlib.Path
  shape: str
  texture: str


def conflicts(folder: pathlib.Path, categories: Sequence[str]) -> list[Conflict]:
  """Returns the sorted images `SHAPE/<shape><number>-<texture><number>.png` of a folder whose categories differ.

  Raises:
    UserError: the folder does not exist, a file has another name or category, or no image has a conflict.
  """
  if not folder.is_dir():
    raise errors.UserError(f"{folder} is no folder; expected one with airplane/, bear/, ... in it.")
  images = [_read_name(path, categories) for path in sorted(folder.glob("*/*.png"))]
  conflicting = [one for one in images if one.shape != one.texture]
  if not conflicting:
    raise errors.UserError(
      f"{folder} has {len(images)} images SHAPE/*.png, none whose shape and texture differ; expected e.g."
      " cat/cat7-elephant1.png. Give the folder style-transfer-preprocessed-512 of rgeirhos/texture-vs-shape."
    )
  return conflicting


def _read_name(path: pathlib.Path, categories: Sequence[str]) -> Conflict:
  name = re.fullmatch(r"([a-z]+)\d+-([a-z]+)\d+", path.stem)
  if not name or name[1] != path.parent.name or not {name[1], name[2]} <= set(categories):
    raise errors.UserError(
      f"{path.parent.name}/{path.name} is no name of a cue conflict; expected"
      f" SHAPE/<shape><number>-<texture><number>.png, e.g. cat/cat7-elephant1.png, of {', '.join(categories)}."
    )
  return Conflict(path, name[1], name[2])


def decide(
  probabilities: Float[np.ndarray, "n k"], categories: Mapping[str, Sequence[int]]
) -> Int[np.ndarray, "n"]:
  """Returns the index in `categories` with the largest mean probability of its classes, for each image."""
  means = [probabilities[:, list(classes)].mean(axis=1) for classes in categories.values()]
  return np.argmax(means, axis=0)


def rows(
  images: Sequence[Conflict], decisions: Int[np.ndarray, "n"], categories: Sequence[str]
) -> list[dict[str, str | int | float | None]]:
  """Returns a row over all images, and one for each category that is the shape of an image.

  Returns:
    Rows of {"category", "n", "shape" and "texture" (decisions for these), "accuracy" (the share of images with one of
    the two), "shape_bias" (shape / (shape + texture)), "low", "high"}. The last two are the ends of the 95 % interval
    of the bias among the images that were decided for either (Wilson's); None if there are none.
  """
  decided = np.asarray(categories)[decisions]
  shape = np.array([image.shape for image in images])
  texture = np.array([image.texture for image in images])
  everything = np.ones(len(images), bool)
  chosen = {ALL: everything} | {c: shape == c for c in categories if (shape == c).any()}
  return [
    _row(name, (decided == shape)[rows_of], (decided == texture)[rows_of])
    for name, rows_of in chosen.items()
  ]


def _row(
  category: str, by_shape: np.ndarray, by_texture: np.ndarray
) -> dict[str, str | int | float | None]:
  shape, texture = int(by_shape.sum()), int(by_texture.sum())
  either, n = shape + texture, len(by_shape)
  row: dict[str, str | int | float | None] = {
    "category": category,
    "n": n,
    "shape": shape,
    "texture": texture,
  }
  bias = shape / either if either else None
  low, high = intervals.wilson(shape, either) if either else (None, None)
  return row | {"accuracy": either / n, "shape_bias": bias, "low": low, "high": high}
