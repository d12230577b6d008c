"""ONNX graphs of a Segmenter give the scores of every pixel in onnxruntime."""

import jax
import numpy as np
import pytest

from flexivit_jax import cli, weights
from flexivit_jax.models import Segmenter
from flexivit_jax.weights import certificate, model_records
from flexivit_jax.weights.export import onnx as onnx_folder

KINDS = {
  "mask": {},
  "mask, class token": dict(backbone=dict(pool_type="tok", registers=2, gelu="exact")),
  "linear": dict(decoder="linear"),
  "linear, sine-cosine": dict(decoder="linear", backbone=dict(posemb="sincos2d")),
  "fused": dict(fuse=2),
}


def make(name):
  """Returns (model, params): small, every array random and NumPy."""
  given = KINDS[name]
  backbone = dict(
    patch_size=(8, 8), posemb_size=(2, 3), width=16, depth=2, mlp_dim=16, num_heads=2
  ) | given.get("backbone", {})
  fields = {"num_classes": 3, "decoder_depth": 2, **given, "backbone": backbone}
  model = Segmenter(**fields)
  image = np.zeros((1, 16, 16, 3), np.float32)
  shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), image, seqhw=1))["params"]
  rng = np.random.default_rng(0)
  return model, jax.tree.map(lambda s: rng.normal(size=s.shape).astype(np.float32) * 0.3, shapes)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("hw", [(24, 32), (21, 30)])
def test_pixels_are_the_models_at_every_size(name, hw, tmp_path):
  model, params = make(name)
  sizes = ((3, 4), (6, 8)) if hw == (24, 32) else ((3, 4),)
  onnx_folder.write(tmp_path / "seg", model, params, {}, image_hw=hw, sizes=sizes)
  loaded = onnx_folder.load(tmp_path / "seg")
  image = certificate.images(hw, 3)
  for size in sizes:
    want = certificate.logits(model, params, image, size)
    got = loaded.predict(image, size)
    assert got.shape == (2, *hw, 3)
    np.testing.assert_allclose(got, want, atol=1e-4)
    np.testing.assert_allclose(loaded.predict(image[1:], size), want[1:], atol=1e-4)


def test_the_command_writes_and_compares_it(tmp_path, capsys):
  import onnx

  model, params = make("fused")
  record = {"model": model_records.record_of(model), "class_names": ["a", "b", "c"]}
  weights.save_npz(tmp_path / "w.npz", model, params, record)
  given = ["export", str(tmp_path / "w.npz"), str(tmp_path / "seg"), "--to=onnx", "--seqhw=2,4"]
  assert cli.main([*given, "--image_size=16"]) == 0
  assert "100.0000% of the classes the same" in capsys.readouterr().out
  graph = onnx.load(tmp_path / "seg" / "seqhw_04.onnx", load_external_data=False).graph
  assert [one.name for one in graph.output] == ["pixel_logits"]
  names = {one.name for one in graph.initializer}
  assert "coarse/backbone/embedding/kernel" in names  # the one weight that the coarse pass has
  assert not any("coarse" in n and "encoderblock" in n and n.endswith("/kernel") for n in names)
  assert cli.main([*given[:2], str(tmp_path / "t"), "--seqhw=2", "--to=saved_model"]) == 2
  assert "has a segmenter; add --image_only" in capsys.readouterr().err
