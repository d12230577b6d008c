"""Tests in this folder run what we write in the frameworks that it is for: `make test-convert`."""

import contextlib
import importlib.util

import pytest

PACKAGES = ("torch", "timm", "transformers", "onnx", "onnxruntime", "tensorflow")


def pytest_collection_modifyitems(items):
  for item in items:
    if "foreign" in item.path.parts:
      item.add_marker(pytest.mark.convert)


def pytest_runtest_setup(item):
  missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
  if item.get_closest_marker("convert") and missing:
    pytest.skip(f"needs {', '.join(missing)}: make test-convert")


@pytest.fixture(scope="session", autouse=True)
def torchvision():
  """timm imports torchvision, which cannot be imported beside a torch built without CUDA unless these two are known."""
  with contextlib.suppress(ImportError):
    import torch

    try:
      import torchvision
    except RuntimeError:
      library = torch.library.Library("torchvision", "DEF")
      for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
      import torchvision  # noqa: F401

      yield
      return
  yield
