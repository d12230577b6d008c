"""A SavedModel gives the model's logits in TensorFlow at each of its sizes, wherever it lies."""

import json

import jax
import numpy as np
import pytest

from flexivit_jax import cli, weights
from flexivit_jax.errors import UserError
from flexivit_jax.models import FlexiViT
from flexivit_jax.weights import certificate
from flexivit_jax.weights.export import comparison, saved_model

FIELDS = dict(
  num_classes=5, patch_size=(6, 6), posemb_size=(3, 3), width=16, depth=2, mlp_dim=24, num_heads=4
)


def made(**fields):
  model = FlexiViT(**FIELDS | fields)
  image = jax.ShapeDtypeStruct((1, 24, 24, 3), np.float32)
  shapes = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, seqhw=1), image)["params"]
  rng = np.random.default_rng(0)
  return model, jax.tree.map(lambda s: rng.normal(size=s.shape).astype(np.float32) * 0.3, shapes)


@pytest.mark.parametrize(
  "fields", [{}, dict(pool_type="map", posemb="sincos2d"), dict(pool_type="tok+gap", scan=True)]
)
def test_logits_are_the_models_at_each_size_and_batch(tmp_path, fields):
  model, params = made(**fields)
  saved_model.write(tmp_path / "a", model, params, {}, image_hw=(24, 24), sizes=(2, 4, 8))
  (tmp_path / "a").rename(tmp_path / "elsewhere")
  loaded = saved_model.load(tmp_path / "elsewhere")
  for n in (1, 5):
    image = np.random.default_rng(n).uniform(-1, 1, (n, 24, 24, 3)).astype(np.float32)
    for size in (2, 4, 8):
      want = certificate.logits(model, params, image, size)
      got = loaded.predict(image, size)
      np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * max(1, np.abs(want).max()))


def test_weights_are_there_once(tmp_path):
  model, params = made(width=64, mlp_dim=256)
  sizes = []
  for name, chosen in (("one", (4,)), ("three", (2, 4, 8))):
    saved_model.write(tmp_path / name, model, params, {}, image_hw=(24, 24), sizes=chosen)
    sizes.append((tmp_path / name / "variables" / "variables.data-00000-of-00001").stat().st_size)
  shared = sum(a.nbytes for a in jax.tree.leaves(params["Transformer"]))
  assert sizes[1] - sizes[0] < 0.5 * shared


def test_the_command_writes_and_compares_it(tmp_path, capsys):
  model, params = made()
  weights.save_npz(tmp_path / "w.npz", model, params, {"model": FIELDS})
  given = [str(tmp_path / "w.npz"), str(tmp_path / "out"), "--image_size=24", "--seqhw=2,8"]
  assert cli.main(["export", *given, "--to=saved_model"]) == 0
  rows = json.loads((tmp_path / "out.certificate.json").read_text())["rows"]
  assert [row["seqhw"] for row in rows] == [2, 8]
  assert all(row["largest_difference"] < 1e-4 for row in rows)
  with pytest.raises(UserError, match="is there already"):
    saved_model.write(tmp_path / "out", model, params, {}, image_hw=(24, 24), sizes=(2,))
  assert "saved_model" in comparison.WRITERS and "wrote" in capsys.readouterr().out


def test_a_changed_file_is_found_before_tensorflow_reads_it(tmp_path):
  model, params = made()
  saved_model.write(tmp_path / "out", model, params, {}, image_hw=(24, 24), sizes=(2,))
  file = tmp_path / "out" / "variables" / "variables.data-00000-of-00001"
  content = bytearray(file.read_bytes())
  content[100] ^= 1
  file.write_bytes(content)
  with pytest.raises(UserError, match=r"variables\.data-00000-of-00001 has other bytes"):
    saved_model.load(tmp_path / "out")
  (tmp_path / "out" / "record.json").unlink()
  (tmp_path / "out" / "flexivit_manifest.txt").unlink()
  with pytest.raises(UserError, match="is no export of ours"):
    saved_model.load(tmp_path / "out")
