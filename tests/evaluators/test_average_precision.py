"""Average precision equals pycocotools and faster-coco-eval on the same boxes in COCO's form, by both rules."""

import contextlib
import io
import logging

import numpy as np
import pytest

from flexivit_jax.errors import UserError
from flexivit_jax.evaluators import average_precision as ap
from flexivit_jax.evaluators.average_precision import Boxes

pytest.importorskip("pycocotools")
IDS = [1, 2, 5, 13, 44, 90]  # of categories in the file: class 0 is category 1


def scene(seed, images=12, classes=6, crowds=True, most=9):
  """True boxes, and detections that find some of them more or less; some images have neither."""
  rng = np.random.default_rng(seed)
  n = rng.integers(0, most, images)
  image = np.repeat(np.arange(images), n)
  label = rng.choice(classes - 1, len(image))  # the last class has no box
  low, size = rng.uniform(0, 150, (len(image), 2)), np.exp(rng.uniform(2, 5.5, (len(image), 2)))
  box = np.concatenate([low, low + size], 1)
  crowd = (rng.random(len(image)) < 0.15) & crowds
  true = Boxes(image, box, label, np.ones(len(image)), crowd)
  again = rng.choice(len(image), 3 * len(image))
  moved = box[again] + rng.normal(0, 0.08, (len(again), 4)) * np.tile(size[again], 2)
  other = rng.random(len(again)) < 0.2
  labels = np.where(other, rng.integers(0, classes, len(again)), label[again])
  score = np.float64(np.float32(rng.random(len(again))))
  order = np.argsort(image[again], kind="stable")
  found = Boxes(image[again], moved, labels, score, np.zeros(len(again), bool)).of(order)
  found = found.of((found.box[:, 2:] > found.box[:, :2]).all(1))
  return true, found


def as_json(true, found, images, extra=None):
  def rows(boxes):
    sides = boxes.box[:, 2:] - boxes.box[:, :2]
    xywh = np.concatenate([boxes.box[:, :2], sides], 1)
    return [
      dict(id=i + 1, image_id=int(boxes.image[i]) + 100, category_id=IDS[boxes.label[i]],
           bbox=xywh[i].tolist(), area=float(sides[i].prod()), iscrowd=int(boxes.crowd[i]))
      for i in range(len(boxes.image))
    ]  # fmt: skip

  data = {
    "images": [{"id": i + 100, "width": 600, "height": 600, **(extra or {}).get(i, {})} for i in range(images)],
    "annotations": rows(true),
    "categories": [{"id": k, "name": str(k), "frequency": "rcf"[k % 3]} for k in IDS],
  }  # fmt: skip
  keys = ("image_id", "category_id", "bbox")
  detections = [
    {k: row[k] for k in keys} | {"score": float(s)} for row, s in zip(rows(found), found.score, strict=True)
  ]  # fmt: skip
  return data, detections


def by_pycocotools(data, detections, most):
  from pycocotools import coco, cocoeval

  with contextlib.redirect_stdout(io.StringIO()):
    true = coco.COCO()
    true.dataset = data
    true.createIndex()
    tool = cocoeval.COCOeval(true, true.loadRes(detections), "bbox")
    tool.params.maxDets = [most]
    tool.evaluate()
    tool.accumulate()
  return tool.eval["precision"][..., -1]


def by_faster(data, detections, most, **options):
  tools = pytest.importorskip("faster_coco_eval")
  logging.getLogger("faster_coco_eval").setLevel(logging.ERROR)
  true = tools.COCO(data)
  tool = tools.COCOeval_faster(true, true.loadRes(detections), "bbox", **options)
  tool.params.maxDets = [most]
  tool.evaluate()
  tool.accumulate()
  return tool.eval["precision"][..., -1]


@pytest.mark.parametrize(("seed", "most"), [(0, 100), (1, 100), (2, 3), (3, 1)])
def test_cocos_average_precision_is_that_of_both_tools(seed, most):
  true, found = scene(seed)
  got = ap.precisions(true, found, range(6), most=most)
  assert got.shape == (10, 101, 6, 4) and (got[:, :, 5] == -1).all()  # without a box: no precision
  assert (got[:, :, 0] > -1).any()  # class 0 counts
  files = as_json(true, found, 12)
  np.testing.assert_allclose(got, by_pycocotools(*files, most), atol=1e-9)
  np.testing.assert_allclose(got, by_faster(*files, most), atol=1e-9)
  whole = ap.mean(got[..., 0])
  assert 0.1 < whole < 0.9
  assert whole == pytest.approx(np.mean([ap.mean(got[:, :, k, 0]) for k in range(5)]), abs=1e-12)


