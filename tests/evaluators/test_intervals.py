"""Intervals of rates against another program's and their own definition; a report needs no JAX."""

import statistics
import subprocess
import sys

import numpy as np
import pytest
import scipy.special

from flexivit_jax.evaluators import intervals


@pytest.mark.parametrize(
  ("k", "n", "low", "high"),
  # R: prop.test(k, n, correct = FALSE)$conf.int
  [(8, 10, 0.4901625, 0.9433178), (0, 20, 0.0, 0.1611252), (20, 20, 0.8388748, 1.0)],
)
def test_wilson(k, n, low, high):
  assert intervals.wilson(k, n) == pytest.approx((low, high), abs=1e-6)


def test_wilson_ends_solve_the_score_equation():
  k, n, z = 23, 77, statistics.NormalDist().inv_cdf(0.975)
  p = k / n
  for end in intervals.wilson(k, n):
    assert abs(p - end) == pytest.approx(z * (end * (1 - end) / n) ** 0.5, rel=1e-12)


@pytest.mark.parametrize("n", [1, 2, 7, 360, 50_000])
@pytest.mark.parametrize("p", [1e-4, 0.083, 0.5, 0.811, 0.9999])
def test_bootstrap_ends_are_the_quantiles_of_the_binomial(p, n):
  hits = np.arange(n + 1)
  choose = scipy.special.gammaln(n + 1) - scipy.special.gammaln([hits + 1, n - hits + 1]).sum(0)
  probability = np.exp(choose + hits * np.log(p) + (n - hits) * np.log1p(-p))
  want = np.searchsorted(probability.cumsum(), [0.025, 0.975]) / n
  assert intervals.binomial(p, n) == tuple(want)


def test_bootstrap_is_that_of_resampled_answers():
  right = np.arange(200) < 157
  rng = np.random.default_rng(0)
  means = right[rng.integers(200, size=(40_000, 200))].mean(axis=1)
  want = np.quantile(means, [0.025, 0.975])
  assert intervals.binomial(157 / 200, 200) == pytest.approx(want, abs=1 / 200 + 1e-12)


def test_where_all_are_alike_the_interval_still_has_a_width():
  assert intervals.binomial(1.0, 20) == intervals.wilson(20, 20)
  assert intervals.binomial(0.0, 20) == intervals.wilson(0, 20)


def test_reading_results_and_intervals_imports_no_jax():
  """`flexivit report` and `--help` start without JAX, and without SciPy until an interval is asked for."""
  code = (
    "import sys, flexivit_jax.report.tables; print({'jax', 'scipy.stats'} & sys.modules.keys())"
  )
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
  assert done.stdout.strip() == "set()"


def test_of_a_0_1_metric_the_bootstrap_is_the_binomial_interval():
  right = np.arange(300) < 235
  found = intervals.bootstrap(lambda drawn: (drawn @ right / 300)[:, None], 300, resamples=4000)
  assert found[:, 0] == pytest.approx(intervals.binomial(235 / 300, 300), abs=2 / 300)


def test_of_a_mean_the_bootstrap_is_close_to_the_normal_interval_and_repeats_itself(monkeypatch):
  values = np.random.default_rng(0).normal(3.0, 2.0, 400)

  def mean(drawn):
    assert (drawn.sum(axis=1) == 400).all()
    return np.stack([drawn @ values / 400, drawn @ -values / 400], axis=1)

  found = intervals.bootstrap(mean, 400)
  margin = 1.96 * values.std() / 400**0.5
  want = values.mean() - margin, values.mean() + margin
  assert found[:, 0] == pytest.approx(want, abs=0.1 * margin)
  assert found[:, 1].tolist() == [-found[1, 0], -found[0, 0]]
  assert (found == intervals.bootstrap(mean, 400)).all()
  assert (found != intervals.bootstrap(mean, 400, seed=1)).all()
