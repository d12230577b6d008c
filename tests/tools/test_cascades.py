"""`tools/bench/cascades.py`: settings, means over seeds, and violations of the guarantee."""

import runpy

import numpy as np
import pytest

from flexivit_jax.analyses import cascading


@pytest.fixture(scope="module")
def tool(request):
  repository = request.path.parents[2]
  return runpy.run_path(str(repository / "tools" / "bench" / "cascades.py"))


def scored(n=800):
  rng = np.random.default_rng(0)
  labels, ease = rng.integers(4, size=n), rng.gamma(1.5, 1.0, size=n)
  scores = []
  for skill in (1.0, 2.0, 3.0):
    found = rng.normal(size=(n, 4))
    found[np.arange(n), labels] += skill * ease
    scores.append(found)
  gflops = (1.0, 3.0, 9.0)
  return cascading.Scored((2, 4, 8), tuple(scores), labels, gflops, gflops, (24, 24, 3), 4)


def test_violations_are_counted_over_draws_of_known_risk(tool):
  setting = tool["setting"]("lost:margin:.05")
  assert setting.name == "margin lost 5 %"
  row = tool["guarantee"](scored(), setting, 0.1, 5)
  assert (row["draws"], row["n"], row["delta"]) == (5, 400, 10)
  assert row["violations"] <= row["most"]


def test_a_risk_above_alpha_is_a_violation(tool):
  found = scored()
  made = cascading.fit(found, alpha=0.05, risk="lost")
  assert not tool["exceeds"](made, found)
  assert tool["exceeds"](made._replace(thresholds=(0.0,) * len(made.thresholds)), found)


def test_the_seeds_of_a_way_become_one_row(tool):
  numbers = dict(top1=50.0, ms=1.0, compute=60.0, lost=1.0, n=10)
  rows = [
    {"way": "a", "stages": stages, "below": below, "time": 70.0, "seed": seed, **numbers}
    for seed, (stages, below) in enumerate([("2>8", 0.2), ("4>8", 0.4)])
  ]
  (row,) = tool["summary"]("m", rows)
  assert (row["below"], row["below_low"], row["below_high"]) == ("0.30", "0.20", "0.40")
  assert row["stages"] == "2>8 or 4>8" and row["seeds"] == 2
