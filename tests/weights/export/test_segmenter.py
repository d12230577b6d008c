"""Artifacts of a Segmenter: the scores of every pixel at several patch sizes, as the model gives them."""

import jax
import numpy as np
import pytest

from flexivit_jax import cli, errors, weights
from flexivit_jax.models import Segmenter
from flexivit_jax.weights import certificate, model_records
from flexivit_jax.weights.export import artifact, stablehlo

HW = (20, 26)  # no patch of 8 pixels divides it


def make(**fields):
  """Returns (model, params): small, every array random and NumPy."""
  backbone = dict(patch_size=(8, 8), posemb_size=(2, 3), width=16, depth=1, mlp_dim=16, num_heads=2)
  given = {"num_classes": 3, "backbone": backbone, "decoder_depth": 1, **fields}
  model = Segmenter(**given)
  image = np.zeros((1, 16, 16, 3), np.float32)
  shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), image, seqhw=1))["params"]
  rng = np.random.default_rng(0)
  return model, jax.tree.map(lambda s: rng.normal(size=s.shape).astype(np.float32) * 0.3, shapes)


@pytest.mark.full
@pytest.mark.parametrize("fields", [{}, dict(decoder="linear", fuse=2)])
def test_an_artifact_gives_the_models_scores_of_every_pixel(fields, tmp_path):
  model, params = make(**fields)
  sizes = ((2, 3), (4, 6))
  stablehlo.write(
    tmp_path / "s.zip", model, params, {}, image_hw=HW, sizes=sizes, platforms=("cpu",)
  )
  loaded = artifact.load_artifact(tmp_path / "s.zip")
  assert loaded.record["outputs"] == [*HW, 3] and loaded.sizes == sizes
  assert loaded.record["format"] == "flexivit artifact 2"
  image = certificate.images(HW, 3)
  for size in sizes:
    want = certificate.logits(model, params, image, size)
    assert want.shape == (2, *HW, 3)
    np.testing.assert_allclose(loaded.predict(image, size), want, atol=2e-5)
    np.testing.assert_allclose(loaded.predict(image[:1], size), want[:1], atol=2e-5)


def test_the_command_writes_and_compares_it(tmp_path, capsys):
  model, params = make(decoder="linear")
  record = {"model": model_records.record_of(model), "class_names": ["a", "b", "c"]}
  weights.save_npz(tmp_path / "w.npz", model, params, record)
  given = ["export", str(tmp_path / "w.npz"), str(tmp_path / "s.zip"), "--seqhw=2"]
  assert cli.main([*given, "--image_size=16", "--platforms=cpu"]) == 0
  out = capsys.readouterr().out
  assert "largest difference of the pixels' logits" in out and "100.0000% of the classes" in out
  assert artifact.load_artifact(tmp_path / "s.zip").record["class_names"] == ["a", "b", "c"]
  assert (tmp_path / "s.certificate.json").stat().st_size < 10_000


def test_a_size_that_does_not_fit_the_image_is_refused(tmp_path):
  model, params = make(decoder="linear")
  with pytest.raises(errors.UserError, match="does not fit the image"):
    stablehlo.write(
      tmp_path / "s.zip", model, params, {}, image_hw=HW, sizes=(19,), platforms=("cpu",)
    )
