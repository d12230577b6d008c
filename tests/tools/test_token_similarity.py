"""Which tokens of another patch size lie at the same place, and the tool on a run."""

import json
import runpy
import subprocess
import sys

import numpy as np
import pytest


@pytest.fixture
def same_place(repository):
  return runpy.run_path(str(repository / "tools" / "paper" / "token_similarity.py"))["same_place"]


def test_the_same_grid_is_the_same_place(same_place):
  np.testing.assert_array_equal(same_place((3, 2), (3, 2)), np.eye(6, dtype=bool))


def test_the_middle_of_a_patch_may_be_an_edge_or_a_corner_of_others(same_place):
  """Of one patch the middle is where four of 2 x 2 meet; of 3 x 3 it is within the fifth."""
  assert same_place((1, 1), (2, 2)).all()
  np.testing.assert_array_equal(same_place((1, 1), (3, 3)), np.eye(9, dtype=bool)[4:5])
  # A column of two in a column of four: the middles are between the first two and the last two.
  np.testing.assert_array_equal(same_place((2, 1), (4, 1)), [[1, 1, 0, 0], [0, 0, 1, 1]])
  assert same_place((8, 8), (2, 2)).sum() == 64


@pytest.mark.slow
def test_the_tool_scores_a_run(repository, tmp_path, debug_run):
  run, out = debug_run, tmp_path / "tokens"
  tool = [
    "tools/paper/token_similarity.py",
    run,
    "--config=configs/digits.py:debug",
    f"--out={out}",
  ]
  subprocess.run([sys.executable, *tool, "--seqhw=4", "--with=2,8"], check=True, cwd=repository)
  coarse, fine = json.loads((out / "tokens.json").read_text())
  assert (coarse["other"], coarse["chance"]) == ("2", 0.25)
  assert (fine["other"], fine["chance"]) == (
    "8",
    4 / 64,
  )  # of each patch the middle is a corner of four
  assert all(0 <= row["same_place"] <= 1 and row["examples"] == 20 for row in (coarse, fine))
  assert {p.name for p in out.iterdir()} == {"tokens.json", "tokens.csv", "tokens.png"}
