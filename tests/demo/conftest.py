"""A small model, the server of its page, and the page in headless Chromium."""

import contextlib
import subprocess
import sys
import time
import urllib.request

import numpy as np
import pytest
from PIL import Image

from flexivit_jax.inference import predictions

SIZES = (2, 3, 4, 6)
LONG, FROM_THE_RIGHT = "a name that has 30 characters.", "כלב גדול"
NAMES = ["cat", "dog", "Löwe", "<b>bold</b>", "a, b", LONG, FROM_THE_RIGHT]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, save_small):
  """Holds model.npz, with names of all kinds, and photo.png."""
  folder = tmp_path_factory.mktemp("browser")
  save_small(folder, NAMES, SIZES, width=32, depth=2)
  rng = np.random.default_rng(0)
  Image.fromarray(rng.integers(0, 256, (40, 52, 3), np.uint8)).save(folder / "photo.png")
  return folder


@contextlib.contextmanager
def _opened(browser, url, *, offline=False, **options):
  context = browser.new_context(bypass_csp=True, **options)  # waiting for a condition needs eval

  def own_alone(route):
    known = route.request.url.startswith((url, "data:", "blob:"))
    route.continue_() if known else route.abort()

  context.route("**", own_alone)
  context.set_offline(offline)
  page, said = context.new_page(), []
  page.on("console", lambda message: said.append(message.text))
  page.on("pageerror", lambda error: said.append(str(error)))
  page.goto(url)
  yield page, said
  context.close()


@pytest.fixture(scope="session")
def opened():
  """Opens a page that may reach its own address alone: (browser, url) -> the page, and what it says to the console."""
  return _opened


def _wait_for(what, seconds=10.0):
  end = time.monotonic() + seconds
  while not what():
    assert time.monotonic() < end, f"not within {seconds} s"
    time.sleep(0.02)


@pytest.fixture(scope="session")
def wait_for():
  """Waits until a function gives true: (what, seconds=10)."""
  return _wait_for


@contextlib.contextmanager
def _serving(folder, port=0):
  command = [sys.executable, "-m", "flexivit_jax", "serve", str(folder / "model.npz"), "--demo"]
  process = subprocess.Popen(
    [*command, f"--port={port}", "--batches=1"], stdout=subprocess.PIPE, text=True
  )
  try:
    url = process.stdout.readline().split()[-1] + "/"
    for _ in range(600):
      with contextlib.suppress(OSError):
        if urllib.request.urlopen(url + "ready").status == 200:
          break
      time.sleep(0.1)
    yield url, process
  finally:
    process.terminate()
    process.wait(30)
    process.stdout.close()


@pytest.fixture(scope="session")
def serving():
  """Serves FOLDER/model.npz with the page, until the end of the block: (folder, port=0) -> its address, its process."""
  return _serving


@pytest.fixture(scope="module")
def server(folder):
  """The address of a server of the model."""
  with _serving(folder) as (url, process):
    yield url
  assert process.returncode == 0


@pytest.fixture(scope="session")
def top_of():
  """The classes and percentages that a page shows."""

  def read(page):  # at once: between two questions the page may change
    rows = page.locator("#top li").all_inner_texts()
    return [tuple(row.strip().rsplit("\n", 1)) for row in rows]

  return read


@pytest.fixture(scope="session")
def expected():
  """What `predict` says, as the page writes it: (model, photos, size) -> five classes of each photo."""

  def predicted(model, photos, size):
    rows = predictions.predict(photos, model, size, batch_size=1)
    return [
      [(name or f"class {index}", f"{100 * p:.1f} %") for index, name, p in row.top] for row in rows
    ]

  return predicted


BACKBONE = dict(patch_size=(8, 8), posemb_size=(3, 3), width=8, depth=1, mlp_dim=8, num_heads=1)


@pytest.fixture(scope="session")
def save_kind():
  """Saves a small model of "masks" or "boxes" for images of 24 pixels: (folder, kind) -> the file."""
  import jax

  from flexivit_jax import weights
  from flexivit_jax.models import OwlViT, Segmenter
  from flexivit_jax.weights import model_records

  def save(folder, kind):
    fields = dict(num_classes=3, backbone=BACKBONE)
    model = (
      Segmenter(**fields, decoder="linear") if kind == "masks" else OwlViT(**fields, embed_dim=8)
    )
    inputs = (np.zeros((1, 24, 24, 3), np.float32),) + (() if kind == "masks" else (None,))
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), *inputs, seqhw=3))["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda s: rng.normal(0, 0.6, s.shape).astype(np.float32), shapes)
    if kind == "boxes":  # each box is its patch
      params["box_2"] = jax.tree.map(np.zeros_like, params["box_2"])
    pp = {
      "masks": "decode|resize_small(24)|value_range(-1, 1)",
      "boxes": "decode|resize_keep(24, 'contain')|value_range(-1, 1)|pad(24, fill=0)",
    }
    record = {
      "model": model_records.record_of(model), "class_names": NAMES[1:4], "pp": pp[kind],
      "source": {"file": f"{kind}.npz", "format": "ours"}, "trained": {"seqhw": [3, 6]},
      "image_shape": [24, 36, 3] if kind == "masks" else [24, 24, 3],
    }  # fmt: skip
    weights.save_npz(folder / f"{kind}.npz", model, params, record)
    return folder / f"{kind}.npz"

  return save
