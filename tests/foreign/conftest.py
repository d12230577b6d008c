"""Tests in this folder run what we write in the frameworks that it is for: `make test-convert`."""

import importlib.util

import pytest

PACKAGES = ("torch", "torchvision", "timm", "transformers", "onnx", "onnxruntime", "tensorflow")


def pytest_collection_modifyitems(items):
  for item in items:
    if "foreign" in item.path.parts:
      item.add_marker(pytest.mark.convert)


def pytest_runtest_setup(item):
  missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
  if item.get_closest_marker("convert") and missing:
    pytest.skip(f"needs {', '.join(missing)}: make test-convert")
