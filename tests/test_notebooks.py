"""Each notebook of notebooks/ runs from top to bottom, as a script, and shows what it asserts."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((REPOSITORY / "notebooks").glob("*.py"))


@pytest.mark.full
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_shows_what_it_says(notebook, tmp_path):
  """Under 60 s on two free cores; more is given where other work runs beside.

  Compiled as for a user: the flags of the tests suit programs that are run a few times.
  """
  done = subprocess.run(
    [sys.executable, notebook],
    cwd=tmp_path,
    env={name: value for name, value in os.environ.items() if name != "XLA_FLAGS"},
    capture_output=True,
    text=True,
    timeout=300,
    check=False,
  )
  assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
  assert not list(tmp_path.iterdir())  # it writes into folders of its own


def test_each_notebook_has_a_title_and_ends_with_an_assertion():
  assert len(NOTEBOOKS) == 6
  for notebook in NOTEBOOKS:
    text = notebook.read_text()
    assert text.startswith("# %% [markdown]\n# # "), notebook.name
    assert isinstance(ast.parse(text).body[-1], ast.Assert), notebook.name
