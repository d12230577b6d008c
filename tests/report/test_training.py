"""Training curves by patch size: what a page and its CSV say of metrics.jsonl."""

import csv
import json

import numpy as np
import pytest

from flexivit_jax import report
from flexivit_jax.report import training

SIZES = (2, 4, 8)


@pytest.fixture
def run(tmp_path):
  """A run of 480 steps whose loss at seqhw s is s + 1 / step, and rows of evaluations between them."""

  def make(name="ours", rows=None):
    folder = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
    folder.mkdir()
    found = [
      {"seqhw": s, "patch": 24 // s, "tokens": s * s, "gflops": 0.1, "n": 50, "top1": 0.5, "loss": 1.0} for s in SIZES
    ]  # fmt: skip
    (folder / "eval.json").write_text(json.dumps({"name": name, "rows": found}))
    steps = [
      {"step": i, "seqhw": SIZES[i % 3], "loss": SIZES[i % 3] + 1 / i} for i in range(1, 481)
    ]
    steps[9] = {"step": 10, "seqhw": 4, "loss": None}  # a step that was not finite
    steps.append({"step": 480, "top1": 0.5})
    lines = [json.dumps(row) for row in steps] if rows is None else rows
    (folder / "metrics.jsonl").write_text("\n".join(lines))
    return folder

  return make


def points(out):
  return [*csv.DictReader((out / "training.csv").read_text().splitlines())]


def test_each_size_has_a_curve_of_means(run, tmp_path):
  page = report.report([run()], tmp_path / "out").read_text()
  rows = points(tmp_path / "out")
  assert [*dict.fromkeys(row["size"] for row in rows)] == ["seqhw=2", "seqhw=4", "seqhw=8"]
  assert sum(int(row["steps"]) for row in rows) == 479
  first = next(row for row in rows if row["size"] == "seqhw=8")
  steps = np.array([i for i in range(1, 21) if SIZES[i % 3] == 8])
  assert float(first["loss"]) == pytest.approx(np.mean(8 + 1 / steps), rel=1e-5)
  assert float(first["step"]) == pytest.approx(steps.mean())
  assert (
    "Training loss by patch size" in page and "1 rows without a finite loss are left out" in page
  )
  assert page.count('aria-label="Training loss of ours by patch size"') == 1


def test_every_run_has_a_figure_and_names_are_text(run, tmp_path):
  page = report.report([run("a"), run("<b>")], tmp_path / "out").read_text()
  assert (
    page.count("Training loss of") == 2
    and "<b>" not in page.split("Training loss by")[1].split("</section>")[0]
  )
  assert {row["run"] for row in points(tmp_path / "out")} == {"a", "<b>"}


@pytest.mark.parametrize(
  "rows", [[], ['{"step": 1'], ["[1]", "nonsense", '{"step": 1, "loss": "x"}'], ['{"step": 1}']]
)
def test_rows_that_say_nothing_leave_the_page_as_it_is(run, tmp_path, rows):
  page = report.report([run(rows=rows)], tmp_path / "out").read_text()
  assert "Training loss" not in page and not (tmp_path / "out" / "training.csv").exists()


def test_files_of_an_earlier_report_do_not_stay_beside_another(run, tmp_path):
  out = tmp_path / "out"
  report.report([run("a"), run("b")], out)
  assert (out / "differences.csv").exists() and (out / "training.csv").exists()
  report.report([run(rows=[])], out)
  assert not (out / "differences.csv").exists() and not (out / "training.csv").exists()


def test_grids_are_in_the_order_of_their_tokens(run):
  rows = [
    json.dumps({"step": 1, "grid_hw": size, "loss": 1.0}) for size in ("24x32", "6x8", "12x16")
  ]
  (folder,) = [run(rows=rows)]
  (found,) = training.read(report.runs_lib.load([folder]))
  assert [curve.size for curve in found.curves] == ["grid_hw=6x8", "grid_hw=12x16", "grid_hw=24x32"]
