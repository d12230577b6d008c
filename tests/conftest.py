"""Makes JAX strict and tests repeatable: wrong shapes, silent broadcasts, warnings are errors."""

import getpass
import os
import tempfile
from pathlib import Path

# Set before JAX is imported, and in the environment, for the commands that tests start.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tests compile many small programs and run each a few times: unoptimized code halves the time, and a
# program is compiled once for all tests and the processes they start. In the machine's own temporary
# folder, never a shared one: compiled code fits one kind of processor.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault(
  "JAX_COMPILATION_CACHE_DIR",
  str(Path(tempfile.gettempdir()) / f"flexivit_jax-{getpass.getuser()}" / "compiled"),
)
os.environ.setdefault("MPLBACKEND", "agg")

import hypothesis
import jax
import jaxtyping
import pytest

# Checks every annotation in the package, which must not be imported before. An int may stand where
# a float is expected, as everywhere in Python.
jaxtyping.install_import_hook(
  "flexivit_jax", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"
)
jax.config.update("jax_numpy_rank_promotion", "raise")

# Derandomized: a change is judged on its own merits, not on the luck of a draw.
# `pytest --hypothesis-profile=wide` looks further.
hypothesis.settings.register_profile("fast", deadline=None, max_examples=25, derandomize=True)
hypothesis.settings.register_profile("wide", deadline=None, max_examples=1000)
hypothesis.settings.load_profile("fast")

REPOSITORY = Path(__file__).resolve().parent.parent
SHARED = REPOSITORY.parent / "shared"


def pytest_runtest_setup(item):
  if item.get_closest_marker("shared") and not SHARED.is_dir():
    pytest.skip(f"needs the folder {SHARED}")


@pytest.fixture
def shared() -> Path:
  """The folder ../shared: reference arrays and data that are not part of the repository."""
  if not SHARED.is_dir():
    pytest.skip(f"needs the folder {SHARED}")
  return SHARED


@pytest.fixture
def repository() -> Path:
  """The top level of the repository."""
  return REPOSITORY
