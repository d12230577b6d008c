"""Intervals of rates against other programs' and their own definition."""

import numpy as np
import pytest
from scipy.stats import binom

from flexivit_jax.evaluators import intervals


@pytest.mark.parametrize(
  ("k", "n", "low", "high"),
  # R: prop.test(k, n, correct = FALSE)$conf.int
  [(8, 10, 0.4901625, 0.9433178), (0, 20, 0.0, 0.1611252), (20, 20, 0.8388748, 1.0)],
)
def test_wilson(k, n, low, high):
  assert intervals.wilson(k / n, n) == pytest.approx((low, high), abs=1e-6)


def test_wilson_ends_solve_the_score_equation():
  p, n, z = 0.3, 77, 1.959964
  for end in intervals.wilson(p, n):
    assert abs(p - end) == pytest.approx(z * (end * (1 - end) / n) ** 0.5, rel=1e-12)


@pytest.mark.parametrize("n", [1, 2, 7, 360, 50_000])
@pytest.mark.parametrize("p", [1e-4, 0.083, 0.5, 0.811, 0.9999])
def test_bootstrap_ends_are_the_quantiles_of_the_binomial(p, n):
  assert intervals.bootstrap(p, n) == tuple(binom.ppf([0.025, 0.975], n, p) / n)


def test_bootstrap_is_that_of_resampled_answers():
  right = np.arange(200) < 157
  rng = np.random.default_rng(0)
  means = right[rng.integers(200, size=(40_000, 200))].mean(axis=1)
  want = np.quantile(means, [0.025, 0.975])
  assert intervals.bootstrap(157 / 200, 200) == pytest.approx(want, abs=1 / 200 + 1e-12)


def test_where_all_are_alike_the_interval_still_has_a_width():
  assert intervals.bootstrap(1.0, 20) == intervals.wilson(1.0, 20)
  assert intervals.bootstrap(0.0, 20) == intervals.wilson(0.0, 20)
