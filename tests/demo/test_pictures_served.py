"""Masks and boxes of a server are those of predict, whatever the photo's own size is."""

import base64
import io
import json
import time

import numpy as np
import pytest
from PIL import Image

from flexivit_jax import errors
from flexivit_jax.data.inputs import Input
from flexivit_jax.inference import boxes, masks, predictor, programs

pytestmark = pytest.mark.full
testclient = pytest.importorskip("starlette.testclient")
pytest.importorskip("httpx")
live = pytest.importorskip("flexivit_jax.demo.live")
app = pytest.importorskip("flexivit_jax.serving.app")
choice = pytest.importorskip("flexivit_jax.serving.choice")
served = pytest.importorskip("flexivit_jax.serving.served")


def photo(path, hw, turned=1):
  """A photo of smooth noise, which EXIF data turn."""
  low = np.random.default_rng(0).integers(0, 256, (4, 4, 3), np.uint8)
  exif = Image.Exif()
  exif[0x0112] = turned
  Image.fromarray(low).resize(hw[::-1], Image.Resampling.BICUBIC).save(path, exif=exif)
  return path


@pytest.fixture(scope="module", params=["masks", "boxes"])
def running(request, tmp_path_factory, save_kind):
  """(kind, file of the model, a client of its server, the content of its page)."""
  file = save_kind(tmp_path_factory.mktemp("served"), request.param)
  model = served.load(file)
  policy = choice.Policy((3, 6), None, None, 1.0)
  model, settings = live.with_page(model, policy, app.Settings(batches=(1,), max_wait_s=0.0))
  with testclient.TestClient(app.Server(model, policy, settings).app) as client:
    for _ in range(600):
      if client.get("/ready").status_code == 200:
        break
      time.sleep(0.05)
    yield request.param, file, client


@pytest.mark.parametrize("size", [3, 6])
def test_answers_are_those_of_predict(running, tmp_path, size):
  kind, file, client = running
  paths = [photo(tmp_path / "a.png", (32, 48)), photo(tmp_path / "b.jpg", (60, 40), turned=6)]
  module = masks if kind == "masks" else boxes
  loaded = predictor.load(file, whole=True)
  wanted = [
    rows[0]
    for _, rows in module.answers(loaded, [Input(str(p)) for p in paths], [size], batch_size=1)
  ]
  for path, want in zip(paths, wanted, strict=True):
    said = client.post(f"/predict?seqhw={size}", content=path.read_bytes()).json()
    if kind == "masks":
      assert said["classes"] == json.loads(masks.as_json(want, masks.Targets({}, {})))["classes"]
      drawn = np.asarray(Image.open(io.BytesIO(base64.b64decode(said["mask"]))))
      np.testing.assert_array_equal(drawn, want.mask)
      assert said["hw"] == [*want.mask.shape]
    else:
      found = [{k: v for k, v in one.items() if k != "colour"} for one in said["detections"]]
      assert found == json.loads(boxes.as_json(want, {}))["detections"] != []
      assert said["hw"] == [*want.hw]
  form = [("a", (path.name, path.read_bytes())) for path in paths]
  several = client.post(f"/predict?seqhw={size}", files=form).json()["images"]
  assert [one["hw"] for one in several] == [[32, 48], [40, 60]]


def test_what_is_of_classes_is_refused_and_other_proportions_are_said(running, tmp_path):
  kind, _, client = running
  content = photo(tmp_path / "a.png", (32, 48)).read_bytes()
  for query in ("top_k=3", "names=a,b", "cascade=1"):
    said = client.post(f"/predict?{query}", content=content)
    assert said.status_code == 400 and "Unknown key of the query" in said.json()["error"]
  square = client.post("/predict?seqhw=3", content=photo(tmp_path / "s.png", (40, 40)).read_bytes())
  assert square.status_code == (400 if kind == "masks" else 200)
  if kind == "masks":
    said = square.json()["error"]
    assert "is 24 x 24 pixels as the model sees it; this server takes 24 x 36" in said
  assert client.post("/embed", content=content).status_code == 404


def test_the_page_is_of_its_kind(running):
  kind, _, client = running
  assert f'"kind": "{kind}"' in client.get("/").text
  assert client.post("/relevance", content=b"").status_code == 404


def test_other_ways_and_names_are_refused(running):
  _, file, _ = running
  with pytest.raises(errors.UserError, match="leave --way out"):
    served.load(file, way=programs.Way("jax", "bfloat16"))
  with pytest.raises(errors.UserError, match="names"):
    served.load(file, names=["a"])
