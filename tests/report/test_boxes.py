"""Reports of detection: AP of classes, AP by size of the object, sample pictures."""

import json
import re

import numpy as np
import pytest

from flexivit_jax.errors import UserError
from flexivit_jax.evaluators import box_samples
from flexivit_jax.evaluators.box_samples import Labelled
from flexivit_jax.evaluators.detection import METRICS, TOKENS
from flexivit_jax.report import boxes, page, runs as runs_lib

NAMES = ["cat", "<remote>", "dog"]


def make_run(folder, number=1, **over):
  """Two sizes of three classes, of which "dog" has no box; the folder of samples beside the file."""
  rows = []
  for grid, ap in ((2, 0.3), (4, 0.5)):
    row = {"seqhw": grid, "patch": 16 // grid, "tokens": grid**2, "gflops": 0.1 * grid, "n": 3}
    row |= dict.fromkeys((m.name for m in METRICS if m.unit == "%"), ap)
    row |= {"ceiling_recall": 0.9, "dropped_boxes": 4, "ap_rare": ap, "ap50_rare": 0.625}
    row |= {"ap50_tokens_1_to_4": ap + 0.125, "ap_small": 0.125} if grid == 4 else {}
    row |= {"class_ap": [ap - 0.125, ap + 0.125, None], "class_boxes": [30, 1070, 0]}
    row |= {"samples": [box_samples.name_of(i, str(grid)) for i in range(number)]}
    rows.append(row | over)
  data = {"name": "ours", "metrics": [m.stated() for m in METRICS], "classes": NAMES, "rows": rows}
  folder.mkdir()
  (folder / "eval.json").write_text(json.dumps(data))
  some = Labelled(np.array([[0.1, 0.1, 0.5, 0.5]]), np.array([1]), np.array([0.9]))
  image, origin = np.zeros((8, 8, 3), np.float32), np.array([8, 8, 0, 0, 8, 8], np.float32)
  sample = box_samples.Sample(image, origin, some._replace(score=None), {"2": some, "4": some})
  (folder / "eval_samples").mkdir()
  for i in range(number):
    for name, content in box_samples.files(i, sample, NAMES).items():
      (folder / "eval_samples" / name).write_bytes(content)
  return folder


def words(part):
  return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", part))


def test_tables_of_sizes_of_objects_of_groups_and_of_classes(tmp_path):
  (run,) = runs_lib.load([make_run(tmp_path / "run", number=0)])
  text = words(boxes.section([run]))
  assert boxes._TOKENS.keys() == TOKENS.keys()
  for line in (
    "AP50 of 1 to 4 tokens 62.5 –",
    "AP of small, below 32² pixels 12.5 –",
    "AP of rare 50.0 30.0 AP50 of rare 62.5 62.5",
    "&lt;remote&gt; 62.5 42.5 1,070 cat 37.5 17.5 30",
    "Without a box that counts: 1 of 3 classes.",
  ):
    assert line in text, text
  assert "Sample" not in text and "less than a token" not in text
  assert page._ceiling([run]).startswith(" The ceiling is the share of the boxes")


def test_sample_pictures_stand_at_each_size_beside_the_true_boxes(tmp_path):
  folder = make_run(tmp_path / "run", number=2)
  (run,) = runs_lib.load([folder])
  found = re.findall(r'<img alt="([^"]*)" src="data:image/(\w+);', boxes.section([run]))
  assert found == [("boxes", "jpeg"), ("patch 4", "jpeg"), ("patch 8", "jpeg")] * 2
  (folder / "eval_samples" / "1_4.jpg").unlink()
  assert "1 pictures are missing" in boxes.section([run])
  for file in (folder / "eval_samples").iterdir():
    file.unlink()
  assert "not beside its eval.json, in eval_samples/" in boxes.section([run])


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"samples": ["../secret.jpg"]}, r"samples is \['../secret.jpg'\]; expected names such"),
    ({"class_ap": [0.1, 2.0, None]}, r"class_ap is .*; expected numbers from 0 to 1, or null"),
    ({"class_boxes": [1, 2]}, r"class_boxes is \[1, 2\]; expected as many counts"),
    ({"ap_small": 2}, r"ap_small is 2; expected a finite number from 0 to 1"),
  ],
)
def test_what_a_file_says_of_boxes_is_checked(tmp_path, change, message):
  with pytest.raises(UserError, match=message):
    runs_lib.read(make_run(tmp_path / "run", **change))
