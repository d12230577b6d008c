"""`tools/bench/browser.py`: its table, and what it says without the package."""

import argparse
import runpy

import pytest

from flexivit_jax import errors


@pytest.fixture
def tool(repository):
  return runpy.run_path(str(repository / "tools" / "bench" / "browser.py"))


def test_a_row_has_the_median_and_the_90th_percentile_of_its_answers(tool):
  row = tool["row"]("server", 16, 225, [float(one) for one in range(1, 12)], mb="3.0")
  assert tuple(row) == tool["COLUMNS"]
  assert row == {
    "way": "server", "patch": 16, "tokens": 225, "median_ms": "6.0", "p90_ms": "10.0",
    "largest_difference": "", "load_ms": "", "mb": "3.0",
  }  # fmt: skip


def test_a_folder_that_is_not_the_package_is_an_error(tool, tmp_path):
  args = argparse.Namespace(package=tmp_path)
  with pytest.raises(errors.UserError, match=r"has no ort\.wasm\.min\.mjs; expected the package"):
    tool["measure"](args)
