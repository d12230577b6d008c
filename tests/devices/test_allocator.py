"""When the C library is told to keep memory, and when not."""

import subprocess
import sys

import pytest

from flexivit_jax.devices import allocator

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's settings")


def kept_in_a_process(**environment):
  code = (
    "from flexivit_jax.devices import allocator\n"
    "print(allocator.keep_memory(), 'jax' in __import__('sys').modules)"
  )
  run = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
  )
  return run.stdout.split()


def test_memory_is_kept_for_the_cpu(monkeypatch):
  monkeypatch.setattr(allocator, "_cores", lambda: 2)
  monkeypatch.setattr(allocator, "_mallopt", lambda: lambda parameter, value: 1)
  monkeypatch.setenv("JAX_PLATFORMS", "cpu")
  assert allocator.keep_memory()


@pytest.mark.parametrize(
  ("cores", "platforms", "plugin"), [(16, "cpu", False), (2, "cuda,cpu", False), (2, "", True)]
)
def test_not_on_many_cores_and_not_beside_an_accelerator(monkeypatch, cores, platforms, plugin):
  """One heap for the compiler's threads made compilation 7.5 times slower on 16 cores."""
  monkeypatch.setattr(allocator, "_cores", lambda: cores)
  monkeypatch.setattr(allocator.importlib.util, "find_spec", lambda name: plugin or None)
  monkeypatch.setattr(allocator, "_mallopt", lambda: pytest.fail("settings were made"))
  monkeypatch.setenv("JAX_PLATFORMS", platforms)
  assert not allocator.keep_memory()


def test_without_glibc_nothing_happens(monkeypatch):
  monkeypatch.setattr(allocator, "_cores", lambda: 2)
  monkeypatch.setattr(allocator, "_mallopt", lambda: None)
  assert not allocator.keep_memory()


def test_the_decision_imports_nothing_heavy():
  assert kept_in_a_process(JAX_PLATFORMS="cpu")[1] == "False"
