"""The stored class lists are those of the timm that is installed."""

import importlib.util
import pathlib
import subprocess
import sys

import pytest

pytestmark = pytest.mark.convert


def test_the_tool_makes_the_stored_lists_of_timms(repository, tmp_path):
  info = pathlib.Path(importlib.util.find_spec("timm").origin).parent / "data" / "_info"
  command = [
    sys.executable,
    repository / "tools" / "maintain" / "make_label_maps.py",
    "--timm",
    info,
  ]
  subprocess.run([*command, "--out", tmp_path], check=True, capture_output=True)
  made = {path.name: path.read_text() for path in tmp_path.iterdir()}
  stored = repository / "flexivit_jax" / "data" / "label_maps"
  assert made == {path.name: path.read_text() for path in stored.glob("*.txt")} and len(made) == 3
