"""What the code wrote before its rooms were named is still read: `golden/README.md` says how it was made."""

import json
import pathlib
import zipfile
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

import flexivit_jax
from flexivit_jax import cli
from flexivit_jax.weights.export import artifact

OVERRIDES = (
  "seed=1", "model.width=16", "model.mlp_dim=32", "model.num_heads=2", "flexi.seqhw.v=(2,4)",
  "evals.test.seqhw=(2,)", "checkpoint.keep=2",
)  # fmt: skip


@pytest.fixture
def old(tmp_path) -> pathlib.Path:
  """The files of before: digits.py, run/, model.npz, artifact.zip, image.png, predictions.jsonl."""
  with zipfile.ZipFile(pathlib.Path(__file__).parent / "golden" / "before_607b032.zip") as file:
    file.extractall(tmp_path)
  return tmp_path


def predictions(old: pathlib.Path) -> dict[int, np.ndarray]:
  """What the code of before predicted: seqhw -> the probability of each class."""
  found = {}
  for line in (old / "predictions.jsonl").read_text().splitlines():
    row = json.loads(line)
    found[row["seqhw"]] = probabilities(row)
  return found


def probabilities(row: dict[str, Any]) -> np.ndarray:
  """Those of a line of `flexivit predict --json`, by class."""
  return np.array([p for _, p in sorted((t["class"], t["probability"]) for t in row["top"])])


def test_an_old_run_goes_on_from_its_step_with_its_config(old, capfd):
  run = old / "run"
  before = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
  config = (run / "config.json").read_text()
  command = ["train", f"--config={old / 'digits.py'}:debug", f"--workdir={run}"]
  assert cli.main([*command, *(f"--config.{o}" for o in OVERRIDES)]) == 0
  assert f"resumed from {run / 'checkpoints' / '2'}: step 2/4" in capfd.readouterr().err

  # The rows of steps 3 and 4 are those that the old code wrote, but for rounding: tests compile without optimization.
  after = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
  times = ("step_s", "images_per_s", "data_wait")
  for a, b in zip(before, after, strict=True):
    assert a.keys() == b.keys() and (a["step"], a["seqhw"]) == (b["step"], b["seqhw"])
    for key in a.keys() - {*times}:
      assert b[key] == pytest.approx(a[key], rel=1e-4), (a["step"], key)
  assert sorted(p.name for p in (run / "checkpoints").iterdir() if p.name.isdigit()) == ["2", "4"]
  assert (run / "config.json").read_text() == config
  assert json.loads((run / "eval.json").read_text())["step"] == 4


def test_old_checkpoints_and_weights_predict_what_they_did(old, capsys):
  wanted = predictions(old)
  for model in ("run", "model.npz"):
    command = ["predict", f"--checkpoint={old / model}", "--seqhw=2,4", "--top_k=10", "--json"]
    assert cli.main([*command, str(old / "image.png")]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    for row in rows:
      np.testing.assert_allclose(probabilities(row), wanted[row["seqhw"]], rtol=1e-5)
    assert [row["seqhw"] for row in rows] == list(wanted)


def test_old_checkpoints_and_weights_hold_the_same_arrays(old):
  (model, params), (other, arrays) = (
    flexivit_jax.load(old / name) for name in ("run", "model.npz")
  )
  fields = ("width", "depth", "mlp_dim", "num_heads", "patch_size", "posemb_size", "num_classes")
  assert [getattr(model, f) for f in fields] == [16, 1, 32, 2, (4, 4), (8, 8), 10]
  assert [getattr(other, f) for f in fields] == [getattr(model, f) for f in fields]
  jax.tree.map(np.testing.assert_array_equal, params, arrays)


def test_an_old_artifact_predicts_what_it_did(old):
  loaded = artifact.load_artifact(old / "artifact.zip")
  image = np.asarray(Image.open(old / "image.png"), np.float32)[None] / 127.5 - 1
  logits = np.asarray(loaded.predict(image, 2))[0].astype(np.float64)
  assert loaded.sizes == (2,)
  np.testing.assert_allclose(np.exp(logits) / np.exp(logits).sum(), predictions(old)[2], rtol=1e-5)
