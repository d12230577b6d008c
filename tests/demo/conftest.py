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
  url = process.stdout.readline().split()[-1] + "/"
  for _ in range(600):
    with contextlib.suppress(OSError):
      if urllib.request.urlopen(url + "ready").status == 200:
        break
    time.sleep(0.1)
  yield url, process
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
