"""`flexivit profile`, and --budget on the commands that take sizes."""

import json
import shutil

import numpy as np
import pytest

import flexivit_jax
from flexivit_jax import cli, errors
from flexivit_jax.budget import profile
from flexivit_jax.inference import budgets, programs


@pytest.fixture(scope="module")
def folder(tmp_path_factory, save_small, save_photos):
  """A folder with a small model, photos of its classes, and its profile."""
  folder = tmp_path_factory.mktemp("profile")
  save_small(folder)
  save_photos(folder, 5)
  run("profile", folder / "model.npz", *data(folder))
  return folder


def data(folder):
  return "--data", "name=folder", f"data_dir={folder / 'photos'}", "split=val"


def run(*args):
  assert cli.main([str(arg) for arg in args]) in (None, 0)


def main(*args):
  return cli.main([str(arg) for arg in args])


def test_a_row_for_each_size_and_batch_beside_the_weights(folder):
  (measured,) = profile.read(folder / "model.npz.profile.json")
  assert {(row.size, row.batch) for row in measured.rows} == {(2, 1), (2, 4), (4, 1), (4, 4)}
  assert measured.device == programs.device_name()
  for row in measured.rows:
    assert (row.n, row.runtime, row.dtype) == (15, "jax", "float32")
    assert row.low <= row.value <= row.high
    assert 0 < row.ms <= row.ms_p90
    assert row.memory_mb > 0
    assert row.nll > 0
  one, four = (measured.rows[i] for i in (0, 1))
  assert one.value == four.value  # a size gives the same in all batches


def test_values_are_those_of_the_evaluation(folder, tmp_path):
  from flexivit_jax.inference.predictions import predict

  files = sorted((folder / "photos" / "val").rglob("*.png"))
  (measured,) = profile.read(folder / "model.npz.profile.json")
  for size in (2, 4):
    rows = predict(files, folder / "model.npz", size)
    right = np.mean(
      [row.top[0][1] == file.parent.name for row, file in zip(rows, files, strict=True)]
    )
    assert next(row.value for row in measured.rows if row.size == size) == pytest.approx(right)


def test_predict_by_a_budget_is_predict_at_the_size_it_says(folder, capsys):
  photos = folder / "photos" / "val" / "a"
  run(
    "predict", photos, "--checkpoint", folder / "model.npz", "--budget", "latency_ms=1e4", "--json"
  )
  out, err = capsys.readouterr()
  row = flexivit_jax.choose(folder / "model.npz", latency_ms=1e4)
  assert f"seqhw={row.size} batch={row.batch}: top-1" in err
  again = ("--seqhw", row.size, "--batch_size", row.batch, "--json")
  run("predict", photos, "--checkpoint", folder / "model.npz", *again)
  assert capsys.readouterr().out == out


@pytest.mark.parametrize(
  ("options", "problem"),
  [
    (["--budget=latency_ms=1e-9"], "No size fits latency_ms=1e-09. The nearest is seqhw="),
    (["--budget=latency_ms=-1"], "latency_ms=-1; expected a number above 0"),
    (["--budget=speed=1"], "Unknown limit of --budget 'speed'"),
    (["--budget=gflops=1", "--seqhw=4"], "Give --seqhw=4 or --budget=gflops=1, which chooses it"),
    (["--profile=x.json"], "--profile is of --budget"),
    (["--seqhw=4", "--estimate"], "--estimate is of --budget"),
    (["--budget=gflops=1", "--profile=none.json"], "There is no profile none.json"),
    (["--budget=gflops=1", "--batch_size=3"], "no batches of 3 images; it has 1, 4"),
  ],
)
def test_budgets_that_are_none(folder, capsys, options, problem):
  photos = folder / "photos" / "val" / "a"
  assert main("predict", photos, "--checkpoint", folder / "model.npz", *options) == 2
  assert problem in capsys.readouterr().err


