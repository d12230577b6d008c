"""Masks and boxes of a server: what is kept of a file while its image is computed, and how the answer looks."""

import base64
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from flexivit_jax.inference import (
  boxes,
  masks,
  overlays,
  picture_files,
  predictor,
  programs,
  whole_images,
)
from flexivit_jax.trees import Json

Origin = Float[np.ndarray, "6"]  # see `data.annotations`


class Pictures(NamedTuple):
  """How a model that gives masks or boxes is served.

  Attributes:
    fn: what is wanted of the model's result.
    origin: bytes of a file -> the window of it that the model sees.
    answer: (origin, output) -> what `flexivit predict --json` says; a mask is a PNG in base64.
  """

  fn: programs.Fn
  origin: Callable[[bytes], Origin]
  answer: Callable[[Origin, np.ndarray], Json]


def of(loaded: predictor.Loaded) -> Pictures:
  """Returns how a model is served; a detector as `queries.closed` has it."""
  names = predictor.names_of(loaded)
  origin = lambda encoded: whole_images.origin_of(loaded.pp, encoded)  # noqa: E731
  if predictor.gives_masks(loaded.model):
    return Pictures(masks.scores_of_pixels, origin, lambda at, scores: _mask(at, scores, names))
  return Pictures(boxes.boxes_and_logits, origin, lambda at, output: _boxes(at, output, names))


def _mask(origin: Origin, scores: Float[np.ndarray, "h w k"], names: list[str]) -> Json:
  mask = masks.classes_at(scores, (int(origin[0]), int(origin[1])))
  png = picture_files.encoded(overlays.palette_image(mask, len(names)))
  rows = [masks.row_as_json(row) for row in overlays.rows_of(mask, names)]
  return {"hw": [*mask.shape], "classes": rows, "mask": base64.b64encode(png).decode()}


def _boxes(origin: Origin, output: Float[np.ndarray, "l _"], names: list[str]) -> Json:
  found = boxes.detections(output[:, :4], output[:, 4:], origin, names)
  rows = [boxes.drawn_as_json(one) for one in found]
  return {"hw": origin[:2].astype(int).tolist(), "window": origin.tolist(), "detections": rows}
