"""Operations on the boxes of an example that choose or join them: near-duplicates, crowds."""

from typing import Any

import numpy as np
from jaxtyping import Float

from flexivit_jax.data import annotations, images, queries
from flexivit_jax.errors import UserError, unknown

Example = dict[str, Any]


def merge_boxes(record: Example, iou: float = 0.9, *, num_classes: int) -> Example:
  """Makes one box of near-duplicates, with the classes of all: `box_targets` [m, classes] for `box_labels`.

  Boxes are taken in their order. Each joins the first one before it that is kept and overlaps it by `iou` or more, else
  it is kept itself; so what is kept has its own coordinates, id and flags, and nothing depends on what is far away.
  Crowds and others are not joined. Two boxes of one object would compete for one token (OWL-ViT merges them, too).

  Args:
    record: the example; before `pad_boxes`.
    iou: area of the intersection divided by that of the union, above 0, at most 1.
    num_classes: of the data.
  """
  if not 0 < iou <= 1:
    raise UserError(f"merge_boxes({iou}); expected more than 0, at most 1.")
  boxes = _unpadded(record, "merge_boxes")
  if "box_labels" not in record:
    raise unknown("key of an example", "box_labels", record)
  crowd = np.asarray(record.get("box_crowd", np.zeros(len(boxes), bool)))
  near = (_overlaps(boxes) >= iou) & (crowd[:, None] == crowd)
  target = np.arange(len(boxes))
  for i in range(len(boxes)):
    before = np.flatnonzero(near[i, :i] & (target[:i] == np.arange(i)))
    target[i] = before[0] if len(before) else i
  classes = queries.one_hot(np.asarray(record["box_labels"]), num_classes)
  joined = np.zeros_like(classes)
  np.maximum.at(joined, target, classes)
  kept = np.flatnonzero(target == np.arange(len(boxes)))
  made = _chosen({k: v for k, v in record.items() if k != "box_labels"}, kept)
  return made | {"box_targets": joined[kept]}


def without_crowd(record: Example) -> Example:
  """Removes boxes that stand for a crowd (`box_crowd`), and the key: nothing is trained to find them.

  A warning counts the images that have some. An evaluation keeps them: what is found there is no mistake.
  """
  _unpadded(record, "without_crowd")
  if "box_crowd" not in record:
    return record
  crowd = np.asarray(record["box_crowd"], bool)
  if crowd.any():
    images.notice("boxes of crowds are left out (without_crowd)")
  made = _chosen(record, np.flatnonzero(~crowd))
  return {k: v for k, v in made.items() if k != "box_crowd"}


def with_crowd(record: Example) -> Example:
  """Adds `box_crowd`, all False, where the format has none, so that an evaluation of any data can keep it."""
  boxes = _unpadded(record, "with_crowd")
  return {"box_crowd": np.zeros(len(boxes), bool)} | record


def _unpadded(record: Example, what: str) -> Float[np.ndarray, "m 4"]:
  if "boxes" not in record:
    raise unknown("key of an example", "boxes", record)
  if "box_mask" in record:
    raise UserError(f"{what} stands after pad_boxes, where rows are no boxes; it stands before.")
  return np.asarray(record["boxes"], np.float64)


def _chosen(record: Example, rows: Any) -> Example:
  made = {key: np.asarray(record[key])[rows] for key in annotations.box_keys(record)}
  return record | made | {"boxes": record["boxes"][rows]}


def _overlaps(boxes: Float[np.ndarray, "m 4"]) -> Float[np.ndarray, "m m"]:
  """IoU of each pair; 0 of boxes without area."""
  low = np.maximum(boxes[:, None, :2], boxes[None, :, :2])
  high = np.minimum(boxes[:, None, 2:], boxes[None, :, 2:])
  both = np.clip(high - low, 0, None).prod(-1)
  area = (boxes[:, 2:] - boxes[:, :2]).prod(-1)
  return both / np.maximum(area[:, None] + area - both, 1e-12)
