"""A server without a socket, of a model that is a function of NumPy."""

import asyncio
import contextlib
import inspect
import io
import threading

import numpy as np
import pytest
from PIL import Image

from flexivit_jax.budget.profile import Profile, Row
from flexivit_jax.inference import predictor

# What may not be installed is imported where it is used, and the files of tests are skipped without it.

HW = 12
SIZES = (2, 4)


class Model:
  """Three classes: the mean of each channel. Batches begin only while `open` is set, and are kept in `ran`."""

  def __init__(self):
    self.open, self.ran, self.broken = threading.Event(), [], None
    self.open.set()

  def program(self, what, size, batch):
    def run(images):
      self.open.wait(10)
      self.ran.append((what, size, batch))
      if isinstance(self.broken, Exception):
        raise self.broken
      assert images.shape == (batch, HW, HW, 3)
      output = images.mean(axis=(1, 2)).astype(np.float32) + 0.1 * size
      return output * np.float32(np.nan) if self.broken else output

    return run

  def served(self):
    from flexivit_jax.serving.served import Served

    return Served(
      name="model.npz",
      prepare=predictor.preparer(f"decode|resize({HW})|value_range(0, 1)", 3),
      shape=(HW, HW, 3),
      sizes=SIZES,
      what=("predict", "embed"),
      classes=["red", "green", "blue"],
      program=self.program,
    )


@pytest.fixture
def model():
  made = Model()
  yield made
  made.open.set()


def profile(sizes=SIZES, batches=(1, 4)):
  """The finer, the better and the slower."""
  rows = [
    Row(size, n, ms=n * size, ms_p90=n * size, gflops=size / 10, value=0.5 + size / 20,
        low=0.49 + size / 20, high=0.51 + size / 20, n=1000)
    for size in sizes for n in batches
  ]  # fmt: skip
  metric = {"name": "top1", "better": "max", "unit": "%"}
  return Profile("0" * 64, "a device", metric, {}, (HW, HW, 3), {}, 1.0, tuple(rows))


@contextlib.asynccontextmanager
async def running(
  model,
  *,
  floor=None,
  target=1.0,
  with_profile=False,
  limits=None,
  ready=True,
  cascade=None,
  **settings,
):
  """Yields (server, client) of a model; it has compiled everything if `ready`."""
  import httpx

  from flexivit_jax.serving.app import Server, Settings
  from flexivit_jax.serving.choice import Policy
  from flexivit_jax.serving.limits import Limits

  policy = Policy(SIZES, profile() if with_profile else None, floor, target)
  settings = {"max_wait_s": 0.0, "limits": Limits(**limits or {}), **settings}
  served = model.served() if isinstance(model, Model) else model
  server = Server(served, policy, Settings(**settings), cascade)
  transport = httpx.ASGITransport(server.app, raise_app_exceptions=False)
  async with (
    server.app.router.lifespan_context(server.app),
    httpx.AsyncClient(transport=transport, base_url="http://server") as client,
  ):
    if ready:
      await asyncio.wait_for(server.engine.ready.wait(), 20)
    yield server, client


@pytest.fixture(scope="session")
def serving():
  return running


def png(colour=(255, 0, 0), hw=(20, 30), kind="PNG", **options):
  buffer = io.BytesIO()
  Image.new("RGB", hw[::-1], colour).save(buffer, kind, **options)
  return buffer.getvalue()


@pytest.fixture(scope="session")
def red():
  return png()


@pytest.fixture(scope="session")
def encoded():
  return png


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
  """Runs the tests of this folder that are coroutines."""
  if not inspect.iscoroutinefunction(pyfuncitem.obj):
    return None
  names = inspect.signature(pyfuncitem.obj).parameters
  arguments = {name: pyfuncitem.funcargs[name] for name in names}
  asyncio.run(asyncio.wait_for(pyfuncitem.obj(**arguments), 30))
  return True


@pytest.fixture(scope="session")
def file(tmp_path_factory, random_params):
  """A small model for images of 24 pixels."""
  from flexivit_jax import weights
  from flexivit_jax.models import FlexiViT

  model = FlexiViT(
    num_classes=3, width=16, depth=1, mlp_dim=16, num_heads=2, patch_size=(8, 8), posemb_size=(3, 3),
    head_zeroinit=False,
  )  # fmt: skip
  record = {
    "model": {"num_classes": 3, "width": 16, "depth": 1, "mlp_dim": 16, "num_heads": 2,
              "patch_size": [8, 8], "posemb_size": [3, 3]},
    "source": {"file": "model.npz", "format": "ours"}, "image_size": [24, 24],
    "class_names": ["cat", "dog", "Löwe"], "trained": {"seqhw": [2, 4]},
  }  # fmt: skip
  path = tmp_path_factory.mktemp("served") / "model.npz"
  weights.save_npz(path, model, random_params(model, (24, 24, 3)), record)
  return path
