"""One table tells what a path is, and what the format says of the input decides whether mean and std may be given."""

import pathlib

import numpy as np
import pytest

from flexivit_jax import weights
from flexivit_jax.errors import UserError
from flexivit_jax.weights import formats

HALF = dict(mean=(0.5,) * 3, std=(0.5,) * 3)


def name_of(path: pathlib.Path) -> str | None:
  return next((f.name for f in formats.FORMATS if f.recognises(path)), None)


def test_a_path_is_what_the_first_format_of_the_table_says(tmp_path):
  configs = {
    "timm": '{"architecture": "vit_base_patch16_224"}',
    "transformers": '{"model_type": "vit"}',
  }
  for name, text in configs.items():
    (tmp_path / name).mkdir()
    (tmp_path / name / "config.json").write_text(text)
    assert name_of(tmp_path / name) == f"folder of {name}"
    (tmp_path / name / "checkpoints").mkdir()  # a run has a config.json too
    assert name_of(tmp_path / name) == formats.CHECKPOINT.name
  np.savez(tmp_path / "w.npz", a=np.zeros(1))
  (tmp_path / "broken.npz").write_bytes(b"PK")
  assert name_of(tmp_path / "w.npz") == name_of(tmp_path / "broken.npz") == "file with arrays"
  assert name_of(tmp_path / "w.onnx") is None


def test_a_file_that_we_wrote_takes_mean_and_std_if_its_source_does(tmp_path, timm_state_dict):
  np.savez(tmp_path / "timm.npz", **timm_state_dict())
  parts = weights.load_with_record(tmp_path / "timm.npz", **HALF, num_heads=4)
  weights.save_npz(tmp_path / "folded.npz", *parts)
  with pytest.raises(UserError, match="folded into this file already"):
    weights.load(tmp_path / "folded.npz", **HALF)
  with pytest.raises(UserError, match=r"one set of weights; leave --ema out"):
    weights.load(tmp_path / "folded.npz", ema=True)
  model, params, record = parts
  source = {"input": record["input"], "model": record["model"]}
  weights.save_npz(tmp_path / "own.npz", model, params, source)
  assert name_of(tmp_path / "own.npz") == formats.OWN_NPZ.name
  weights.load(tmp_path / "own.npz", **HALF)
  weights.save_npz(tmp_path / "big_vision.npz", model, params, {"model": record["model"]})
  with pytest.raises(UserError, match=r"mean and std are for files in timm's names"):
    weights.load(tmp_path / "big_vision.npz", **HALF)
