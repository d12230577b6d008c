"""A framework that is installed and cannot be imported is one line with its cause, in whatever way it fails."""

import sys

import pytest

from flexivit_jax.errors import UserError
from flexivit_jax.weights import optional

FAILURES = {
  "RuntimeError('operator torchvision::nms does not exist')": "RuntimeError: operator torchvision::nms does not exist",
  "OSError('libcudart.so.13: cannot open shared object file')": "OSError: libcudart.so.13",
  "ImportError('cannot import name x\\nand more lines')": "ImportError: cannot import name x",
  "AttributeError()": "AttributeError: AttributeError",
  "ModuleNotFoundError(\"No module named 'sympy'\", name='sympy')": "No module named 'sympy'",
}


@pytest.fixture
def package(tmp_path, monkeypatch):
  """Makes a package of a name whose import runs a line."""
  monkeypatch.syspath_prepend(str(tmp_path))

  def make(name: str, line: str) -> None:
    (tmp_path / f"{name}.py").write_text(line + "\n")
    monkeypatch.delitem(sys.modules, name, raising=False)

  return make


@pytest.mark.parametrize("raised", FAILURES)
def test_a_framework_that_fails_to_import_is_one_line_with_the_cause(package, raised):
  package("broken_framework", f"raise {raised}")
  with pytest.raises(UserError) as error:
    optional.require("broken_framework", "Writing x")
  assert FAILURES[raised] in str(error.value)
  assert "\n" not in str(error.value)
  assert "requirements-convert.txt" in str(error.value)


def test_a_companion_of_another_build_is_found_before_a_conversion_is_half_done(
  package, monkeypatch
):
  package("image_library", "raise RuntimeError('operator x does not exist')")
  package("late_importer", "")
  monkeypatch.setitem(
    optional._COMPANIONS, "late_importer", ("image_library", "not_installed_at_all")
  )
  with pytest.raises(UserError, match=r"late_importer.*operator x does not exist"):
    optional.require("late_importer", "Writing x")


def test_a_package_that_is_not_installed_says_so():
  with pytest.raises(UserError, match="not_installed_at_all, which is not installed"):
    optional.require("not_installed_at_all", "Writing x")
