"""Artifacts of a detector: boxes and logits at several patch sizes, as the model gives them."""

import jax
import numpy as np
import pytest

from flexivit_jax import cli, errors, weights
from flexivit_jax.data import text
from flexivit_jax.models import OwlViT
from flexivit_jax.weights import certificate, model_records
from flexivit_jax.weights.export import artifact, stablehlo

HW = (16, 24)
TEXT = dict(width=8, depth=1, mlp_dim=8, num_heads=1, vocab_size=258, max_length=12)


def make(**fields):
  """Returns (model, params): small, every array random and NumPy."""
  backbone = dict(patch_size=(8, 8), posemb_size=(2, 3), width=16, depth=1, mlp_dim=16, num_heads=2)
  model = OwlViT(**{"num_classes": 3, "backbone": backbone, "embed_dim": 8, **fields})
  queries = None if "text" not in fields else np.ones((1, 1, 4), int)
  image = np.zeros((1, 16, 16, 3), np.float32)
  init = lambda: model.init(jax.random.key(0), image, queries, seqhw=1)  # noqa: E731
  rng = np.random.default_rng(0)
  shapes = jax.eval_shape(init)["params"]
  return model, jax.tree.map(lambda s: rng.normal(size=s.shape).astype(np.float32) * 0.3, shapes)


@pytest.mark.full
def test_an_artifact_gives_the_models_boxes_and_logits(tmp_path):
  model, params = make()
  sizes = (2, (4, 6))
  stablehlo.write(
    tmp_path / "d.zip", model, params, {}, image_hw=HW, sizes=sizes, platforms=("cpu",)
  )
  loaded = artifact.load_artifact(tmp_path / "d.zip")
  assert loaded.sizes == sizes and loaded.record["format"] == "flexivit artifact 3"
  assert loaded.record["boxes"]["4x6"] == {"pred_boxes": [24, 4], "class_logits": [24, 3]}
  image = certificate.images(HW, 3)
  for size in sizes:
    want = certificate.boxes(model, params, image, size)
    got = loaded.predict(image, size)
    assert {*got} == {*want._fields}
    np.testing.assert_allclose(got["pred_boxes"], want.pred_boxes, atol=1e-6)
    np.testing.assert_allclose(got["class_logits"], want.class_logits, atol=1e-5)
    one = loaded.predict(image[:1], size)
    np.testing.assert_allclose(one["pred_boxes"], got["pred_boxes"][:1], atol=1e-6)


def test_the_command_writes_a_detector_of_names_without_its_text_tower(tmp_path, capsys):
  model, params = make(text=TEXT)
  tokens = text.load("bytes", length=12, pad="[PAD]", end="[END]")
  record = {"model": model_records.record_of(model), "text": tokens.record()}
  weights.save_npz(tmp_path / "w.npz", model, params, record)
  given = ["export", str(tmp_path / "w.npz"), str(tmp_path / "d.zip"), "--seqhw=2"]
  given += ["--image_size=16", "--platforms=cpu"]
  assert cli.main(given) == 2
  assert "finds what it is asked for; give --names" in capsys.readouterr().err
  assert cli.main([*given, "--names=cat,dog"]) == 0
  assert "largest difference of the boxes" in capsys.readouterr().out
  loaded = artifact.load_artifact(tmp_path / "d.zip")
  assert loaded.record["class_names"] == ["cat", "dog"] and "text" not in loaded.record
  assert loaded.record["model"]["text"] is None
  image = certificate.images((16, 16), 3)
  queries = np.tile(tokens.encode(["cat", "dog"]), (2, 1, 1))
  want = jax.jit(lambda p, *x: model.apply({"params": p}, *x, seqhw=2)[1])(params, image, queries)
  got = loaded.predict(image, 2)
  for name in got:
    np.testing.assert_allclose(got[name], want[name], atol=1e-5)


def test_what_cannot_be_written_is_refused(tmp_path, capsys):
  model, params = make(text=TEXT)
  with pytest.raises(errors.UserError, match="an exported one has fixed ones; give --names"):
    stablehlo.write(tmp_path / "d.zip", model, params, {}, image_hw=HW, sizes=(2,))
  vit, own = model.parts["backbone"], params["backbone"]
  weights.save_npz(tmp_path / "v.npz", vit, own, {"model": model_records.record_of(vit)})
  given = ["export", str(tmp_path / "v.npz"), str(tmp_path / "v.zip"), "--seqhw=2"]
  assert cli.main([*given, "--names=cat"]) == 2
  assert "--names is for detectors" in capsys.readouterr().err


def test_boxes_that_differ_are_not_close():
  boxes, logits = np.zeros((1, 2, 4)), np.zeros((1, 2, 3))
  same = certificate.Boxes(boxes, logits)
  assert certificate.row_of(2, same, same).is_close
  for other in (same._replace(pred_boxes=boxes + 2e-4), same._replace(class_logits=logits + 2e-4),
                same._replace(pred_boxes=boxes * np.nan)):  # fmt: skip
    assert not certificate.row_of(2, same, other).is_close
