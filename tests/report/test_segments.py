"""Reports of segmentation: ceilings in figures and tables, IoU of each class, sample masks."""

import json
import re

import numpy as np
import pytest

from flexivit_jax.errors import UserError
from flexivit_jax.evaluators import pictures
from flexivit_jax.evaluators.segmentation import METRICS
from flexivit_jax.report import page, plots, runs as runs_lib, segments, tables

NAMES = ["sky", "<road>", "car"]


def make_run(folder, number=1, shift=0.0, **over):
  """Two sizes of three classes, of which "car" has no pixel; the folder of samples beside the file."""
  rows = []
  for grid, miou in ((2, 0.3), (4, 0.5)):
    row = {"seqhw": f"{grid}x{2 * grid}", "patch": 16 // grid, "tokens": 2 * grid**2}
    row |= {"gflops": 0.1 * grid, "n": 3}
    row |= dict.fromkeys((m.name for m in METRICS), miou) | {"ceiling": miou + 0.2 + shift}
    row |= {"class_iou": [miou - 0.1, miou + 0.1, None], "class_pixels": [30, 70, 0]}
    row |= {"samples": [pictures.name_of(i, row["seqhw"]) for i in range(number)]}
    rows.append(row | over)
  data = {"name": "ours", "metrics": [m.stated() for m in METRICS], "classes": NAMES, "rows": rows}
  folder.mkdir()
  (folder / "eval.json").write_text(json.dumps(data))
  mask = np.zeros((4, 6), int)
  sample = pictures.Sample(np.zeros((4, 6, 3), np.float32), mask, {"2x4": mask, "4x8": mask})
  files = [pictures.files(i, sample) for i in range(number)]
  (folder / "eval_samples").mkdir()
  for name, content in ((n, c) for made in files for n, c in made.items()):
    (folder / "eval_samples" / name).write_bytes(content)
  return folder


def words(part):
  return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", part))


def test_the_ceiling_is_drawn_and_stands_below_the_runs(tmp_path):
  paths = [make_run(tmp_path / name) for name in ("a", "b")]
  runs = runs_lib.load(paths)
  assert runs[0].ceiling.name == "ceiling"
  assert words(tables.matrix(runs)).endswith(" ceiling 70.0 50.0 ")
  assert tables.text(runs).splitlines()[-1].split() == ["ceiling", "70.0", "50.0"]
  assert plots.draw(runs, "gflops", plots.NARROW).page_svg.count(">ceiling<") == 1
  assert page._ceiling(runs).startswith(" The ceiling is the mIoU of the classes&#x27; shares")
  other = runs_lib.load([paths[0], make_run(tmp_path / "c", shift=0.1)])
  lines = tables.text(other).splitlines()[-2:]
  assert [line.split()[:2] for line in lines] == [["ceiling", "of"]] * 2
  assert runs_lib.load(paths, "pixel_accuracy")[0].ceiling is None


def test_classes_stand_by_their_pixels_and_absent_ones_are_named(tmp_path):
  (run,) = runs_lib.load([make_run(tmp_path / "run", number=0)])
  text = words(segments.section([run]))
  assert "&lt;road&gt; 60.0 40.0 70 sky 40.0 20.0 30" in text
  assert "in no mean over classes: car." in text and "Sample masks" not in text


def test_sample_masks_stand_at_each_size_beside_the_truth(tmp_path):
  folder = make_run(tmp_path / "run", number=2)
  (run,) = runs_lib.load([folder])
  found = re.findall(r'<img alt="([^"]*)" src="data:image/(\w+);', segments.section([run]))
  assert found == [("image", "jpeg"), ("mask", "png"), ("patch 4", "png"), ("patch 8", "png")] * 2
  (folder / "eval_samples" / "1_4x8.png").unlink()
  assert "1 pictures are missing" in segments.section([run])
  for file in (folder / "eval_samples").iterdir():
    file.unlink()
  assert "not beside its eval.json, in eval_samples/" in segments.section([run])


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"samples": ["../../secret.png"]}, r"samples is \['../../secret.png'\]; expected names such"),
    ({"samples": 3}, "samples is 3; expected names"),
    ({"class_iou": [0.1, "x", None]}, r"class_iou is .*; expected numbers from 0 to 1, or null"),
    ({"class_pixels": [1, 2]}, r"class_pixels is \[1, 2\]; expected as many counts"),
    ({"class_iou": [0.5], "class_pixels": [9]}, "classes is 'of 1 rows'; expected one name"),
  ],
)
def test_what_a_file_says_of_classes_is_checked(tmp_path, change, message):
  with pytest.raises(UserError, match=message):
    runs_lib.read(make_run(tmp_path / "run", **change))
