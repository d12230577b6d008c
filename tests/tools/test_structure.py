"""`tools/maintain/structure.py` counts what a small package is known to have."""

import runpy

import pytest

from flexivit_jax import errors

FILES = {
  "__init__.py": "",
  "train.py": "from typing import Any\nfrom flexivit_jax import data, resize\nx: Any = data.stream\n",
  "resize.py": "def f():\n  from flexivit_jax.data.stream import g\n\n  return g\n",
  "data/__init__.py": "from flexivit_jax.data.stream import g\n",
  "data/stream.py": "import flexivit_jax.errors\nimport numpy as np\n\n\ndef g(): ...\n",
  "errors.py": "import flexivit_jax.data.stream\n",
}


@pytest.fixture
def tool(repository):
  return runpy.run_path(str(repository / "tools" / "maintain" / "structure.py"))


def test_a_small_package_is_counted(tool, tmp_path):
  for name, text in FILES.items():
    (tmp_path / "flexivit_jax" / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "flexivit_jax" / name).write_text(text)
  assert tool["measure"](tmp_path) == {
    "modules at the top of the package": "4",
    "rooms (folders there)": "1",
    # train -> data, resize; resize -> data; data <-> errors
    "imports between these": "5",
    "of these, part of a circle": "2",
    "lines of the package": "14",
    "lines of train.py": "3",
    "modules of ours that train.py imports": "2",
    "longest function": "4 lines (resize.f)",
    "functions of more than 80 lines": "0",
    "`Any`": "2",
  }


def test_a_folder_without_the_package_is_refused(tool, tmp_path):
  with pytest.raises(errors.UserError, match="has no modules"):
    tool["measure"](tmp_path)
