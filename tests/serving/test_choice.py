"""Which size a request gets: rules that hold for every profile, load and deadline."""

import math

import pytest
from hypothesis import assume, given, strategies as st

from flexivit_jax import errors
from flexivit_jax.budget.choose import Budget
from flexivit_jax.budget.profile import Profile, Row
from flexivit_jax.serving import choice
from flexivit_jax.serving.choice import Policy
from flexivit_jax.serving.times import Times

SIZES = (2, 4, 8)


def profile(values, batches=(1, 4), half=0.01):
  rows = [
    Row(size, n, ms=n * size, ms_p90=1.2 * n * size, gflops=size / 10, value=value,
        low=value - half, high=value + half, n=1000)
    for size, value in zip(SIZES, values, strict=True) for n in batches
  ]  # fmt: skip
  metric = {"name": "top1", "better": "max", "unit": "%"}
  return Profile("0" * 64, "a device", metric, {}, (12, 12, 3), {}, 1.0, tuple(rows))


values = st.lists(st.floats(0.1, 0.9), min_size=3, max_size=3)
ends = st.lists(st.floats(0, 5), min_size=3, max_size=3)


def finish_of(end):
  return lambda size, batch: end[SIZES.index(size)]


@given(values, ends, st.floats(0.01, 4), st.one_of(st.none(), st.floats(0.1, 0.9)))
def test_a_deadline_gets_a_size_that_is_done_in_time_and_above_the_floor(
  value, end, deadline, floor
):
  made = profile(value)
  policy = Policy(SIZES, made, floor)
  above = [v - 0.01 >= (floor or 0) for v in value]
  assume(any(above))
  found = choice.chosen(policy, None, finish_of(end), 0.0, deadline)
  possible = [s for s, e, a in zip(SIZES, end, above, strict=True) if a and e <= deadline]
  if found is None:
    assert not possible
    return
  assert found.size in possible
  if floor is not None:  # the second half of the time is for those that come next
    early = [s for s in possible if end[SIZES.index(s)] <= deadline / 2]
    if not early:
      assert end[SIZES.index(found.size)] == min(end[SIZES.index(s)] for s in possible)
      return
    assert found.size in early
    possible = early
  best = max(value[SIZES.index(s)] for s in possible)
  assert value[SIZES.index(found.size)] >= best - 0.01 - 1e-9  # as good, by the interval


@given(values, ends)
def test_without_a_floor_load_changes_nothing(value, end):
  policy = Policy(SIZES, profile(value))
  found = choice.chosen(policy, None, finish_of(end), 0.0)
  assert found == choice.chosen(policy, None, finish_of([0, 0, 0]), 0.0) and not found.degraded


@given(ends, st.floats(0.01, 4))
def test_under_load_the_size_is_within_the_floor_and_says_that_it_is_coarser(end, target):
  policy = Policy(SIZES, profile((0.5, 0.6, 0.7)), floor=0.55, target=target)
  found = choice.chosen(policy, None, finish_of(end), 0.0)
  assert found.size in (4, 8) and found.degraded == (found.size == 4)
  if end[2] <= target:
    assert found.size == 8
  elif end[1] <= target:
    assert found.size == 4
  else:
    assert end[SIZES.index(found.size)] == min(end[1:])


def test_a_budget_keeps_its_limits_under_load_and_names_its_batch():
  policy = Policy(SIZES, profile((0.5, 0.6, 0.7)), floor=0.45, target=1.0)
  found = choice.chosen(policy, Budget(latency_ms=5), finish_of([0, 0, 0]), 0.0)
  assert (found.size, found.batch, found.degraded) == (4, 1, False)
  slow = choice.chosen(policy, Budget(latency_ms=5), finish_of([0, 9, 9]), 0.0)
  assert (slow.size, slow.degraded) == (2, True)
  with pytest.raises(errors.UserError, match="No size fits"):
    choice.chosen(policy, Budget(latency_ms=0.1), finish_of([0, 0, 0]), 0.0)


def test_without_a_profile_nothing_is_guessed():
  finish = finish_of([0, 0, 0])
  assert choice.chosen(Policy((4,)), None, finish, 0.0).size == 4
  for budget, sizes in ((None, SIZES), (Budget(latency_ms=5), (4,))):
    with pytest.raises(errors.UserError, match="no profile"):
      choice.chosen(Policy(sizes), budget, finish, 0.0)


def test_a_floor_that_no_size_reaches_is_refused_at_the_start():
  with pytest.raises(errors.UserError, match=r"the best reaches 0\.69"):
    choice.check(Policy(SIZES, profile((0.5, 0.6, 0.7)), floor=0.8))
  with pytest.raises(errors.UserError, match="needs a profile"):
    choice.check(Policy(SIZES, floor=0.8))
  with pytest.raises(errors.UserError, match="has no seqhw=5"):
    choice.restricted(profile((0.5, 0.6, 0.7)), (5,), (1,))


def test_times_are_means_and_safe_ones_are_above_most():
  now = 0.0
  times = Times(lambda: now)
  key = ("predict", 4, 1)
  assert math.isinf(times.mean(key)) and math.isinf(times.safe(key))
  seconds = [0.1 + 0.02 * (i % 5 == 0) for i in range(500)]
  for second in seconds:
    times.add(key, second)
  assert times.mean(key) == pytest.approx(0.104, abs=0.003)
  assert sum(second > times.safe(key) for second in seconds) < 0.25 * len(seconds)
  assert times.safe(key) < 0.13


def test_what_slows_one_program_slows_all_until_it_is_forgotten():
  now = 0.0
  times = Times(lambda: now)
  for size, seconds in ((2, 0.1), (4, 0.4)):
    times.add(("predict", size, 1), seconds)
  for _ in range(100):
    times.add(("predict", 2, 1), 0.3)
  assert times.mean(("predict", 4, 1)) == pytest.approx(1.2, rel=0.01)
  now = 20.0  # nothing was predicted to be in time, so nothing ran
  assert times.safe(("predict", 4, 1)) == pytest.approx(0.4, rel=0.01)
