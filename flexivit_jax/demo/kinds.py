"""What a model answers, as the demo page takes it: classes, the class of each pixel, or boxes."""

import base64
import io
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Integer
from PIL import Image

from flexivit_jax.data import class_colours
from flexivit_jax.inference import boxes, masks, overlays, predictions, predictor, programs, texts
from flexivit_jax.trees import Json

TOP_K = 5


class Photo(NamedTuple):
  """An image as the model takes it, [h, w, c] in [-1, 1].

  Attributes:
    name: what it is called.
    image: the pixels.
    truth: its label, where one is known.
    origin: the window of the file's image that this is, see `data.annotations`; None: it is all there is.
  """

  name: str
  image: Float[np.ndarray, "h w c"]
  truth: str = ""
  origin: Float[np.ndarray, "6"] | None = None

  @property
  def window(self) -> Float[np.ndarray, "6"]:
    """Returns the origin, that of the image itself where it has none."""
    h, w = self.image.shape[:2]
    return np.array([h, w, 0, 0, h, w], np.float32) if self.origin is None else self.origin


class Kind(NamedTuple):
  """How answers of a model are made.

  Attributes:
    name: "classes", "masks" or "boxes".
    fn: what is wanted of the model's result.
    answer: (photo, output) -> the answer.
    as_json: (answer, that of the finest size) -> what the page takes.
  """

  name: str
  fn: programs.Fn
  answer: Callable[[Photo, np.ndarray], Any]
  as_json: Callable[[Any, Any], Json]


def name_of(model: Any) -> str:
  """Returns the name of a model's kind."""
  if predictor.gives_masks(model):
    return "masks"
  return "boxes" if predictor.gives_boxes(model) else "classes"


def of(loaded: predictor.Loaded, among: texts.Names | None = None) -> Kind:
  """Returns the kind of a model, whose answers have the numbers of `flexivit predict`.

  Args:
    loaded: a classifier, a model that gives masks, a detector (see `queries.closed`), or with `among` two towers.
    among: the classes, where they are texts.
  """
  name = name_of(loaded.model)
  names = among.names if among else predictor.names_of(loaded)
  if name == "masks":
    return Kind(
      name,
      masks.scores_of_pixels,
      lambda photo, scores: masks.classes_at(scores, (int(photo.window[0]), int(photo.window[1]))),
      lambda mask, finest: _mask_as_json(mask, finest, names),
    )
  if name == "boxes":
    return Kind(
      name,
      boxes.boxes_and_logits,
      lambda photo, output: boxes.detections(output[:, :4], output[:, 4:], photo.window, names),
      lambda found, finest: {"boxes": [boxes.drawn_as_json(one) for one in found]},
    )

  def top(photo: Photo, output: np.ndarray) -> Any:
    del photo
    output = output if among is None else among.probabilities(output)
    return predictions.most_likely(output, names, min(TOP_K, len(names)))

  fn = programs.probabilities if among is None else texts.embedding
  as_json = lambda top, finest: {"top": [predictions.class_as_json(*one) for one in top]}  # noqa: E731
  return Kind(name, fn, top, as_json)


def _mask_as_json(
  mask: Integer[np.ndarray, "h w"], finest: Integer[np.ndarray, "h w"], names: Sequence[str]
) -> Json:
  """The classes of a mask, its picture, and the share of the pixels that have the class of the finest size."""
  rows = [masks.row_as_json(row) for row in overlays.rows_of(mask, names)]
  return {
    "classes": rows,
    "agrees": float((mask == finest).mean()),
    "overlay": address(_picture(mask, len(names))),
  }


def _picture(mask: Integer[np.ndarray, "h w"], classes: int) -> Image.Image:
  if classes <= 256:
    return overlays.palette_image(mask, classes)
  table = np.array([class_colours.colour(k) for k in range(classes)], np.uint8)
  return Image.fromarray(table[mask])


def address(picture: Image.Image | bytes) -> str:
  """Returns a picture, or the bytes of a PNG, as an address that holds it."""
  if isinstance(picture, Image.Image):
    file = io.BytesIO()
    picture.save(file, "PNG")
    picture = file.getvalue()
  return f"data:image/png;base64,{base64.b64encode(picture).decode()}"
