"""Intervals of rates against other programs' and their own definition."""

import pytest

from flexivit_jax import intervals


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
