"""Answers of the server are those of `predict` and `embed`, to the bit."""

import numpy as np
import pytest
from PIL import Image

from flexivit_jax import errors, weights
from flexivit_jax.data.inputs import Input
from flexivit_jax.inference import features, predictions, predictor
from flexivit_jax.models import FlexiViT
from flexivit_jax.weights.export import stablehlo

for package in ("httpx", "python_multipart", "starlette", "uvicorn"):
  pytest.importorskip(package)
served = pytest.importorskip("flexivit_jax.serving.served")

NAMES = ["cat", "dog", "Löwe"]


@pytest.fixture(scope="module")
def file(tmp_path_factory, random_params):
  """A small model for images of 24 pixels."""
  model = FlexiViT(
    num_classes=3, width=16, depth=1, mlp_dim=16, num_heads=2, patch_size=(8, 8), posemb_size=(3, 3),
    head_zeroinit=False,
  )  # fmt: skip
  record = {
    "model": {"num_classes": 3, "width": 16, "depth": 1, "mlp_dim": 16, "num_heads": 2,
              "patch_size": [8, 8], "posemb_size": [3, 3]},
    "source": {"file": "model.npz", "format": "ours"}, "image_size": [24, 24],
    "class_names": NAMES, "trained": {"seqhw": [2, 4]},
  }  # fmt: skip
  path = tmp_path_factory.mktemp("served") / "model.npz"
  weights.save_npz(path, model, random_params(model, (24, 24, 3)), record)
  return path


@pytest.fixture
def photos(tmp_path):
  """Files of several kinds, one of which EXIF data turn."""
  rng, paths = np.random.default_rng(0), []
  for i, kind in enumerate(["png", "jpg", "webp"]):
    exif = Image.Exif()
    exif[0x0112] = 6 if kind == "jpg" else 1
    paths.append(tmp_path / f"{i}.{kind}")
    Image.fromarray(rng.integers(0, 256, (20, 31, 3), np.uint8)).save(paths[-1], exif=exif)
  return paths


async def test_classes_and_features_have_the_bits_of_the_commands(file, photos, serving):
  loaded = predictor.load(file)
  inputs = [Input(str(path)) for path in photos]
  wanted = [rows[0].top for _, rows in predictions.predictions(loaded, inputs, [2], 3, 2)]
  vectors = [
    o.outputs[0] for o in predictor.outcomes(loaded, features.features, inputs, [2], batch_size=2)
  ]
  form = [("a", (path.name, path.read_bytes())) for path in photos]
  async with serving(served.load(file), batches=(2,)) as (server, client):
    assert server.policy.sizes == (2, 4)
    said = (await client.post("/predict?seqhw=2", files=form)).json()["images"]
    for row, top in zip(said, wanted, strict=True):
      assert row["batch"] == 2
      for one, (index, name, p) in zip(row["top"], top, strict=True):
        assert (one["class"], one["name"]) == (index, name)
        assert np.float32(one["probability"]) == np.float32(p)
    said = (await client.post("/embed?seqhw=2", files=form)).json()["images"]
    for row, vector in zip(said, vectors, strict=True):
      assert (np.float32(row["embedding"]) == vector).all()
    assert server.metrics.compilations_after_ready() == 0


async def test_an_artifact_is_served(file, photos, serving, tmp_path):
  model, params, record = weights.load_with_record(file)
  out = tmp_path / "model.zip"
  stablehlo.write(out, model, params, record, image_hw=(24, 24), sizes=[2, 4], platforms=["cpu"])
  wanted = predictions.predict([str(photos[1])], file, 4, batch_size=1)[0]
  async with serving(served.load(out), batches=(1,)) as (server, client):
    said = (await client.post("/predict?seqhw=4", content=photos[1].read_bytes())).json()
    assert (await client.post("/embed?seqhw=4", content=b"")).status_code == 404
    assert [row["class"] for row in said["top"]] == [index for index, _, _ in wanted.top]
    for row, (_, name, p) in zip(said["top"], wanted.top, strict=True):
      assert row["name"] == name and row["probability"] == pytest.approx(p, abs=1e-6)
    assert server.metrics.compilations_after_ready() == 0
  assert served.sizes(served.load(out), None) == (2, 4)
  with pytest.raises(errors.UserError, match="seqhw=3 is not in"):
    served.sizes(served.load(out), "3")
