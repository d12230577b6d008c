"""ONNX graphs of a detector give its boxes and logits in onnxruntime."""

import jax
import numpy as np
import pytest

from flexivit_jax import cli, weights
from flexivit_jax.data import text
from flexivit_jax.models import OwlViT
from flexivit_jax.weights import certificate, model_records
from flexivit_jax.weights.export import onnx as onnx_folder

TEXT = dict(width=8, depth=1, mlp_dim=8, num_heads=1, vocab_size=258, max_length=12)
KINDS = {
  "class token": {},
  "corner": dict(box_bias="corner", gelu="quick", objectness=True, backbone=dict(registers=2)),
  "pooled": dict(merge="none", gelu="exact", backbone=dict(pool_type="map")),
  "sine-cosine, stacked": dict(backbone=dict(posemb="sincos2d", scan=True)),
  "fixed queries": dict(unit_queries=False),
}


def make(given, queries=None):
  """Returns (model, params): small, every array random and NumPy."""
  backbone = dict(
    patch_size=(8, 8), posemb_size=(2, 3), width=16, depth=2, mlp_dim=16, num_heads=2
  ) | given.get("backbone", {})
  model = OwlViT(**{"num_classes": 3, "embed_dim": 8, **given, "backbone": backbone})
  image = np.zeros((1, 16, 16, 3), np.float32)
  init = lambda: model.init(jax.random.key(0), image, queries, seqhw=1)  # noqa: E731
  rng = np.random.default_rng(0)
  shapes = jax.eval_shape(init)["params"]
  return model, jax.tree.map(lambda s: rng.normal(size=s.shape).astype(np.float32) * 0.3, shapes)


@pytest.mark.parametrize("name", KINDS)
def test_boxes_are_the_models_at_every_size(name, tmp_path):
  model, params = make(KINDS[name])
  sizes = ((3, 4), (6, 8))
  onnx_folder.write(tmp_path / "d", model, params, {}, image_hw=(24, 32), sizes=sizes)
  loaded = onnx_folder.load(tmp_path / "d")
  assert loaded.record["boxes"]["3x4"] == {"pred_boxes": [12, 4], "class_logits": [12, 3]}
  image = certificate.images((24, 32), 3)
  for size in sizes:
    want = certificate.boxes(model, params, image, size)
    got = loaded.predict(image, size)
    np.testing.assert_allclose(got["pred_boxes"], want.pred_boxes, atol=1e-5)
    np.testing.assert_allclose(got["class_logits"], want.class_logits, atol=1e-4)


def test_the_command_writes_a_detector_of_names(tmp_path, capsys):
  import onnx

  model, params = make(dict(text=TEXT), np.ones((1, 1, 4), int))
  tokens = text.load("bytes", length=12, pad="[PAD]", end="[END]").record()
  record = {"model": model_records.record_of(model), "text": tokens}
  weights.save_npz(tmp_path / "w.npz", model, params, record)
  given = ["export", str(tmp_path / "w.npz"), str(tmp_path / "d"), "--to=onnx", "--seqhw=2,4"]
  assert cli.main([*given, "--image_size=16", "--names=cat,dog"]) == 0
  assert "largest difference of the boxes" in capsys.readouterr().out
  graph = onnx.load(tmp_path / "d" / "seqhw_04.onnx", load_external_data=False).graph
  assert [one.name for one in graph.output] == ["pred_boxes", "class_logits"]
  assert not any(one.name.startswith("text") for one in graph.initializer)
  assert cli.main([*given[:2], str(tmp_path / "t"), "--seqhw=2", "--to=saved_model"]) == 2
  assert "has an owl_vit; add --image_only" in capsys.readouterr().err
