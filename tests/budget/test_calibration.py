"""Calibration of classifiers whose truth is known."""

import json
import runpy
import subprocess
import sys

import numpy as np
import pytest

from flexivit_jax.budget import calibration
from flexivit_jax.errors import UserError


def draw(n, scale, seed=0):
  """Logits, and labels drawn from the probabilities of logits / scale."""
  rng = np.random.default_rng(seed)
  true = rng.normal(size=(n, 5)) * 2
  probability = np.exp(calibration.log_softmax(true))
  labels = (probability.cumsum(axis=1) > rng.uniform(size=(n, 1))).argmax(axis=1)
  return true * scale, labels


def test_a_calibrated_classifier_has_no_error_and_temperature_one():
  logits, labels = draw(40_000, 1.0)
  assert calibration.ece(logits, labels) < 0.01
  assert calibration.temperature(logits, labels) == pytest.approx(1.0, abs=0.03)


@pytest.mark.parametrize("scale", [0.5, 3.0])
def test_the_temperature_undoes_a_scale(scale):
  logits, labels = draw(40_000, scale)
  assert calibration.ece(logits, labels) > 0.05
  found = calibration.temperature(logits, labels)
  assert found == pytest.approx(scale, rel=0.03)
  assert calibration.ece(logits / found, labels) < 0.01
  assert calibration.nll(logits / found, labels) < calibration.nll(logits, labels)


def test_numbers_by_hand():
  logits = np.log(np.array([[0.85, 0.15], [0.65, 0.35], [0.25, 0.75], [0.25, 0.75]]))
  labels = np.array([0, 1, 1, 0])
  want = -(np.log(0.85) + np.log(0.35) + np.log(0.75) + np.log(0.25)) / 4
  assert calibration.nll(logits, labels) == pytest.approx(want)
  # Bins of a tenth: 0.85 right; 0.65 wrong; 0.75 once right, once wrong. On an edge the last bit would decide.
  assert calibration.ece(logits, labels, bins=10) == pytest.approx((0.15 + 0.65 + abs(1 - 1.5)) / 4)


def test_large_logits_do_not_overflow_and_no_examples_are_an_error():
  assert calibration.nll(np.array([[1e4, 0.0]]), np.array([0])) == 0.0
  with pytest.raises(UserError, match="0 examples"):
    calibration.temperature(np.zeros((0, 3)), np.zeros(0, int))


def test_ensembles_stand_beside_the_best_size_that_costs_no_more(repository):
  """Two sizes that are wrong in different halves, each sure where it is right; the third is always right, and dear."""
  tool = runpy.run_path(str(repository / "tools" / "paper" / "sizes_together.py"))
  labels = np.arange(100) % 2
  sure, unsure = np.eye(2)[labels] * 4, np.eye(2)[1 - labels]
  first, second = np.concatenate([sure[:60], unsure[60:]]), np.concatenate([unsure[:40], sure[40:]])
  rows = tool["ensembles"](["a", "b", "c"], [first, second, sure], labels, [1.0, 2.0, 10.0])
  assert [r["members"] for r in rows] == ["a+b", "a+c", "b+c", "a+b+c"]
  both = rows[0]
  assert (both["gflops"], both["top1"], both["single"], both["single_top1"]) == (3.0, 1.0, "a", 0.6)
  assert both["gain"] == pytest.approx(0.4)
  assert both["standard_error"] == pytest.approx(np.sqrt(0.4 * 0.6 / 100))
  assert (rows[1]["single"], rows[1]["gain"]) == ("c", 0.0)


@pytest.mark.slow
def test_the_tool_measures_a_run(repository, tmp_path, debug_run):
  run, out = debug_run, tmp_path / "together"
  tool = [
    "tools/paper/sizes_together.py",
    run,
    "--config=configs/digits.py:debug",
    f"--out={out}",
    "--seqhw=2,4,8",
  ]
  subprocess.run([sys.executable, *tool], check=True, cwd=repository)
  found = json.loads((out / "sizes.json").read_text())
  wanted = {r["seqhw"]: r["top1"] for r in json.loads((run / "eval.json").read_text())["rows"]}
  assert {int(r["seqhw"]): r["top1"] for r in found["sizes"]} == pytest.approx(
    {k: wanted[k] for k in (2, 4, 8)}
  )
  assert [r["n"] for r in found["sizes"]] == [20] * 3 and len(found["ensembles"]) == 4
  np.testing.assert_array_equal(np.diag(found["agreement"]), 1.0)
  assert {p.name for p in out.iterdir()} == {
    "sizes.json", "sizes.csv", "agreement.csv", "ensembles.csv", "ensembles.png"
  }  # fmt: skip