def test_the_profile_of_other_weights_is_refused(folder, tmp_path, save_small):
  save_small(tmp_path, width=32)
  shutil.copy(folder / "model.npz.profile.json", tmp_path)
  with pytest.raises(errors.UserError, match="holds the profile of other weights"):
    flexivit_jax.choose(tmp_path / "model.npz", latency_ms=1e4)


def test_another_device_is_refused_or_estimated(folder, monkeypatch):
  monkeypatch.setattr(programs, "device_name", lambda: "TPU v9")
  with pytest.raises(errors.UserError, match="measured on another device"):
    flexivit_jax.choose(folder / "model.npz", gflops=100)
  monkeypatch.setattr(budgets, "peak_gflops", lambda: 1e9)
  row = flexivit_jax.choose(folder / "model.npz", gflops=100, estimate=True)
  assert row.ms < 0.01


def test_rows_of_a_runtime_that_is_not_installed_are_not_chosen(
  folder, tmp_path, monkeypatch, capsys
):
  (measured,) = profile.read(folder / "model.npz.profile.json")
  faster = tuple(
    row._replace(ms=row.ms / 9, ms_p90=row.ms_p90 / 9, runtime="onnx") for row in measured.rows
  )
  both, onnx_alone = tmp_path / "both.json", tmp_path / "onnx.json"
  profile.write(both, measured._replace(rows=measured.rows + faster))
  profile.write(onnx_alone, measured._replace(rows=faster))
  photos = folder / "photos" / "val" / "a"
  asked = (
    "predict",
    photos,
    "--checkpoint",
    folder / "model.npz",
    "--budget=gflops=100",
    "--profile",
  )
  monkeypatch.setattr(programs.optional, "version", lambda package: "")
  run(*asked, both)
  assert " onnx" not in capsys.readouterr().err
  assert main(*asked, onnx_alone) == 2
  assert "has no row that this command can run" in capsys.readouterr().err


def test_an_export_carries_the_profile(folder, tmp_path):
  out = tmp_path / "vit.zip"
  run("export", folder / "model.npz", out, "--budget", "gflops=100", "--platforms=cpu")
  (measured,) = profile.read(folder / "model.npz.profile.json")
  assert profile.read(profile.path_of(out, measured.weights)) == [measured]


def test_eval_and_embed_by_a_budget(folder, tmp_path, capsys):
  section = dict(
    data=dict(name="folder", data_dir=str(folder / "photos"), split="val"),
    pp="decode|resize(24)|value_range(-1, 1)|onehot(3)|keep('image', 'labels')",
    batch_size=5,
    seqhw=[2, 4],
  )
  config = tmp_path / "c.py"
  config.write_text(
    "import ml_collections\ndef get_config(arg=''):\n"
    f"  return ml_collections.ConfigDict(dict(evals=dict(test={section!r})))\n"
  )
  chosen = flexivit_jax.choose(folder / "model.npz", gflops=100).size
  out = tmp_path / "e.json"
  run(
    "eval",
    "--config",
    config,
    "--checkpoint",
    folder / "model.npz",
    "--budget=gflops=100",
    "--out",
    out,
  )
  assert len(json.loads(out.read_text())["rows"]) == 1
  run(
    "embed", folder / "photos", "--checkpoint", folder / "model.npz", "--budget=gflops=100",
    "--out", tmp_path / "f.npz",
  )  # fmt: skip
  assert f"seqhw={chosen}" in capsys.readouterr().out


@pytest.mark.parametrize(
  ("options", "problem"),
  [
    ([], "says no data to measure on; give --config, or e.g. --data"),
    (["--data", "name=folder", "data_dir=x"], "--data lacks split="),
    (["--data", "name=folder", "split=val", "--eval=test"], "Give --data, or --config"),
    (["--batch_sizes=0"], "expected 1 or more each"),
    (["--ways=torch"], "Unknown runtime of --ways 'torch'"),
    (["--ways=jax:int8"], "Unknown dtype of jax in --ways 'int8'"),
  ],
)
def test_what_profile_cannot_measure(folder, capsys, options, problem):
  assert main("profile", folder / "model.npz", *options) == 2
  assert problem in capsys.readouterr().err
