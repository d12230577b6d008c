"""Average precision of boxes by the rules of COCO and of LVIS, computed by pycocotools, one class at a time.

A class is scored on the images that have boxes or detections of it: no other changes anything. So memory is that of one
class, where there are a thousand of them, too.
"""

import contextlib
import importlib
import io
import types
from collections.abc import Sequence
from typing import Any, NamedTuple, final

import numpy as np
from jaxtyping import Bool, Float, Int

from flexivit_jax import errors

RULES = ("coco", "lvis")
IOUS = np.linspace(0.5, 0.95, 10)
RECALLS = 101
MOST_PIXELS = 1e10
# Areas in pixels, those of COCO: of all boxes, of small, medium and large ones.
PIXELS = ((0.0, MOST_PIXELS), (0.0, 32.0**2), (32.0**2, 96.0**2), (96.0**2, MOST_PIXELS))
_ABSENT = -1.0
_NO_BOXES = -1  # stands for all images without a box of a class


class Boxes(NamedTuple):
  """True boxes, or detections, of many images: a row each.

  Attributes:
    image: number of the image.
    box: (x0, y0, x1, y1) in pixels.
    label: number of the class.
    score: of a detection; 1 for a true box.
    crowd: whether a true box is around many objects: any number of detections may find it, and none has to.
  """

  image: Int[np.ndarray, "m"]
  box: Float[np.ndarray, "m 4"]
  label: Int[np.ndarray, "m"]
  score: Float[np.ndarray, "m"]
  crowd: Bool[np.ndarray, "m"]

  def of(self, chosen: Any) -> "Boxes":
    """Returns some of the rows: a mask, or their numbers."""
    return Boxes(*(column[chosen] for column in self))


def pycocotools() -> types.ModuleType:
  """Returns the module that scores boxes.

  Raises:
    UserError: it is not installed.
  """
  try:
    return importlib.import_module("pycocotools.cocoeval")
  except ImportError as e:
    raise errors.UserError(
      f"Average precision needs the package pycocotools, which cannot be imported ({e}). Install it with"
      " `pip install pycocotools`; the extra 'detect' of flexivit_jax brings it."
    ) from e


def precisions(
  true: Boxes,
  found: Boxes,
  classes: Sequence[int],
  *,
  most: int = 100,
  ious: Float[np.ndarray, "t"] = IOUS,
  areas: Sequence[tuple[float, float]] = PIXELS,
  unit: Float[np.ndarray, "n"] | None = None,
  lenient: Bool[np.ndarray, "n k"] | None = None,
) -> Float[np.ndarray, "t r k a"]:
  """Returns the precision of each class at 101 recalls, of least overlaps and areas; -1 where it has no true box.

  Args:
    true: the boxes to be found.
    found: detections.
    classes: those that are scored.
    most: detections of one class in an image that count, the best first.
    ious: least intersection over union of a detection and its box.
    areas: smallest and largest area of boxes that count. Others change nothing, nor do detections of such an area that
      find no box.
    unit: of `areas`, in pixels, for each image; None: 1.
    lenient: images and classes of which not all objects have boxes: detections that find none change nothing.
  """
  unit = np.ones(1 + max([-1, *true.image, *found.image])) if unit is None else unit
  table = np.full((len(ious), RECALLS, len(classes), len(areas)), _ABSENT)
  tool, found = pycocotools(), _best(found, most)
  for i, k in enumerate(classes):
    boxes = true.of(true.label == k)
    if len(boxes.image):
      of_class = None if lenient is None else lenient[:, k]
      answers = found.of(found.label == k)
      table[:, :, i] = _scored(tool, boxes, answers, ious, areas, unit, of_class)
  return table


