"""`flexivit export`, as a user calls it."""

import json
import sys
import types
import zipfile

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from flexivit_jax import cli, errors, weights
from flexivit_jax.weights.export import artifact, comparison, stablehlo


@pytest.fixture
def file(tmp_path, timm_state_dict):
  save_file(timm_state_dict(), tmp_path / "vit.safetensors")
  return tmp_path / "vit.safetensors"


@pytest.fixture
def export(file, tmp_path):
  """Runs the command on a small timm model; returns its exit code."""

  def run(*options, out=tmp_path / "vit.zip"):
    return cli.main(["export", str(file), str(out), "--num_heads=4", *options])

  return run


def test_the_artifact_gives_the_sources_logits(export, file, tmp_path, capsys):
  assert export("--seqhw=2,4x2,2") == 0
  assert "seqhw 4x2: largest difference" in capsys.readouterr().out
  loaded = artifact.load_artifact(tmp_path / "vit.zip")
  assert loaded.sizes == (2, (4, 2))
  model, params = weights.load(file, num_heads=4)
  image = np.random.default_rng(0).uniform(-1, 1, (3, 32, 32, 3)).astype(np.float32)
  for size, grid_hw in ((2, (2, 2)), ((4, 2), (4, 2))):
    want, _ = model.apply({"params": params}, image, grid_hw=grid_hw)
    np.testing.assert_allclose(loaded.predict(image, size), want, atol=1e-5)
  rows = json.loads((tmp_path / "vit.certificate.json").read_text())["rows"]
  assert [row["seqhw"] for row in rows] == [2, "4x2"]
  assert max(row["largest_difference"] for row in rows) < 1e-5


def test_the_record_says_what_the_artifact_is_of(export, tmp_path):
  assert export("--seqhw=4", "--image_size=24", "--mean=0.4,0.4,0.4", "--std=0.2,0.2,0.2") == 0
  record = artifact.load_artifact(tmp_path / "vit.zip").record
  assert record["image_shape"] == [24, 24, 3] and record["platforms"] == ["cpu", "cuda", "tpu"]
  assert record["source"] == {"file": "vit.safetensors", "format": "safetensors in timm's names"}
  assert record["model"]["gelu"] == "exact" and record["folded_input"]["std"] == [0.2, 0.2, 0.2]


def test_equal_exports_are_equal_files(export, tmp_path):
  for name in ("a.zip", "b.zip"):
    assert export("--seqhw=2", "--platforms=cpu", out=tmp_path / name) == 0
  assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()


def test_for_other_platforms_only_it_is_written_and_not_compared(export, tmp_path, capsys):
  assert export("--seqhw=2", "--platforms=tpu") == 0
  assert "not compared" in capsys.readouterr().out
  assert not (tmp_path / "vit.certificate.json").exists()
  with zipfile.ZipFile(tmp_path / "vit.zip") as written:
    assert json.loads(written.read("record.json"))["platforms"] == ["tpu"]


def test_where_jax_is_told_to_leave_out_the_cpu_it_is_not_compared(export, capsys, monkeypatch):
  known = jax.devices()

  def devices(kind=None):
    if kind is not None:
      raise RuntimeError(f"Unknown backend {kind}")
    return known

  monkeypatch.setattr(comparison.jax, "devices", devices)
  assert export("--seqhw=2") == 0
  assert "not compared" in capsys.readouterr().out


@pytest.mark.parametrize(
  ("options", "message"),
  [
    (["--seqhw=all"], "vit.safetensors does not say at which sizes it was trained; give them"),
    (["--seqhw=5"], "sizes that do: 1, 2, 4, 8, 16, 32"),
    (["--seqhw=2", "--platforms=cpu,gpu"], "Unknown platform 'gpu'; known: cpu, cuda, rocm, tpu"),
  ],
)
def test_mistakes_are_one_line_and_leave_nothing(export, tmp_path, options, message, capsys):
  assert export(*options) == 2
  assert message in capsys.readouterr().err
  assert not list(tmp_path.glob("*.zip"))


def test_only_a_new_zip_is_written(export, tmp_path, capsys):
  assert export("--seqhw=2", out=tmp_path / "vit.bin") == 2
  assert "an artifact is a .zip" in capsys.readouterr().err
  (tmp_path / "vit.zip").write_bytes(b"")
  assert export("--seqhw=2") == 2
  assert "is there already" in capsys.readouterr().err


def test_an_artifact_that_differs_is_removed(file, tmp_path):
  model, params, record = weights.load_with_record(file, num_heads=4)
  out = tmp_path / "vit.zip"
  stablehlo.write(out, model, params, record, image_hw=(32, 32), sizes=(2,))
  head = params["head"] | {"bias": params["head"]["bias"] + 0.1}
  with pytest.raises(errors.UserError, match=r"differs at seqhw=2 by .*nothing is written"):
    comparison.verify(out, model, params | {"head": head})
  assert not out.exists()


def test_what_is_not_to_be_compared_has_no_certificate(export, tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(comparison, "verify", None)  # would fail if it were called
  assert export("--seqhw=2", "--no-verify") == 0
  assert "not compared with its source (--no-verify)" in capsys.readouterr().out
  assert artifact.load_artifact(tmp_path / "vit.zip").sizes == (2,)
  assert not (tmp_path / "vit.certificate.json").exists()


def test_what_cannot_be_read_back_is_removed(export, tmp_path, monkeypatch):
  monkeypatch.setitem(comparison.LOADERS, "stablehlo", lambda out: 1 / 0)
  with pytest.raises(ZeroDivisionError):
    export("--seqhw=2")
  assert not (tmp_path / "vit.zip").exists()


@pytest.mark.parametrize(
  ("there", "missing", "message"),
  [
    ([], "onnx", "Writing ONNX needs the package onnx, which is not installed; pip install"),
    (["onnx"], "onnxruntime", "which --no-verify leaves out, needs the package onnxruntime"),
  ],
)
def test_onnx_without_its_packages_is_one_line_and_leaves_nothing(
  export, tmp_path, there, missing, message, capsys, monkeypatch
):
  for name in there:
    monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
  monkeypatch.setitem(sys.modules, missing, None)
  assert export("--to=onnx", "--seqhw=2", out=tmp_path / "vit.onnx") == 2
  assert message in capsys.readouterr().err
  assert [path.name for path in tmp_path.iterdir()] == ["vit.safetensors"]


@pytest.mark.parametrize(
  ("options", "message"),
  [
    (["--to=onxx"], "Unknown kind of export, --to 'onxx'; known: onnx, saved_model, stablehlo."),
    (["--to=onnx", "--platforms=cpu"], "--platforms has no effect with --to=onnx"),
  ],
)
def test_kinds_are_not_mixed_up(export, options, message, capsys):
  assert export("--seqhw=2", *options) == 2
  assert message in capsys.readouterr().err
