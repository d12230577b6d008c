"""The wheel works in a bare environment, in another folder than the repository, on each Python of this machine."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).resolve().parent.parent
PYTHONS = ("3.11", "3.12", "3.13")


def interpreter(version: str) -> Path:
  """A Python of this version: of the path, or of pyenv; skips where there is none."""
  pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
  found = [shutil.which(f"python{version}"), *pyenv.glob(f"versions/{version}.*/bin/python")]
  for path in filter(None, found):
    if subprocess.run([path, "-c", ""], capture_output=True, check=False).returncode == 0:
      return Path(path)
  pytest.skip(f"there is no Python {version} here")


def run(*command: object, cwd: Path) -> str:
  """What a command prints, without our sources on its path; skips where pip reaches no index."""
  ours = ("PYTHONPATH", "VIRTUAL_ENV", "XLA_FLAGS", "JAX_")  # the tests' flags are for one jax
  env = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
  done = subprocess.run(
    [*map(str, command)], cwd=cwd, env=env, capture_output=True, text=True, timeout=300, check=False
  )
  lost = "retries exceeded|resolve host|name resolution|NewConnectionError"
  if "pip" in map(str, command) and done.returncode and re.search(lost, done.stderr):
    pytest.skip("no package index can be reached")
  assert done.returncode == 0, (command, done.stdout[-1000:], done.stderr[-3000:])
  return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
  """Built from a copy, so that nothing is left in the repository."""
  folder = tmp_path_factory.mktemp("wheel")
  for name in ("flexivit_jax", "configs"):
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(REPOSITORY / name, folder / "source" / name, ignore=ignored)
  for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
    shutil.copy(REPOSITORY / name, folder / "source")
  run(sys.executable, "-m", "venv", folder / "venv", cwd=folder)
  pip = [folder / "venv" / "bin" / "python", "-m", "pip", "wheel", "--no-deps", "-q", "-w", folder]
  run(*pip, folder / "source", cwd=folder)
  [built] = folder.glob("*.whl")
  return built


@pytest.mark.parametrize("version", PYTHONS)
def test_a_wheel_trains_predicts_inspects_and_shows(wheel, tmp_path, version):
  run(interpreter(version), "-m", "venv", tmp_path / "venv", cwd=tmp_path)
  python, flexivit = (tmp_path / "venv" / "bin" / name for name in ("python", "flexivit"))
  pip = [python, "-m", "pip", "install", "-q", "--no-compile", "--no-deps"]
  run(*pip, "-r", REPOSITORY / "requirements-core.txt", wheel, cwd=tmp_path)
  where = run(python, "-c", "import flexivit_jax; print(flexivit_jax.__file__)", cwd=tmp_path)
  assert str(tmp_path) in where

  noise = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
  Image.fromarray(noise).save(tmp_path / "photo.png")
  run(flexivit, "train", "--config", "configs/digits.py:debug", "--workdir", "run", cwd=tmp_path)
  predict = [flexivit, "predict", "photo.png", "--checkpoint", "run", "--seqhw", "2"]
  assert "photo.png" in run(*predict, cwd=tmp_path)
  assert "parameters" in run(flexivit, "inspect", "run", cwd=tmp_path)
  run(flexivit, "report", "run", cwd=tmp_path)
  run(
    flexivit,
    "demo",
    "run",
    "--static",
    "page",
    "--images",
    "photo.png",
    "--seqhw",
    "2",
    cwd=tmp_path,
  )
  assert "photo.png" in (tmp_path / "page" / "index.html").read_text()
