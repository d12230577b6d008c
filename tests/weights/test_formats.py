"""One table tells what a path is, and what the format says of the input decides whether mean and std may be given."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexivit_jax import trees, weights
from flexivit_jax.errors import UserError
from flexivit_jax.models import FlexiViT
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


@pytest.fixture
def own(tmp_path, timm_state_dict):
  """Two files that we wrote: one of a file in timm's names, one of a file in big_vision's."""
  np.savez(tmp_path / "timm.npz", **timm_state_dict())
  fields = dict(width=8, depth=1, mlp_dim=16, num_heads=2, patch_size=(2, 2), posemb_size=(2, 2))
  params = FlexiViT(**fields, num_classes=0).init(jax.random.key(0), jnp.zeros((1, 4, 4, 3)))
  flat = trees.flatten(params["params"])
  np.savez(tmp_path / "big_vision.npz", **{n: np.asarray(a) for n, a in flat.items()})
  for name in ("timm", "big_vision"):
    parts = weights.load_with_record(tmp_path / f"{name}.npz", num_heads=2)
    weights.save_npz(tmp_path / f"own_{name}.npz", *parts)
  return tmp_path


def test_a_file_that_we_wrote_takes_mean_and_std_if_its_source_does(own):
  assert name_of(own / "own_timm.npz") == formats.OWN_NPZ.name
  weights.load(own / "own_timm.npz", **HALF)
  with pytest.raises(UserError, match=r"mean and std are for files in timm's names"):
    weights.load(own / "own_big_vision.npz", **HALF)
  with pytest.raises(UserError, match=r"one set of weights; leave --ema out"):
    weights.load(own / "own_timm.npz", ema=True)


def test_what_is_folded_in_is_not_folded_in_again(own):
  weights.save_npz(own / "folded.npz", *weights.load_with_record(own / "own_timm.npz", **HALF))
  with pytest.raises(UserError, match="folded into this file already"):
    weights.load(own / "folded.npz", **HALF)
