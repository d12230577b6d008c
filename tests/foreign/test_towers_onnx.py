"""ONNX graphs of two towers give our embeddings in onnxruntime."""

import jax
import numpy as np
import pytest

from flexivit_jax import cli, weights
from flexivit_jax.models import TwoTowers
from flexivit_jax.weights import certificate, model_records
from flexivit_jax.weights.export import onnx as onnx_folder

IMAGE = dict(patch_size=(6, 6), posemb_size=(3, 3), width=16, depth=1, mlp_dim=24, num_heads=4)
TEXT = dict(width=8, depth=2, mlp_dim=12, num_heads=2, vocab_size=20, max_length=5)
KINDS = {
  "clip": dict(kind="clip", eos_token=3),
  "big_vision": {},
  "bert": dict(kind="bert", pad_token=0),
  "bert, no projection": dict(kind="bert", pad_token=0, num_classes=0, width=16),
  "max": dict(pool_type="max", pad_token=0),
  "max of all": dict(pool_type="max"),
  "first": dict(pool_type="first", causal=True, pad_token=0, gelu="exact"),
  "mean": dict(pool_type="mean"),
}


def make(name):
  """Returns (model, params): small, every array random and NumPy."""
  text = TEXT | KINDS[name]
  image = IMAGE | (dict(num_classes=16) if text.get("num_classes") == 0 else {})
  embed_dim = None if text.get("num_classes") == 0 else 7
  model = TwoTowers(image=image, text=text, embed_dim=embed_dim, bias=-3.0)
  inputs = np.zeros((1, 24, 24, 3)), np.zeros((1, 5), int)
  shapes = jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]
  rng = np.random.default_rng(0)
  return model, jax.tree.map(lambda s: rng.normal(size=s.shape).astype(np.float32) * 0.3, shapes)


@pytest.mark.parametrize("name", KINDS)
def test_embeddings_are_the_models_at_every_size_and_the_texts_too(name, tmp_path):
  model, params = make(name)
  image = np.random.default_rng(1).uniform(-1, 1, (2, 24, 24, 3)).astype(np.float32)
  tokens = certificate.texts(model.parts["text"])
  if model.parts["text"].pad_token is not None:
    tokens[0, 2:] = 0
    tokens[1] = 0  # a text of padding alone
  onnx_folder.write(tmp_path / "two", model, params, {}, image_hw=(24, 24), sizes=(2, 4))
  loaded = onnx_folder.load(tmp_path / "two")
  for size in (2, 4):
    want = certificate.embeddings(model, params, image, tokens, size)
    np.testing.assert_allclose(loaded.predict(image, size), want.image, atol=2e-6)
    if KINDS[name].get("pool_type") == "max" and model.parts["text"].pad_token is not None:
      tokens[1] = tokens[2]  # padding alone has no maximum
      want = certificate.embeddings(model, params, image, tokens, size)
    np.testing.assert_allclose(loaded.encode(tokens), want.text, atol=2e-6)
    np.testing.assert_allclose(loaded.encode(tokens[:1]), want.text[:1], atol=2e-6)


def test_the_command_writes_and_compares_both(tmp_path, capsys):
  model, params = make("clip")
  weights.save_npz(tmp_path / "w.npz", model, params, {"model": model_records.record_of(model)})
  given = ["export", str(tmp_path / "w.npz"), str(tmp_path / "two"), "--to=onnx", "--seqhw=2,4"]
  assert cli.main([*given, "--image_size=24"]) == 0
  assert "seqhw   4: largest differences: image" in capsys.readouterr().out
  names = {path.name for path in (tmp_path / "two").iterdir()}
  assert {"text.onnx", "seqhw_02.onnx", "seqhw_04.onnx", "weights.bin"} < names
