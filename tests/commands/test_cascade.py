"""`flexivit cascade`, and --cascade of predict and eval."""

import json

import numpy as np
import pytest
from PIL import Image

from flexivit_jax import cli
from flexivit_jax.budget import cascade
from flexivit_jax.inference import predictions

FIELDS = dict(
  num_classes=3, width=16, depth=1, mlp_dim=16, num_heads=2, patch_size=(8, 8), posemb_size=(3, 3)
)
CONFIG = """
import ml_collections
def get_config(arg=""):
  pp = "decode|resize(24)|value_range(-1, 1)|onehot(3)|keep('image', 'labels')"
  data = dict(name="folder", data_dir={folder!r}, split="val")
  test = dict(data=data, pp=pp, batch_size=8, seqhw=(2, 4))
  return ml_collections.ConfigDict(dict(evals=dict(test=test)))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory, save_small, save_photos):
  """A folder with a small model, photos of its classes, a config and a cascade."""
  folder = tmp_path_factory.mktemp("cascade")
  save_small(folder, seqhw=(2, 3, 4))
  save_photos(folder, 8)
  (folder / "config.py").write_text(CONFIG.format(folder=str(folder / "photos")))
  assert calibrate(folder, "--alpha=0.6", f"--out={folder / 'c.json'}") == 0
  return folder


def calibrate(folder, *args):
  data = ["--data", "name=folder", f"data_dir={folder / 'photos'}", "split=val"]
  return cli.main(["cascade", str(folder / "model.npz"), *data, *args])


def predict(folder, *args):
  common = [f"--checkpoint={folder / 'model.npz'}", "--json", *args]
  return cli.main(["predict", str(folder / "photos" / "val"), *common])


def test_a_cascade_of_labelled_images_is_written_and_told(folder, capsys):
  made = cascade.read(folder / "c.json")
  assert made.sizes[-1] == 4 and (made.n, made.classes, made.unit) == (12, 3, "ms")
  assert made.data == {"name": "folder", "split": "val", "n": 24, "image": [24, 24, 3], "batch": 4}
  out = f"--out={folder / 'many.json'}"
  assert calibrate(folder, "--alpha=0.5,0.6", "--cost=gflops", "--signal=margin", out) == 0
  assert cascade.read(folder / "many_0.5.json").signal == "margin"
  assert cascade.read(folder / "many_0.6.json").unit == "gflops"
  text = capsys.readouterr().out
  assert "seqhw=4 answers" in text and f"wrote {folder / 'many_0.6.json'}" in text


@pytest.fixture
def halves(folder, tmp_path):
  """The cascade with a threshold at which some images stop."""
  made = cascade.read(folder / "c.json")
  path = tmp_path / "halves.json"
  files = sorted((folder / "photos" / "val").rglob("*.png"))
  rows = predictions.predict(files, folder / "model.npz", 2)
  middle = float(np.median([row.top[0][2] for row in rows]))
  made = made._replace(
    sizes=(2, 4), thresholds=(middle,), temperatures=(1.0, 1.0), costs=(1.0, 4.0), shares=(0.5, 0.5)
  )
  cascade.write(path, made)
  return path


def test_predict_says_the_size_of_each_answer(folder, halves, capsys):
  assert predict(folder, f"--cascade={halves}") == 0
  found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
  assert predict(folder, "--seqhw=2,4") == 0
  every = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
  assert len(found) == 24 and {row["seqhw"] for row in found} == {2, 4}
  assert all(row in every for row in found)


def test_eval_measures_a_cascade_beside_its_finest_size(folder, halves, capsys):
  out = folder / "eval.json"
  config = f"--config={folder / 'config.py'}"
  checkpoint = f"--checkpoint={folder / 'model.npz'}"
  files = [str(halves), str(folder / "c.json")]
  assert cli.main(["eval", config, checkpoint, "--cascade", *files, f"--out={out}"]) == 0
  shown = capsys.readouterr()
  assert "2>4" in shown.out and "calibrated on these images" in shown.err
  content = json.loads(out.read_text())
  by_size = {row["seqhw"]: row for row in content["rows"]}
  row, _ = content["cascades"]
  assert row["sizes"] == [2, 4] and row["file"] == "halves.json" and row["n"] == 24
  assert row["finest"]["top1"] == pytest.approx(by_size[4]["top1"])
  assert row["ms"] > 0 and row["finest"]["ms"] > 0 and sum(row["shares"]) == pytest.approx(1)
  stays = by_size[2]["gflops"] + row["shares"][1] * by_size[4]["gflops"]
  assert row["gflops"] == pytest.approx(stays)
  assert row["lost"] >= row["finest"]["top1"] - row["top1"] - 1e-9


@pytest.mark.parametrize(
  ("args", "message"),
  [
    (["--alpha=0.01"], "takes 597 or more, the calibration has 24"),
    (["--alpha=0.6", "--signal=x"], "Unknown signal 'x'"),
    (["--alpha=0.6", "--cost=s"], "Unknown unit of the costs 's'"),
    (["--alpha=0.6", "--seqhw=4"], "two different sizes or more"),
    (["--alpha=0.6", "--templates=one"], "--templates are sentences for --names"),
  ],
)
def test_what_no_cascade_can_be_made_of_is_refused(folder, capsys, args, message):
  assert calibrate(folder, *args, f"--out={folder / 'none.json'}") == 2
  assert message in capsys.readouterr().err
  assert not (folder / "none.json").exists()


def test_images_of_other_classes_are_refused(folder, capsys, tmp_path):
  for name in ("x", "y"):
    (tmp_path / "val" / name).mkdir(parents=True)
    Image.new("RGB", (24, 24)).save(tmp_path / "val" / name / "1.png")
  data = ["--data", "name=folder", f"data_dir={tmp_path}", "split=val", "--alpha=0.6"]
  checkpoint = str(folder / "model.npz")
  assert cli.main(["cascade", checkpoint, *data, f"--out={tmp_path / 'c.json'}"]) == 2
  assert "classes" in capsys.readouterr().err


@pytest.mark.parametrize(
  ("args", "message"),
  [
    (["--seqhw=2"], "Give --cascade or --seqhw, not both"),
    (["--time"], "Give --cascade or --time, not both"),
    (["--image_size=32"], "32"),
  ],
)
def test_predict_takes_one_source_of_sizes(folder, halves, capsys, args, message):
  assert predict(folder, f"--cascade={halves}", *args) == 2
  assert message in capsys.readouterr().err


def test_a_cascade_of_other_weights_is_refused(folder, halves, capsys):
  made = cascade.read(halves)._replace(weights="0" * 64)
  cascade.write(halves, made)
  assert predict(folder, f"--cascade={halves}") == 2
  assert "calibrated with other weights (sha256 000000000000;" in capsys.readouterr().err
