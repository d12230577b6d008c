"""Boxes, masks and captions in the features of TFDS data sets."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from flexivit_jax.data.sources.annotated import BadRowError, boxes_of, caption, fitted, warn
from flexivit_jax.errors import UserError, unknown

_CROWD, _DIFFICULT = ("is_crowd", "iscrowd"), ("is_difficult", "difficult")
_SLACK = 1e-3  # of a side
_TEXTS = ("text", "caption", "raw")
Raw = Mapping[str, Any]  # an example as TFDS gives it


class Labels(NamedTuple):
  """The classes of a feature: its key, their number and names where it declares them."""

  key: str
  number: int | None
  names: tuple[str, ...] | None


class Boxes(NamedTuple):
  """Where an example has its boxes.

  Attributes:
    key: the feature, a sequence.
    bbox: the field of the corners, ymin xmin ymax xmax in fractions; None: the sequence holds corners alone.
    label: the field of the class; None: there is one class.
    id, crowd, difficult: fields; None: there is none.
  """

  key: str
  bbox: str | None
  label: str | None = None
  id: str | None = None
  crowd: str | None = None
  difficult: str | None = None


def labels_of(features: Any, key: str) -> Labels:
  """Returns the classes that a feature declares."""
  number = getattr(features[key], "num_classes", None)
  return Labels(key, number, tuple(features[key].names) if number else None)


def boxes_in(features: Any, key: str, label_key: str | None, of: str) -> tuple[Boxes, Labels]:
  """Returns where the boxes are, and their classes.

  Args:
    features: of the data set.
    key: a sequence of boxes, or of dicts with a field of boxes.
    label_key: the field of the class; None: `label`, if there is one.
    of: the data set, for messages.

  Raises:
    UserError: the feature is something else, or has no field `label_key`.
  """
  inner = getattr(features[key], "feature", None)
  if inner is not None and _is_box(inner):
    _check_format(inner, key, of)
    return Boxes(key, None), Labels(key, 1, None)
  fields = {} if inner is None or not hasattr(inner, "items") else dict(inner.items())
  bbox = next((name for name, field in fields.items() if _is_box(field)), None)
  if bbox is None:
    raise UserError(
      f"Feature {key!r} of {of} (boxes_key=) is {features[key]!r:.200}; expected a sequence of boxes, or of dicts"
      " with a box in them."
    )
  _check_format(fields[bbox], key, of)
  if label_key is not None and label_key not in fields:
    raise unknown(f"field of {key} in {of} (label_key=)", label_key, fields)
  label = label_key or ("label" if "label" in fields else None)
  first = [next((n for n in names if n in fields), None) for names in (("id",), _CROWD, _DIFFICULT)]
  classes = labels_of(fields, label) if label else Labels(key, 1, None)
  return Boxes(key, bbox, label, *first), classes


def _is_box(feature: Any) -> bool:
  return hasattr(feature, "bbox_format")


def _check_format(feature: Any, key: str, of: str) -> None:
  """Raises a UserError for boxes in another format than TFDS's own; old data sets state none, and have that."""
  stated = getattr(feature.bbox_format, "value", feature.bbox_format)
  if stated not in (None, "REL_YXYX"):
    raise UserError(
      f"Boxes of {key!r} in {of} are in the format {stated}; expected REL_YXYX, TFDS's own."
    )


def read_boxes(raw: Raw, where: Boxes, on_bad: str) -> dict[str, np.ndarray]:
  """Returns the boxes of an example as `annotated.boxes_of` does, in fractions of the sides.

  Raises:
    UserError: a box is bad, and `on_bad` is "raise".
  """
  rows = raw[where.key]
  bboxes = rows if where.bbox is None else rows[where.bbox]
  labels, ids = (None if field is None else rows[field] for field in (where.label, where.id))
  flags = {"crowd": where.crowd, "difficult": where.difficult}
  corners, kept = [], []
  for i, (ymin, xmin, ymax, xmax) in enumerate(np.reshape(bboxes, (-1, 4)).tolist()):
    try:
      corners.append(fitted((xmin, ymin, xmax, ymax), (1.0, 1.0), _SLACK))
      kept.append(i)
    except BadRowError as error:
      if on_bad == "raise":
        raise UserError(f"{where.key}[{i}]: {error}; on_bad='skip' leaves such boxes out") from None
      warn(f"boxes of {where.key!r} that have no area or are outside their image are left out")
  return boxes_of(
    corners,
    [0 if labels is None else int(labels[i]) for i in kept],
    [i + 1 if ids is None else int(ids[i]) for i in kept],
    **{name: [bool(rows[field][i]) for i in kept] for name, field in flags.items() if field},
  )


def captions_in(features: Any, key: str, of: str) -> str | None:
  """Returns the field of the texts of a sequence of dicts, None for other features; a UserError if there is none."""
  inner = getattr(features[key], "feature", None)
  if inner is None or not hasattr(inner, "items"):
    return None
  field = next((name for name in _TEXTS if name in inner), None)
  if field is None:
    raise unknown(f"field of {key} in {of} with texts, one of {', '.join(_TEXTS)},", key, inner)
  return field


def read_captions(value: Any, field: str | None) -> tuple[str, ...]:
  """Returns the captions of an example: those of a text, of a sequence of texts or of dicts.

  Raises:
    UserError: no caption, or an empty one.
  """
  texts = value if field is None else value[field]
  listed = [texts] if isinstance(texts, bytes | str) else list(texts)
  try:
    if not listed:
      raise BadRowError("no caption")
    return tuple(caption(t.decode() if isinstance(t, bytes) else t) for t in listed)
  except (BadRowError, UnicodeDecodeError) as error:
    raise UserError(f"captions: {error}") from None