def _best(found: Boxes, most: int) -> Boxes:
  """Returns the detections of each class in each image that count, those of the highest scores."""
  order = np.lexsort((-found.score, found.label, found.image))  # equal scores stay in their order
  found = found.of(order)
  pair = np.stack([found.image, found.label])
  begins = np.flatnonzero(np.r_[True, (pair[:, 1:] != pair[:, :-1]).any(0)][: len(order)])
  lengths = np.diff(np.r_[begins, len(order)])
  rank = np.arange(len(order)) - np.repeat(begins, lengths)
  return found.of(rank < most)


def mean(precision: Float[np.ndarray, "..."]) -> float | None:
  """The mean over all that have true boxes, as in COCO's summary; None: nothing has."""
  known = precision[precision > _ABSENT]
  return float(known.mean()) if known.size else None


def federated(true: Boxes, found: Boxes, negative: Bool[np.ndarray, "n k"]) -> tuple[Boxes, Boxes]:
  """Returns boxes and detections of the classes that each image was searched for, by LVIS's rules.

  Args:
    true: the boxes to be found.
    found: detections.
    negative: classes that are known not to be in an image; those that have boxes are known to be.
  """
  searched = negative.copy()
  searched[true.image, true.label] = True
  return true, found.of(searched[found.image, found.label])


def _rows(boxes: Boxes, unit: Float[np.ndarray, "n"]) -> list[dict[str, Any]]:
  """Rows as COCO's annotations. Number 0 would say that a box was not found, so they begin at 1."""
  sides = boxes.box[:, 2:] - boxes.box[:, :2]
  area = sides.prod(1) / unit[boxes.image]
  xywh = np.concatenate([boxes.box[:, :2], sides], 1).tolist()
  columns = zip(
    boxes.image.tolist(),
    xywh,
    area.tolist(),
    boxes.score.tolist(),
    boxes.crowd.tolist(),
    strict=True,
  )
  return [
    {
      "id": i,
      "image_id": image,
      "category_id": 0,
      "bbox": box,
      "area": size,
      "score": score,
      "iscrowd": int(crowd),
    }
    for i, (image, box, size, score, crowd) in enumerate(columns, 1)
  ]


@final
class _Rows:
  """What the tool asks of a data set."""

  def __init__(self, rows: list[dict[str, Any]]):
    self._rows = rows

  def getAnnIds(self, **chosen: Any) -> list[int]:  # noqa: N802
    return []

  def loadAnns(self, ids: Any) -> list[dict[str, Any]]:  # noqa: N802
    return self._rows


def _scored(
  tool: types.ModuleType,
  true: Boxes,
  found: Boxes,
  ious: Float[np.ndarray, "t"],
  areas: Sequence[tuple[float, float]],
  unit: Float[np.ndarray, "n"],
  lenient: Bool[np.ndarray, "n"] | None,
) -> Float[np.ndarray, "t r a"]:
  """Precision of one class. Images without a box of it have nothing to match: to the tool they are all one image."""
  none = ~np.isin(found.image, true.image)
  if lenient is not None:
    counts = ~(none & lenient[found.image])
    found, none = found.of(counts), none[counts]
  answers = _rows(found, unit)
  for i in np.flatnonzero(none).tolist():
    answers[i]["image_id"] = _NO_BOXES
  with contextlib.redirect_stdout(io.StringIO()):  # it prints what it does
    scoring = tool.COCOeval(iouType="bbox")
    scoring.cocoGt, scoring.cocoDt = _Rows(_rows(true, unit)), _Rows(answers)
    asked = scoring.params
    asked.imgIds, asked.catIds = [*np.unique(true.image).tolist(), _NO_BOXES], [0]
    asked.iouThrs, asked.areaRng = np.asarray(ious), [list(area) for area in areas]
    asked.maxDets = [len(answers)]
    scoring.evaluate()
    for one in scoring.evalImgs if lenient is not None else ():
      if one is not None and one["image_id"] != _NO_BOXES and lenient[one["image_id"]]:
        one["dtIgnore"] = one["dtIgnore"] | (one["dtMatches"] == 0)
    scoring.accumulate()
  return scoring.eval["precision"][:, :, 0, :, 0]
