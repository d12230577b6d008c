"""A real process that is killed at random moments, over and over, ends where one that was left alone ends."""

import json
import pathlib
import runpy
import subprocess
import sys

import pytest

from flexivit_jax.errors import UserError

pytestmark = pytest.mark.faults

TOOL = pathlib.Path(__file__).parents[2] / "tools" / "bench" / "chaos.py"
CONFIG = """
import ml_collections


def get_config(arg=""):
  del arg
  data = dict(name="synthetic", image_size=12, num_classes=3, num_examples=64)
  pp = "value_range(-1, 1)|onehot(3)|keep('image', 'labels')"
  return ml_collections.ConfigDict(dict(
    total_steps=400,
    log_every=10,
    input=dict(data=dict(data, split="train"), pp=f"decode|flip_lr|{pp}", batch_size=8, threads=1),
    model=dict(variant="mu", patch_size=(4, 4), posemb_size=(3, 3), dropout=0.1),
    flexi=dict(seqhw=dict(v=(2, 3))),
    objective=dict(mixup_p=0.5),
    optim=dict(lr=1e-2, wd=1e-3, clip=1.0, schedule=dict(warmup_steps=2)),
    evals=dict(test=dict(data=dict(data, split="test"), pp=pp, batch_size=32, seqhw=(2, 3), every_steps=100)),
    checkpoint=dict(every_steps=20, keep=2),
  ))
"""


@pytest.mark.parametrize("config", ["digits.py", "none.py"])
def test_only_a_folder_of_its_own_is_deleted(tmp_path, config):
  mine = tmp_path / "mine"
  mine.mkdir()
  (mine / "photo.jpg").write_text("the only one")
  command = [sys.executable, TOOL, "1", f"--config=configs/{config}", f"--out={mine}"]
  run = subprocess.run(command, capture_output=True, text=True, check=False)
  assert run.returncode == 2 and run.stderr.startswith("chaos.py: error: ")
  assert ("no folder of this tool's" in run.stderr) == (config == "digits.py")
  assert (mine / "photo.jpg").read_text() == "the only one"


def test_a_folder_of_its_own_is_made_anew(tmp_path):
  make_room = runpy.run_path(str(TOOL))["make_room"]
  log = make_room(tmp_path / "out")
  (log.parent / "run").mkdir()
  assert make_room(tmp_path / "out") == log
  assert list(log.parent.iterdir()) == [log]
  log.unlink()
  make_room(tmp_path / "out")
  file = tmp_path / "file"
  file.touch()
  with pytest.raises(UserError, match="give another --out"):
    make_room(file)


@pytest.mark.slow
def test_ten_kills_change_nothing(tmp_path):
  config = tmp_path / "config.py"
  config.write_text(CONFIG)
  out = tmp_path / "chaos"
  command = [sys.executable, TOOL, "10", f"--config={config}", f"--out={out}"]
  run = subprocess.run(command, capture_output=True, text=True, check=False)
  assert run.returncode == 0, run.stdout + run.stderr
  assert "10 kills: 0 differences; the end is the same" in run.stdout
  rows = [json.loads(line) for line in (out / "chaos.jsonl").read_text().splitlines()]
  assert sum(row["code"] != 0 for row in rows) == 10 and any(row["resumed"] for row in rows)
