"""An artifact of two towers: images at several sizes, and texts."""

import json

import jax
import numpy as np
import pytest

from flexivit_jax import cli, weights
from flexivit_jax.models import TwoTowers
from flexivit_jax.weights import certificate, model_records
from flexivit_jax.weights.export import artifact, stablehlo

IMAGE = dict(patch_size=(6, 6), posemb_size=(3, 3), width=16, depth=1, mlp_dim=24, num_heads=4)
TEXT = dict(width=8, depth=1, mlp_dim=12, num_heads=2, vocab_size=20, max_length=5)
KINDS = {
  "clip": dict(kind="clip", eos_token=3),
  "big_vision": dict(),
  "bert": dict(kind="bert", pad_token=0),
}


def make(**text):
  """Returns (model, params): small, every array random and NumPy."""
  model = TwoTowers(image=IMAGE, text=TEXT | text, embed_dim=7, bias=-3.0)
  inputs = np.zeros((1, 24, 24, 3)), np.zeros((1, 5), int)
  shapes = jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]
  rng = np.random.default_rng(0)
  return model, jax.tree.map(lambda s: rng.normal(size=s.shape).astype(np.float32) * 0.3, shapes)


def images(n):
  return np.random.default_rng(n).uniform(-1, 1, (n, 24, 24, 3)).astype(np.float32)


def test_embeddings_are_the_models_at_every_size_and_the_texts_too(tmp_path):
  model, params = make(**KINDS["clip"])
  stablehlo.write(tmp_path / "two.zip", model, params, {}, image_hw=(24, 24), sizes=(2, 4))
  loaded = artifact.load_artifact(tmp_path / "two.zip")
  tokens = certificate.texts(model.parts["text"])
  for size in loaded.sizes:
    want = certificate.embeddings(model, params, images(2), tokens, size)
    got = loaded.predict(images(2), size), loaded.encode(tokens)
    np.testing.assert_allclose(got[0], want.image, atol=1e-6)
    np.testing.assert_allclose(got[1], want.text, atol=1e-6)
    similarity = loaded.record["scale"] * got[0] @ got[1].T + loaded.record["bias"]
    np.testing.assert_allclose(similarity, want.similarity, atol=1e-5)
  np.testing.assert_allclose(loaded.encode(tokens[:1]), want.text[:1], atol=1e-6)
  for wrong in (tokens[:, :4], tokens[0], tokens.astype(np.float32)):
    with pytest.raises(ValueError, match=r"Expected tokens \[m, 5\], got"):
      loaded.encode(wrong)


@pytest.mark.full
def test_the_certificate_of_an_export_holds_both_embeddings(tmp_path, capsys):
  model, params = make()
  record = {"model": model_records.record_of(model)}
  weights.save_npz(tmp_path / "two.npz", model, params, record)
  given = ["export", str(tmp_path / "two.npz"), "--seqhw=2,4", "--image_size=24"]
  given.append("--platforms=cpu")
  assert cli.main([*given, str(tmp_path / "two.zip")]) == 0
  assert "seqhw   4: largest differences: image" in capsys.readouterr().out
  certificate_ = json.loads((tmp_path / "two.certificate.json").read_text())
  for row in certificate_["rows"]:
    assert max(row["largest_differences"].values()) < 1e-5
  assert cli.main([*given, str(tmp_path / "image.zip"), "--image_only"]) == 0
  with pytest.raises(ValueError, match="no text tower"):
    artifact.load_artifact(tmp_path / "image.zip").encode(np.zeros((1, 5), int))
