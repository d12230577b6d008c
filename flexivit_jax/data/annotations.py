"""Boxes, the mask and the origin of an example: what they must be, and how they follow the image.

`boxes` is float32 [m, 4]: x0, y0, x1, y1 in pixels of the image as it is at that point, from its
upper left corner; the whole image is (0, 0, w, h). Every key that begins with `box_` has a row for
each box, and loses the rows of boxes that are removed. `mask` is [h, w] of class numbers. In a
data set `mask_ignore` is the number of no class, `mask_labels` what the numbers stand for, and `mask_colors` what
colours do; once a mask is read it is int32, and its numbers are classes or NO_CLASS. `origin` is float32 [6]: height
and width of the decoded image, and top, left, height and width of the window of it that the image now shows, in its
pixels; the window reaches beyond it where there is padding.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int32, Shaped

from flexivit_jax.data import images, mask_labels
from flexivit_jax.data.geometry import Affine, ImageSize
from flexivit_jax.errors import UserError, unknown
from flexivit_jax.specs import NO_CLASS

Example = dict[str, Any]
MIN_AREA = 0.1
_IGNORE = 255  # The usual number of pixels without a class, in files.
_SAID = ("mask_ignore", "mask_labels", "mask_colors")  # what a data set says of a mask
_NO_PIXELS = (
  "no pixel of the mask has a class, so the image counts for nothing in a loss or a score of pixels"
)
_MIN_SIDE = 0.01  # Pixels; less is the rounding of float32, not a part of an object.
_UNSURE = (
  "EXIF data rotate or mirror the image, and its boxes and mask are taken to be of the image after that;"
  " decode(exif=False) in pp if they are of the image as it is stored"
)


def opened(record: Example, hw: ImageSize, orientation: int = 1) -> Example:
  """Returns the example with boxes and mask checked against its decoded image; the mask is read, see `read_mask`.

  Boxes and mask are taken to be of the image as it was decoded.

  Args:
    record: the example.
    hw: pixels of the image.
    orientation: EXIF's, from which decoding rotated or mirrored the image. If neither `annotated_hw`, the size that the
      annotations state, nor the mask proves that they are of the image after that, there is a warning.

  Errors: `annotated_hw` is another size; boxes that are no boxes, or have no area in the image; a mask that is
  damaged or of another size.
  """
  stated = record.get("annotated_hw")
  if stated is not None and tuple(stated) != hw:
    raise UserError(_other_size(stated, hw))
  sideways = orientation in images.SIDEWAYS and hw[0] != hw[1]
  if orientation > 1 and not (sideways and (stated is not None or "mask" in record)):
    images.notice(_UNSURE)
  record = dict(record)
  if "boxes" in record:
    record["boxes"] = _boxes(record).astype(np.float32)
  if "mask" in record:
    record = read_mask(record, max(2**26, hw[0] * hw[1]))
    if (_mask(record, hw) == NO_CLASS).all():
      images.notice(_NO_PIXELS)
  if "boxes" in record:
    _check_areas(record["boxes"], hw)
  return record


def read_mask(record: Example, max_pixels: int = 2**26) -> Example:
  """Returns the example with its mask decoded, int32, and NO_CLASS in the place of `mask_ignore` (default: 255).

  `mask_labels` is a name in `mask_labels.LABELS`, `mask_colors` a table of colours, see `mask_labels.from_colors`.
  Without these three a mask of int32 is taken to be read already.
  """
  mask, said = record["mask"], {key: record[key] for key in _SAID if key in record}
  if not said and isinstance(mask, np.ndarray) and mask.dtype == np.int32:
    return record
  if "mask_colors" in said:
    with _in_the_mask():
      colors = images.decode_mask_colors(mask, max_pixels=max_pixels)
      classes = mask_labels.from_colors(colors, said["mask_colors"])
  else:
    numbers = _decoded(mask, max_pixels)
    classes = mask_labels.from_numbers(
      numbers, said.get("mask_ignore", _IGNORE), said.get("mask_labels")
    )
  return {k: v for k, v in record.items() if k not in said} | {"mask": classes}


def _other_size(stated: Any, hw: ImageSize) -> str:
  if tuple(stated) == hw[::-1]:
    advice = (
      "One of them is turned as the EXIF data say and the other is not: if the annotations are of the stored pixels,"
      " write decode(exif=False) in pp, else decode(exif=True)"
    )
  else:
    advice = "Take the image that was annotated, or scale its annotations"
  return (
    f"The image has {hw[0]} x {hw[1]} pixels (h x w); its annotations are for {stated[0]} x {stated[1]}"
    f" (annotated_hw). {advice}."
  )


def follow(record: Example, hw: ImageSize, affine: Affine, min_area: float) -> Example:
  """Returns the example with boxes, mask and origin moved like its image.

  Boxes are clipped to what is left of the image, and removed where less than `min_area` of their
  area is left, or less than 1/100 pixel of a side. A share is of the area just before this operation.

  Args:
    record: the example.
    hw: pixels of the image before.
    affine: the map, which has been applied to the image.
    min_area: share of the area, 0 to 1.

  Errors: a flip of an example with an origin.
  """
  record = dict(record)
  if "origin" in record:
    record["origin"] = _move_origin(record["origin"], hw, affine)
  if "mask" in record:
    _mask(record, hw)
    record = read_mask(record)
    ignore = NO_CLASS if affine.ignore is None else affine.ignore
    record["mask"] = _move_mask(record["mask"], affine, ignore)
  if "boxes" in record:
    boxes, chosen = _move_boxes(_boxes(record), hw, affine, min_area)
    for key in box_keys(record):
      record[key] = np.asarray(record[key])[chosen]
    record["boxes"] = boxes[chosen].astype(np.float32)
  return record


def box_keys(record: Example) -> list[str]:
  """Returns the keys with a row for each box, without `boxes` itself."""
  return [key for key in record if key.startswith("box_")]


# --- the origin ---


def origin(record: Example) -> Example:
  """Begins `origin`, see above. It stands right after `decode`; then a model's boxes can be put on the file's image.

  Errors: an image that is not decoded.
  """
  image = record["image"]
  if not isinstance(image, np.ndarray):
    raise UserError("The image is not decoded; expected decode|origin().")
  h, w = image.shape[:2]
  return record | {"origin": np.array([h, w, 0, 0, h, w], np.float32)}


def _move_origin(
  origin: Float[np.ndarray, "6"], hw: ImageSize, affine: Affine
) -> Float[np.ndarray, "6"]:
  if affine.flip:
    raise UserError("A mirrored image has no origin; leave flips, or origin(), out of pp.")
  whole, start, size = np.split(np.float64(origin), 3)
  scale = size / hw
  window = np.array(affine.window).reshape(2, 2) * scale
  return np.concatenate([whole, start + window[0], window[1]]).astype(np.float32)


def on_original(
  boxes: Float[np.ndarray, "*n m 4"], origin: Float[np.ndarray, "*n 6"]
) -> Float[np.ndarray, "*n m 4"]:
  """Returns boxes in pixels of the decoded image, clipped to it.

  Args:
    boxes: (x0, y0, x1, y1) in shares of the image that the model is shown.
    origin: of this image.
  """
  whole, start, size = (np.tile(side[..., ::-1], 2) for side in np.split(np.float64(origin), 3, -1))
  return np.clip(boxes * size[..., None, :] + start[..., None, :], 0, whole[..., None, :])


# --- boxes ---


def _boxes(record: Example) -> Float[np.ndarray, "m 4"]:
  """Returns the boxes, checked, in float64."""
  boxes = np.asarray(record["boxes"])
  if boxes.ndim != 2 or boxes.shape[1] != 4 or boxes.dtype.kind not in "fiu":
    raise UserError(
      f"boxes are {boxes.dtype} {list(boxes.shape)}; expected numbers [m, 4], without boxes [0, 4]."
    )
  boxes = boxes.astype(np.float64)
  good = np.isfinite(boxes).all(1) & (boxes[:, :2] <= boxes[:, 2:]).all(1)
  if not good.all():
    row = int(np.argmin(good))
    raise UserError(
      f"Box {row} is {boxes[row].tolist()}; expected finite x0 <= x1 and y0 <= y1, in pixels, as (x0, y0, x1, y1)."
    )
  for key in box_keys(record):
    if len(record[key]) != len(boxes):
      raise UserError(
        f"{key!r} has {len(record[key])} rows for {len(boxes)} boxes; expected a row for each."
      )
  return boxes


def _check_areas(boxes: Float[np.ndarray, "m 4"], hw: ImageSize) -> None:
  """Raises a UserError for boxes of no area, or of none inside the image: no model can be trained to find them."""
  seen = np.clip(boxes, 0, [hw[1], hw[0]] * 2)
  flat = ~(seen[:, :2] < seen[:, 2:]).all(1)
  if flat.any():
    row = int(np.argmax(flat))
    raise UserError(
      f"Box {row} is {boxes[row].tolist()}, which has no area inside the image of {hw[1]} x {hw[0]} pixels (w x h);"
      " expected x0 < x1 and y0 < y1. Leave such boxes out of the data."
    )


def _move_boxes(
  boxes: Float[np.ndarray, "m 4"], hw: ImageSize, affine: Affine, min_area: float
) -> tuple[Float[np.ndarray, "m 4"], Bool[np.ndarray, " m"]]:
  """Returns all boxes in the result, and which of them are kept."""
  top, left, height, width = affine.window
  h, w = affine.hw
  low = [max(0, left), max(0, top)]
  high = [min(hw[1], left + width), min(hw[0], top + height)]
  clipped = np.clip(boxes, low * 2, high * 2)
  moved = (clipped - [left, top] * 2) * ([w, h] * 2) / ([width, height] * 2)
  if affine.flip:
    moved[:, [0, 2]] = w - moved[:, [2, 0]]
  wide = (moved[:, 2:] - moved[:, :2] >= _MIN_SIDE).all(1)
  return moved, wide & (_area(clipped) >= min_area * _area(boxes))


def _area(boxes: Float[np.ndarray, "m 4"]) -> Float[np.ndarray, " m"]:
  return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def pad_boxes(record: Example, number: int, overflow: str | None = None) -> Example:
  """Adds rows to `boxes` and to every `box_` key until there are `number`, so that examples can be stacked.

  Added boxes are zeros; added numbers are -1 in integers (labels, ids), 0 in floats, False in bools.
  `box_mask`, float32 [number], is 1 for boxes and 0 for added rows.

  Args:
    record: the example.
    number: rows of the result.
    overflow: of more boxes: None: they are an error; "largest": those of the largest area are kept, in their order.
  """
  if overflow not in (None, "largest"):
    raise unknown("overflow", overflow, ["largest"])
  boxes = _boxes(_with_boxes(record))
  chosen = np.arange(len(boxes))
  if len(boxes) > number:
    if overflow is None:
      raise UserError(
        f"{len(boxes)} boxes are more than pad_boxes({number}) has room for; take a larger number, or"
        " overflow='largest', which leaves the smallest ones out."
      )
    chosen = np.sort(np.argsort(-_area(boxes), kind="stable")[:number])
  record = dict(record)
  for key in box_keys(record):
    record[key] = _pad_rows(key, np.asarray(record[key])[chosen], number)
  record["boxes"] = _pad_rows("boxes", boxes[chosen].astype(np.float32), number)
  record["box_mask"] = (np.arange(number) < len(chosen)).astype(np.float32)
  return record


def _pad_rows(
  key: str, rows: Shaped[np.ndarray, "m *_"], number: int
) -> Shaped[np.ndarray, "number *_"]:
  values = {"i": -1, "f": 0, "b": False}
  if rows.dtype.kind not in values:
    raise UserError(f"{key!r} is {rows.dtype}; expected signed integers, floats or bools.")
  padding = np.full((number - len(rows), *rows.shape[1:]), values[rows.dtype.kind], rows.dtype)
  return np.concatenate([rows, padding])


def relative_boxes(record: Example, form: str) -> Example:
  """Divides boxes in pixels by the sides of the image: 0 to 1.

  Args:
    record: the example.
    form: "xyxy" (x0, y0, x1, y1), or "cxcywh" (centre x, centre y, width, height).
  """
  if form not in ("xyxy", "cxcywh"):
    raise unknown("form of boxes", form, ["xyxy", "cxcywh"])
  boxes = _boxes(_with_boxes(record))
  h, w = record["image"].shape[:2]
  boxes = boxes / [w, h, w, h]
  if form == "cxcywh":
    low, high = boxes[:, :2], boxes[:, 2:]
    boxes = np.concatenate([(low + high) / 2, high - low], 1)
  return record | {"boxes": boxes.astype(np.float32)}


def _with_boxes(record: Example) -> Example:
  if "boxes" not in record:
    raise unknown("key of an example", "boxes", record)
  return record


# --- masks ---


@contextlib.contextmanager
def _in_the_mask() -> Iterator[None]:
  """Says of an error that it is of the mask, not of the image."""
  try:
    yield
  except Exception as error:
    error.add_note("in the mask")
    raise


def _decoded(mask: Any, max_pixels: int) -> Int32[np.ndarray, "h w"]:
  if isinstance(mask, bytes):
    with _in_the_mask():
      return images.decode_mask(mask, max_pixels=max_pixels)
  mask = np.asarray(mask)
  if mask.ndim != 2 or mask.dtype.kind not in "biu":
    raise UserError(
      f"The mask is {mask.dtype} {list(mask.shape)}; expected integers or bools [h, w]."
    )
  numbers = mask.astype(np.int32)
  if (numbers != mask).any():
    raise UserError(f"The mask has numbers up to {mask.max()}; expected those of int32.")
  return numbers


def _mask(record: Example, hw: ImageSize) -> Shaped[np.ndarray, "h w"]:
  """Returns the mask, checked."""
  mask = record["mask"]
  if not isinstance(mask, np.ndarray) or mask.ndim != 2 or mask.dtype.kind not in "biu":
    got = "encoded" if isinstance(mask, bytes) else f"{type(mask).__name__} {np.shape(mask)}"
    raise UserError(f"The mask is {got}; expected integers [h, w]. `decode` decodes it.")
  if mask.shape != hw:
    raise UserError(
      f"The mask has {mask.shape[0]} x {mask.shape[1]} pixels (h x w), the image {hw[0]} x {hw[1]}; expected the same."
      " If EXIF data turn the image, and the mask is of the stored pixels, write decode(exif=False) in pp."
    )
  return mask


def _move_mask(
  mask: Shaped[np.ndarray, "h w"], affine: Affine, ignore: int
) -> Shaped[np.ndarray, "_ _"]:
  cut = images.window(mask, affine.window, ignore, "ignore")
  for axis in (0, 1):
    cut = _nearest(cut, axis, affine.hw[axis])
  return cut[:, ::-1] if affine.flip else cut


def _nearest(mask: Shaped[np.ndarray, "h w"], axis: int, new: int) -> Shaped[np.ndarray, "_ _"]:
  """Resizes an axis: each new pixel is the old one in which its centre lies, so classes are never mixed.

  A centre between two pixels takes the one nearer to the middle of the axis; and in the very middle
  the one with the smaller number. So flips and resizes can change places.
  """
  old = mask.shape[axis]
  if old == new:
    return mask
  centre = (2 * np.arange(new) + 1) * old  # Of each new pixel, in old pixels / (2 * new).
  index, rest = np.divmod(centre, 2 * new)
  index -= (rest == 0) & (centre > old * new)
  out = mask.take(index, axis)
  if new % 2 and not old % 2:
    middle = np.minimum(mask.take(old // 2 - 1, axis), mask.take(old // 2, axis))
    out[(slice(None),) * axis + (new // 2,)] = middle
  return out