def federation(true, seed, images=12):
  """What each image lacks, and of which classes it has not all boxes."""
  rng = np.random.default_rng(seed)
  negative, lenient = rng.random((2, images, 6)) < 0.3
  negative[true.image, true.label] = False
  return negative, lenient & ~negative


@pytest.mark.parametrize("seed", [4, 5])
def test_lvis_average_precision_is_that_of_faster_coco_eval(seed):
  true, found = scene(seed, crowds=False)
  negative, lenient = federation(true, seed)
  extra = {
    i: {
      "neg_category_ids": [IDS[k] for k in np.flatnonzero(negative[i])],
      "not_exhaustive_category_ids": [IDS[k] for k in np.flatnonzero(lenient[i])],
    }
    for i in range(12)
  }
  kept = ap.federated(true, found, negative)
  got = ap.precisions(*kept, range(6), most=300, lenient=lenient)
  expected = by_faster(*as_json(true, found, 12, extra), 300, lvis_style=True)
  np.testing.assert_allclose(got, expected, atol=1e-9)
  assert not np.allclose(got, ap.precisions(*kept, range(6), most=300))
  assert not np.allclose(got, ap.precisions(true, found, range(6), most=300, lenient=lenient))


def test_lvis_rules_by_a_slow_loop():
  """At one overlap: sorted by score, each detection takes the best free box; what may not count is left out."""
  true, found = scene(6, crowds=False)
  negative, lenient = federation(true, 6)
  kept = ap.federated(true, found, negative)
  got = ap.precisions(
    *kept, range(6), most=300, ious=np.array([0.5]), areas=[(0, 1e10)], lenient=lenient
  )
  for k in range(5):
    hits, taken = [], set()
    rows = [i for i in np.argsort(-found.score, kind="stable") if found.label[i] == k]
    for i in rows:
      here = [
        j for j in range(len(true.image)) if true.label[j] == k and true.image[j] == found.image[i]
      ]
      if not here and not negative[found.image[i], k]:
        continue
      free = [(overlap(found.box[i], true.box[j]), j) for j in here if j not in taken]
      best, j = max(free, default=(0, None))
      if best >= 0.5:
        taken.add(j)
        hits.append(1)
      elif not lenient[found.image[i], k]:
        hits.append(0)
    right = np.cumsum(hits)
    recall, precision = right / (true.label == k).sum(), right / (1 + np.arange(len(hits)))
    expected = [max(precision[recall >= r], default=0) for r in np.linspace(0, 1, 101)]
    np.testing.assert_allclose(got[0, :, k, 0], expected, atol=1e-9)


def overlap(a, b):
  sides = np.maximum(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0)
  both = sides.prod()
  return both / ((a[2:] - a[:2]).prod() + (b[2:] - b[:2]).prod() - both)


def test_areas_are_in_the_unit_of_each_image():
  true, found = scene(7, crowds=False)
  unit = np.linspace(1, 40, 12)
  areas = [(0, 50), (50, 1e10)]
  got = ap.precisions(true, found, range(6), areas=areas, unit=unit)
  scale = np.sqrt(unit)[:, None]
  scaled = [one._replace(box=one.box / scale[one.image]) for one in (true, found)]
  np.testing.assert_allclose(got, ap.precisions(*scaled, range(6), areas=areas), atol=1e-9)
  assert not np.allclose(got, ap.precisions(true, found, range(6), areas=areas))


def test_what_finds_everything_has_1_and_nothing_has_no_mean():
  true, found = scene(8, crowds=False)
  assert ap.mean(ap.precisions(true, true, range(6))[..., 0]) == pytest.approx(1, abs=1e-12)
  assert ap.mean(ap.precisions(true, found.of([]), range(6))[..., 0]) == 0
  assert ap.mean(ap.precisions(true.of([]), found, range(6))) is None


def test_without_pycocotools_it_is_said_how_to_get_it(monkeypatch):
  monkeypatch.setitem(__import__("sys").modules, "pycocotools.cocoeval", None)
  with pytest.raises(UserError, match=r"needs the package pycocotools.*pip install.*'detect'"):
    ap.pycocotools()
