"""Answers of the server are those of `predict` and `embed`, to the bit."""

import numpy as np
import pytest
from PIL import Image

from flexivit_jax import errors, weights
from flexivit_jax.budget import cascade
from flexivit_jax.data.inputs import Input
from flexivit_jax.inference import cascades, features, predictions, predictor, programs, texts
from flexivit_jax.weights.export import stablehlo

for package in ("httpx", "python_multipart", "starlette", "uvicorn"):
  pytest.importorskip(package)
served = pytest.importorskip("flexivit_jax.serving.served")
cascading = pytest.importorskip("flexivit_jax.serving.cascading")


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


def a_cascade(of, **fields):
  plain = cascade.Cascade(
    sizes=(2, 4), thresholds=(0.5,), temperatures=(1.0, 1.0), signal="confidence", alpha=0.1,
    delta=0.1, costs=(1.0, 2.0), unit="ms", expected_cost=1.5, shares=(0.5, 0.5), lost=0.0,
    value=0.5, finest_value=0.5, n=10, seed=0, classes=3, weights=of.weights,
  )  # fmt: skip
  return plain._replace(**fields)


async def test_a_cascade_has_the_bits_of_predict(file, photos, serving):
  loaded, model = predictor.load(file), served.load(file)
  inputs = [Input(str(path)) for path in photos]
  plain = [rows[0].top[0][2] for _, rows in predictions.predictions(loaded, inputs, [2], 1, 4)]
  between = a_cascade(model, thresholds=(float(np.median(plain)),))  # some stop, some go on
  wanted = [rows[0] for _, rows in cascades.answers(loaded, between, inputs, 3, 4)]
  assert {row.seqhw for row in wanted} == {2, 4}
  form = [("a", (path.name, path.read_bytes())) for path in photos]
  async with serving(model, batches=(4,), cascade=between, what=("predict",)) as (_, client):
    said = (await client.post("/predict?cascade=1", files=form)).json()["images"]
  for row, one in zip(said, wanted, strict=True):
    assert row["seqhw"] == one.seqhw
    assert [np.float32(c["probability"]) for c in row["top"]] == [p for _, _, p in one.top]


def test_a_cascade_of_other_weights_or_images_is_refused(file):
  model = served.load(file)
  with pytest.raises(errors.UserError, match="other weights"):
    cascading.check(a_cascade(model, weights="f" * 64), model.weights, model.shape)
  with pytest.raises(errors.UserError, match="on images of"):
    cascading.check(a_cascade(model, data={"image": [9, 9, 3]}), model.weights, model.shape)


@pytest.mark.parametrize("bias", [-1.0, None])
async def test_names_are_classes_of_two_towers(save_towers, photos, serving, bias):
  path, names = save_towers(bias), ["cat", "a red car", "dog"]
  loaded = predictor.load(path, texts=True)
  among = texts.of_names(loaded, names)
  inputs = [Input(str(photos[0]))]
  [(_, [wanted])] = predictions.predictions(loaded, inputs, [2], 3, 1, among=among)
  body = photos[0].read_bytes()
  async with serving(served.load(path), batches=(1,), what=("predict",)) as (server, client):
    said = (await client.post("/predict?seqhw=2&names=cat,a%20red%20car,dog", content=body)).json()
    for row, (index, name, p) in zip(said["top"], wanted.top, strict=True):
      assert (row["class"], row["name"]) == (index, name)
      assert row["probability"] == pytest.approx(p, abs=1e-5)
    for query in ("", "&names=", "&names=cat,cat", "&names=cat&templates=/etc/passwd"):
      refused = await client.post(f"/predict?seqhw=2{query}", content=body)
      assert refused.status_code == 400, query
    many = "&names=" + ",".join(str(i) for i in range(40)) + "&templates=clip_best"
    assert (await client.post(f"/predict?seqhw=2{many}", content=body)).status_code == 200
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
  with pytest.raises(errors.UserError, match="leave --way and --names out"):
    served.load(out, way=programs.Way("onnx"))
  with pytest.raises(errors.UserError, match="leave --way and --names out"):
    served.load(out, names=["cat"])
  with pytest.raises(errors.UserError, match="seqhw=3 is not in"):
    served.sizes(served.load(out), "3")
