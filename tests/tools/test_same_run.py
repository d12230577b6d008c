"""`tools/maintain/same_run.py` calls two runs equal when only their times differ, and names the first difference."""

import json
import runpy
import shutil
import zipfile

import numpy as np
import orbax.checkpoint as ocp
import pytest


@pytest.fixture
def runs(tmp_path, repository):
  """Two copies of the run folder in the golden files."""
  with zipfile.ZipFile(repository / "tests" / "golden" / "before_607b032.zip") as file:
    file.extractall(tmp_path)
  shutil.copytree(tmp_path / "run", tmp_path / "other")
  (tmp_path / "run" / "eval.json").write_text('{"rows": [{"top1": 0.5, "ms": 1.5}]}')
  (tmp_path / "other" / "eval.json").write_text('{"rows": [{"top1": 0.5, "ms": 2.5}]}')
  return tmp_path / "run", tmp_path / "other"


@pytest.fixture
def tool(repository):
  return runpy.run_path(str(repository / "tools" / "maintain" / "same_run.py"))


@pytest.fixture
def main(tool):
  return tool["command"]


def change(run, step, **values):
  """Changes values in the row of a step."""
  file = run / "metrics.jsonl"
  rows = [json.loads(line) for line in file.read_text().splitlines()]
  rows[step - 1] |= values
  file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_runs_that_differ_in_times_alone_are_equal(runs, main, capsys):
  change(runs[1], 2, step_s=9.0, images_per_s=9.0, data_wait=0.9)
  assert main([*map(str, runs)]) == 0
  assert capsys.readouterr().out.startswith(
    "equal: 4 drawn sizes and rows of metrics.jsonl, eval.json, and of checkpoint 2 its record, 24 arrays of"
  )


@pytest.mark.parametrize(
  ("values", "line"),
  [
    ({"seqhw": 2}, "different: the drawn sizes[2] seqhw: 4 and 2"),
    ({"loss": 2.5}, "different: metrics.jsonl[2] loss: "),
    ({"new": 1}, "different: metrics.jsonl[2] new: only in the second"),
  ],
)
def test_the_first_difference_of_the_rows_is_named(values, line, runs, main, capsys):
  change(runs[1], 3, **values)
  assert main([*map(str, runs)]) == 1
  assert capsys.readouterr().out.startswith(line)


def test_one_other_bit_of_the_optimizer_state_is_found_by_name(runs, tool, main, capsys):
  folder = runs[1] / "checkpoints" / "2" / "state"
  state = tool["read_arrays"](folder)
  state["step"] = np.int32(3)
  shutil.rmtree(folder)
  ocp.PyTreeCheckpointer().save(folder, state)
  assert main([*map(str, runs)]) == 1
  assert capsys.readouterr().out.startswith("different: state step: 'int32[] ")


def test_what_cannot_be_compared_is_neither_equal_nor_different(runs, main, tmp_path, capsys):
  assert main([str(runs[0]), str(tmp_path / "nowhere")]) == 2
  assert main([str(runs[0])]) == 2
  assert capsys.readouterr().out == ""
