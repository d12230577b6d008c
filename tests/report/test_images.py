"""Sample images of classification in reports."""

import json
import re

import pytest
from PIL import Image

from flexivit_jax.errors import UserError
from flexivit_jax.report import images, runs as runs_lib


def make_run(folder, classes=("cat", "<dog>"), **over):
  """Two sizes and two images, of which the second has no class; the pictures beside the file."""
  rows = []
  for grid, found in ((2, 0), (4, 1)):
    row = {"seqhw": grid, "patch": 8 // grid, "tokens": grid**2, "gflops": 0.1 * grid, "n": 9}
    row |= {"top1": 0.5, "loss": 1.0}
    first = {"id": 12, "label": 1, "predicted": found, "right": found == 1} | over
    second = {"id": 3, "label": -1, "predicted": 5, "right": False}
    rows.append(row | {"samples": [first, second]})
  named = {"classes": list(classes)} if classes else {}
  folder.mkdir()
  (folder / "eval.json").write_text(json.dumps({"name": "ours", **named, "rows": rows}))
  (folder / "eval_samples").mkdir()
  for one in (12, 3):
    Image.new("RGB", (8, 8)).save(folder / "eval_samples" / f"{one}.jpg")
  return folder


def lines(part):
  body = part[part.index("<tbody>") : part.index("</tbody>")]
  return [" ".join(re.sub("<[^>]*>", " ", line).split()) for line in body.split("</tr>")][:-1]


def test_each_image_stands_with_the_class_of_each_size(tmp_path):
  (run,) = runs_lib.load([make_run(tmp_path / "run")])
  part = images.section([run])
  assert lines(part) == [
    "&lt;dog&gt; ✓ right: &lt;dog&gt; ✗ wrong: cat",
    "no class ✗ wrong: class 5 ✗ wrong: class 5",
  ]
  assert re.findall(r'<img alt="([^"]*)" src="data:image/(\w+);', part) == [
    ("image 12", "jpeg"),
    ("image 3", "jpeg"),
  ]
  (run,) = runs_lib.load([make_run(tmp_path / "unnamed", classes=None)])
  assert lines(images.section([run]))[0] == "class 1 ✓ right: class 1 ✗ wrong: class 0"


def test_pictures_that_are_gone_are_said(tmp_path):
  folder = make_run(tmp_path / "run")
  (run,) = runs_lib.load([folder])
  (folder / "eval_samples" / "3.jpg").unlink()
  assert "Missing pictures: 1." in images.section([run])
  (folder / "eval_samples" / "12.jpg").unlink()
  assert "not beside its eval.json, in eval_samples/" in images.section([run])


@pytest.mark.parametrize(
  ("over", "message"),
  [
    ({"id": "../secret"}, r"rows\[0\]\.samples\[0\]\.id is '\.\./secret'; expected a int"),
    ({"id": -1}, r"samples\[0\]\.id is -1; expected a number of an image or a class"),
    ({"predicted": -1}, r"samples\[0\]\.predicted is -1; expected a number"),
    ({"label": True}, r"samples\[0\]\.label is True; expected a number"),
    ({"right": 1}, r"samples\[0\]\.right is 1; expected a bool"),
  ],
)
def test_what_a_file_says_of_samples_is_checked(tmp_path, over, message):
  with pytest.raises(UserError, match=message):
    runs_lib.read(make_run(tmp_path / "run", **over))


def test_rows_of_other_images_are_refused(tmp_path):
  file = make_run(tmp_path / "run") / "eval.json"
  data = json.loads(file.read_text())
  data["rows"][1]["samples"].pop()
  file.write_text(json.dumps(data))
  with pytest.raises(UserError, match=r"rows\[1\]\.samples is 'of other images'; expected"):
    runs_lib.read(file)
  data["rows"][1]["samples"] = 3
  file.write_text(json.dumps(data))
  with pytest.raises(UserError, match=r"rows\[1\]\.samples is 3; expected a list"):
    runs_lib.read(file)
