"""The draw of static arguments: reproducible, independent, distributed as configured."""

import itertools
import json
import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, strategies as st

from flexivit_jax.errors import UserError
from flexivit_jax.training import patch_schedule

pytestmark = pytest.mark.faults

SEQHW = (5, 6, 8, 10, 12, 15, 16, 20, 24, 30)


def _draws(flexi, name, n, seed=0):
  return [patch_schedule.draw(flexi, seed=seed, step=step)[name] for step in range(n)]


def test_first_draws_are_pinned():
  # An upgrade that changes these changes every run; resumed runs would go on with other sizes.
  flexi = patch_schedule.parse({"seqhw": {"v": SEQHW}})
  assert _draws(flexi, "seqhw", 16) == PINNED_SEED_0
  assert _draws(flexi, "seqhw", 8, seed=1) == PINNED_SEED_1
  assert patch_schedule.draw(flexi, seed=2**40, step=10**7) == PINNED_LARGE


PINNED_SEED_0 = [12, 24, 16, 15, 8, 5, 20, 8, 8, 10, 6, 15, 6, 30, 30, 15]
PINNED_SEED_1 = [16, 12, 30, 8, 15, 15, 15, 20]
PINNED_LARGE = {"seqhw": 20}


@pytest.mark.parametrize("p", [(1,) * 10, (1, 2, 3, 4, 5, 6, 7, 8, 9, 10), (0, 0, 1, 3) + (0,) * 6])
def test_frequencies_follow_the_weights(p):
  flexi = patch_schedule.parse({"seqhw": {"v": SEQHW, "p": p}})
  drawn = _draws(flexi, "seqhw", 10_000)
  counts = np.array([drawn.count(v) for v in SEQHW])
  want = 10_000 * np.array(p) / np.sum(p)
  assert (counts[want == 0] == 0).all()
  assert scipy.stats.chisquare(counts[want > 0], want[want > 0]).pvalue > 0.01


def test_neighbouring_steps_seeds_and_names_are_independent():
  flexi = patch_schedule.parse({"a": {"v": (1, 2, 3, 4)}, "b": {"v": (1, 2, 3, 4)}})
  a, b, other = _draws(flexi, "a", 4001), _draws(flexi, "b", 4001), _draws(flexi, "a", 4001, seed=1)
  for x, y in ((a[1:], a[:-1]), (a, b), (a, other)):
    table = scipy.stats.contingency.crosstab(x, y).count
    assert scipy.stats.chi2_contingency(table).pvalue > 0.01


@given(st.permutations(range(20)))
def test_draws_do_not_depend_on_order_or_on_other_arguments(steps):
  alone = patch_schedule.parse({"seqhw": {"v": SEQHW}})
  both = patch_schedule.parse({"teacher": {"v": (1, 2)}, "seqhw": {"v": SEQHW}})
  want = _draws(alone, "seqhw", 20, seed=7)
  for step in steps:
    assert patch_schedule.draw(both, seed=7, step=step)["seqhw"] == want[step]


def test_no_global_state_is_read_or_changed():
  flexi = patch_schedule.parse({"seqhw": {"v": SEQHW}})
  before = np.random.get_state()[1].copy()
  patch_schedule.draw(flexi, seed=0, step=0)
  np.testing.assert_array_equal(np.random.get_state()[1], before)


def test_all_static_are_the_combinations_that_can_be_drawn():
  flexi = patch_schedule.parse(
    {"seqhw": {"v": (2, 4, 8), "p": (1, 0, 1)}, "grid": {"v": [(1, 2), [3, 4]]}}
  )
  want = [{"seqhw": s, "grid": g} for s, g in itertools.product((2, 8), ((1, 2), (3, 4)))]
  assert patch_schedule.all_static(flexi) == want
  drawn = [patch_schedule.draw(flexi, seed=0, step=step) for step in range(100)]
  assert all(d in want for d in drawn)
  assert all(w in drawn for w in want)


def test_nothing_to_draw():
  assert patch_schedule.parse({}) == {}
  assert patch_schedule.draw({}, seed=0, step=0) == {}
  assert patch_schedule.all_static({}) == [{}]


@pytest.mark.parametrize(
  ("choice", "message"),
  [
    ({}, r"flexi.seqhw.v is empty"),
    ({"v": ()}, r"flexi.seqhw.v is empty"),
    ({"v": 8}, r"flexi.seqhw.v=8; expected a tuple"),
    ({"v": "58"}, r"flexi.seqhw.v='58'; expected a tuple"),
    ({"v": (5, 5)}, r"flexi.seqhw.v has 5 twice"),
    ({"v": ([5, 6], (5, 6))}, r"has \(5, 6\) twice"),
    ({"v": (5, 0)}, r"has 0; expected integers > 0"),
    ({"v": (5, -1)}, r"has -1; expected integers > 0"),
    ({"v": (5, 6.0)}, r"has 6.0; expected integers > 0"),
    ({"v": (True,)}, r"has True; expected integers > 0"),
    ({"v": ("5",)}, r"has '5'; expected integers > 0"),
    ({"v": (5, 6), "p": (1,)}, r"flexi.seqhw.p has 1 weights for 2 values"),
    ({"v": (5, 6), "p": (1, -1)}, r"expected finite weights >= 0"),
    ({"v": (5, 6), "p": (1, float("nan"))}, r"expected finite weights >= 0"),
    ({"v": (5, 6), "p": ("a", 1)}, r"flexi.seqhw.p=\('a', 1\); expected finite weights >= 0"),
    ({"v": (5, 6), "p": (True, 1)}, r"expected finite weights >= 0"),
    ({"v": (5, 6), "stages": (("a", (1, 1)),)}, r"stages has 'a'; expected a fraction"),
    ({"v": (5, 6), "adapt": 3}, r"flexi.seqhw.adapt is 3; expected a section"),
    ({"v": (5, 6), "adapt": {"every": "x"}}, r"adapt.every is 'x'; expected an integer"),
    (7, r"flexi.seqhw is 7; expected a section of keys and values"),
    ({"v": (5, 6), "p": (0, 0)}, r"expected at least one weight > 0"),
    (
      {"v": (5, 6), "probs": (1, 1)},
      r"'flexi.seqhw.probs'; known: flexi.seqhw.adapt, flexi.seqhw.p, .*stages, flexi.seqhw.v",
    ),
    ({"v": (5, 6), "share": "flop"}, r"Unknown flexi.seqhw.share 'flop'; .*Did you mean 'flops'"),
    ({"v": (5, 6), "stages": ((1, (1, 1)),), "p": (1, 1)}, r"has stages and p or adapt"),
    ({"v": (5, 6), "stages": ((1, (1, 1)),), "adapt": {}}, r"has stages and p or adapt"),
    ({"v": (5, 6), "stages": "coarse"}, r"Unknown flexi.seqhw.stages 'coarse'; known: coarse_to_f"),
    ({"v": (5, 6), "stages": 0.5}, r"flexi.seqhw.stages=0.5; expected a tuple"),
    ({"v": (5, 6), "stages": ()}, r"stages end at \[\]; expected rising fractions"),
    ({"v": (5, 6), "stages": ((0.5, (1, 1)),)}, r"stages end at \[0.5\]; expected rising"),
    ({"v": (5, 6), "stages": ((0, (1, 1)), (1, (1, 1)))}, r"end at \[0.0, 1.0\]; expected rising"),
    (
      {"v": (5, 6), "stages": ((0.5, (1, 1)), (0.5, (1, 0)), (1, (1, 1)))},
      r"end at \[0.5, 0.5, 1.0\]; expected rising",
    ),
    (
      {"v": (5, 6), "stages": ((0.6, (1, 1)), (0.5, (1, 0)), (1, (1, 1)))},
      r"end at \[0.6, 0.5, 1.0\]; expected rising",
    ),
    (
      {"v": (5, 6), "stages": ((0.5, (1, 1)), (float("nan"), (1, 0)), (1, (1, 1)))},
      r"end at \[0.5, nan, 1.0\]; expected rising",
    ),
    ({"v": (5, 6), "stages": ((1, 1, 1),)}, r"stages has \(1, 1, 1\); expected \(until, weights\)"),
    ({"v": (5, 6), "stages": (1, (1, 1))}, r"stages has 1; expected \(until, weights\)"),
    ({"v": (5, 6), "stages": ((1, (1,)),)}, r"stages has 1 weights for 2 values"),
    (
      {"v": (5, 6), "adapt": {"signals": 1}},
      r"'flexi.seqhw.adapt.signals'; .*Did you mean 'flexi.seqhw.adapt.signal'",
    ),
    ({"v": (5, 6), "adapt": {"signal": "los"}}, r"Unknown flexi adapt signal 'los'; .*'loss'"),
    ({"v": (5, 6), "adapt": {"every": 0}}, r"adapt: every=0, .*expected every >= 1"),
    ({"v": (5, 6), "adapt": {"floor": 0.0}}, r"0 < floor <= 1"),
    ({"v": (5, 6), "adapt": {"floor": 1.1}}, r"0 < floor <= 1"),
    ({"v": (5, 6), "adapt": {"decay": 1.0}}, r"0 < decay < 1"),
    ({"v": (5, 6), "adapt": {"power": -1.0}}, r"a finite power >= 0"),
    ({"v": (5, 6), "adapt": {"power": float("inf")}}, r"a finite power >= 0"),
  ],
)
def test_bad_choices(choice, message):
  with pytest.raises(UserError, match=message):
    patch_schedule.parse({"seqhw": choice})


def test_shares_of_flops_need_the_cost_of_a_step():
  flexi = patch_schedule.parse({"seqhw": {"v": (5, 6), "share": "flops"}})
  with pytest.raises(UserError, match="what a step costs is not known here"):
    patch_schedule.draw(flexi, seed=0, step=0)
  weighed = patch_schedule.weigh(flexi, lambda size: size["seqhw"])
  assert patch_schedule.probabilities(weighed, "seqhw", step=0) == pytest.approx((6 / 11, 5 / 11))


def test_negative_seeds_are_errors():
  with pytest.raises(UserError, match="seed=-1, step=0"):
    patch_schedule.draw({}, seed=-1, step=0)


# --- shares of the computation ---

COSTS = {5: 1.0, 6: 3.7, 8: 11.3, 10: 40.1}


def cost(size):
  """Uneven, and not a product of what the arguments cost."""
  return COSTS[size["seqhw"]] * size.get("depth", 1) + 0.3 * size.get("depth", 1) ** 2


@pytest.mark.parametrize(
  "other",
  [
    {},
    {"depth": {"v": (1, 3), "p": (1, 2)}},
    {"depth": {"v": (3, 1), "stages": ((0.25, (1, 0)), (1, (1, 3)))}},
  ],
)
@pytest.mark.parametrize("p", [(1, 1, 1, 1), (1, 2, 3, 4)])
def test_a_share_of_the_flops_is_what_each_value_costs_in_the_long_run(other, p):
  section = {"seqhw": {"v": tuple(COSTS), "p": p, "share": "flops"}}
  flexi = patch_schedule.parse(section | other, cost)
  spent = dict.fromkeys(COSTS, 0.0)
  for size, part, flops in patch_schedule.shares(flexi, cost):
    spent[size["seqhw"]] += part * flops
  mean = patch_schedule.mean_cost(flexi, cost)
  want = np.array(p) / np.sum(p)
  np.testing.assert_allclose(np.array(list(spent.values())) / mean, want, rtol=1e-12)


def test_draws_by_share_of_the_flops_follow_their_frequencies():
  flexi = patch_schedule.parse({"seqhw": {"v": tuple(COSTS), "share": "flops"}}, cost)
  costs = np.array([cost({"seqhw": v}) for v in COSTS])
  probs = (1 / costs) / np.sum(1 / costs)
  n = 40_000
  drawn = _draws(flexi, "seqhw", n)
  counts = np.array([drawn.count(v) for v in COSTS])
  assert scipy.stats.chisquare(counts, n * probs).pvalue > 0.01
  assert (
    scipy.stats.chisquare([drawn[:10_000].count(v) for v in COSTS], 10_000 * probs).pvalue > 0.01
  )
  # FLOPs spent on a value, relative to the expected ones: a binomial count's standard error, and not below 1 %.
  error = np.sqrt((1 - probs) / (n * probs))
  assert (np.abs(counts * costs / (n * probs * costs) - 1) < np.maximum(0.01, 3.5 * error)).all()
  assert abs(np.dot(counts, costs) / (n * patch_schedule.mean_cost(flexi, cost)) - 1) < 0.05


def test_only_one_argument_can_share_the_flops():
  section = {"v": (1, 3), "share": "flops"}
  with pytest.raises(UserError, match=r"flexi.seqhw and flexi.depth both have share='flops'"):
    patch_schedule.parse({"seqhw": {"v": (5, 6), "share": "flops"}, "depth": section}, cost)


def test_expected_shares_are_what_is_drawn():
  flexi = patch_schedule.parse(
    {
      "seqhw": {"v": (5, 6, 8), "stages": ((0.3, (1, 0, 0)), (0.5, (1, 1, 0)), (1, (0, 1, 3)))},
      "depth": {"v": (1, 3), "stages": ((0.4, (1, 3)), (1, (1, 0)))},
    }
  )
  n = 8_000
  drawn = [patch_schedule.draw(flexi, seed=3, step=i, total_steps=n) for i in range(n)]
  found = patch_schedule.shares(flexi, cost)
  assert math.fsum(part for _, part, _ in found) == pytest.approx(1, abs=1e-12)
  for size, part, flops in found:
    assert flops == cost(size)
    # Within a stage the draws vary less than a binomial of n draws: its standard error is a bound; 4 of them.
    assert abs(drawn.count(size) / n - part) <= 4 * math.sqrt(part * (1 - part) / n)
  costs = [cost(size) for size in drawn]
  error = np.std(costs) / math.sqrt(n)
  assert abs(np.mean(costs) - patch_schedule.mean_cost(flexi, cost)) < 4 * error
  assert sum(part == 0 for _, part, _ in found) == 1  # 8 and depth 3 never meet


# --- curricula ---


def test_each_stage_draws_its_values_until_its_fraction_of_the_steps():
  table = ((0.07, (1, 0, 0)), (0.55, (0, 1, 1)), (1, (0, 0, 1)))
  flexi = patch_schedule.parse({"seqhw": {"v": (5, 6, 8), "stages": table}})
  for n in (100, 1000):
    drawn = [patch_schedule.draw(flexi, seed=0, step=i, total_steps=n)["seqhw"] for i in range(n)]
    # 0.07 * 100 and 0.55 * 100 are not whole in floating point.
    first, second = 7 * n // 100, 55 * n // 100
    assert set(drawn[:first]) == {5} and set(drawn[second:]) == {8}
    assert set(drawn[first:second]) == {6, 8} and drawn[first:second].count(6) > 0.3 * (
      second - first
    )
    at = [
      patch_schedule.probabilities(flexi, "seqhw", step=i, total_steps=n)
      for i in (first - 1, first, second - 1, second, n + 5)
    ]
    assert at == [(1, 0, 0), (0, 0.5, 0.5), (0, 0.5, 0.5), (0, 0, 1), (0, 0, 1)]


@pytest.mark.parametrize(
  ("name", "values", "coarse_first"),
  [
    ("seqhw", (8, 5, 6), (5, 6, 8)),
    ("depth", (1, 4, 2), (1, 2, 4)),
    ("grid_hw", ((2, 8), (6, 6), (3, 4)), ((3, 4), (2, 8), (6, 6))),
    # In pixels, the largest have the fewest tokens.
    ("patch_hw", ((2, 8), (6, 6), (3, 4)), ((6, 6), (2, 8), (3, 4))),
    ("stride", (15, 30, 6), (30, 15, 6)),
  ],
)
def test_named_curricula_take_one_value_after_the_other(name, values, coarse_first):
  for order, want in (("coarse_to_fine", coarse_first), ("fine_to_coarse", coarse_first[::-1])):
    flexi = patch_schedule.parse({name: {"v": values, "stages": order}})
    drawn = [patch_schedule.draw(flexi, seed=0, step=i, total_steps=12)[name] for i in range(12)]
    assert drawn == [v for v in want for _ in range(4)]


def test_a_curriculum_by_share_of_the_flops():
  stages = ((0.5, (1, 1, 0, 0)), (1, (1, 1, 1, 1)))
  flexi = patch_schedule.parse(
    {"seqhw": {"v": tuple(COSTS), "stages": stages, "share": "flops"}}, cost
  )
  for step, allowed in ((0, 2), (9, 4)):
    probs = patch_schedule.probabilities(flexi, "seqhw", step=step, total_steps=10)
    spent = [p * cost({"seqhw": v}) for p, v in zip(probs, COSTS, strict=True)]
    np.testing.assert_allclose(spent[:allowed], spent[0], rtol=1e-12)
    assert spent[allowed:] == [0] * (4 - allowed)


def test_stages_need_the_number_of_steps():
  flexi = patch_schedule.parse({"seqhw": {"v": (5, 6), "stages": "coarse_to_fine"}})
  with pytest.raises(UserError, match=r"flexi\.seqhw has stages; its draws need total_steps"):
    patch_schedule.draw(flexi, seed=0, step=0)


# --- adaptive choices ---


def adaptive(p=(1, 1, 2), **options):
  section = {"v": (5, 6, 8), "p": p, "adapt": {"every": 1, "decay": 0.5, **options}}
  return patch_schedule.parse({"seqhw": section})


def after(flexi, seen, state=None, first=1):
  """The state after steps that drew these values and had these losses."""
  state = patch_schedule.init_state(flexi) if state is None else state
  for step, (value, loss) in enumerate(seen, first):
    state = patch_schedule.update(flexi, state, step=step, drawn={"seqhw": value}, loss=loss)
  return state


def probs_of(flexi, state):
  return patch_schedule.probabilities(flexi, "seqhw", step=0, state=state)


def test_at_first_and_with_equal_losses_the_weights_are_the_configured_ones():
  flexi = adaptive()
  assert probs_of(flexi, patch_schedule.init_state(flexi)) == (0.25, 0.25, 0.5)
  state = after(flexi, [(5, 2.0), (6, 2.0), (8, 2.0), (6, 2.0)])
  np.testing.assert_allclose(probs_of(flexi, state), (0.25, 0.25, 0.5), rtol=1e-15)
  # Nothing is lost; nothing was learnt yet.
  assert probs_of(flexi, after(flexi, [(5, 0.0), (6, 0.0), (8, 0.0)])) == (0.25, 0.25, 0.5)
  progress = adaptive(signal="progress")
  assert probs_of(progress, after(progress, [(5, 1.0), (6, 7.0)])) == (0.25, 0.25, 0.5)


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("floor", [0.2, 1.0])
def test_a_value_with_a_larger_loss_is_drawn_more_often(power, floor):
  flexi = adaptive(power=power, floor=floor)
  state = after(flexi, [(5, 1.0), (6, 4.0), (8, 1.0), (8, 3.0)])  # the mean of 8 is 2
  base, losses = np.array([0.25, 0.25, 0.5]), np.array([1.0, 4.0, 2.0])
  weights = base * losses**power
  want = floor * base + (1 - floor) * weights / weights.sum()
  got = probs_of(flexi, state)
  np.testing.assert_allclose(got, want, rtol=1e-14)
  assert math.fsum(got) == pytest.approx(1, abs=1e-15)
  assert (np.array(got) >= floor * base * (1 - 1e-15)).all()


def test_the_running_mean_decays_with_each_draw_of_the_value():
  flexi = adaptive(decay=0.9)
  state = after(flexi, [(5, 2.0), (6, 9.0), (5, 1.0), (6, 9.0), (5, 4.0)])["seqhw"]
  for key, decay in (("short", 0.9), ("long", 0.9**0.1)):
    mean = decay * (decay * 2.0 + (1 - decay) * 1.0) + (1 - decay) * 4.0
    assert state[key] == [pytest.approx(mean, rel=1e-15), pytest.approx(9.0, rel=1e-15), None]


def test_progress_prefers_what_is_being_learnt():
  flexi = adaptive(p=(1, 1, 1), signal="progress", floor=0.4)
  state = after(flexi, [(5, 4.0), (5, 2.0), (6, 4.0), (6, 3.0), (8, 1.0), (8, 5.0)])
  long = 0.5**0.1
  fast, slow = ((long * 4 + (1 - long) * x) - (0.5 * 4 + 0.5 * x) for x in (2.0, 3.0))
  want = [0.4 / 3 + 0.6 * fast / (fast + slow), 0.4 / 3 + 0.6 * slow / (fast + slow), 0.4 / 3]
  np.testing.assert_allclose(probs_of(flexi, state), want, rtol=1e-13)  # 8 becomes worse


def test_a_value_that_was_not_drawn_yet_counts_as_the_worst():
  flexi = adaptive(p=(1, 1, 1), floor=0.1)
  state = after(flexi, [(5, 1.0), (6, 3.0)])
  np.testing.assert_allclose(
    probs_of(flexi, state), 0.1 / 3 + 0.9 * np.array([1, 3, 3]) / 7, rtol=1e-14
  )


@pytest.mark.parametrize("losses", [(0.0, -1e-8, 0.0), (1e-3, -1e-8, 1e-3), (-2e-8, -1e-8, -1e-8)])
@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_a_loss_just_below_zero_counts_as_zero(losses, power):
  flexi = adaptive(power=power, floor=0.2)
  got = probs_of(flexi, after(flexi, zip((5, 6, 8), losses, strict=True)))
  want = probs_of(flexi, after(flexi, zip((5, 6, 8), np.maximum(losses, 0), strict=True)))
  assert got == want and min(got) > 0


def test_a_value_of_weight_zero_stays_out():
  flexi = adaptive(p=(1, 0, 1))
  state = after(flexi, [(5, 1.0), (8, 9.0)])
  assert probs_of(flexi, state)[1] == 0
  drawn = [patch_schedule.draw(flexi, seed=0, step=i, state=state)["seqhw"] for i in range(200)]
  assert set(drawn) == {5, 8}
  assert patch_schedule.all_static(flexi) == [{"seqhw": 5}, {"seqhw": 8}]


def test_probabilities_change_only_when_due():
  flexi = adaptive(every=3)
  assert [patch_schedule.is_due(flexi, step) for step in range(1, 8)] == [
    False, False, True, False, False, True, False,
  ]  # fmt: skip
  assert not patch_schedule.is_due(patch_schedule.parse({"seqhw": {"v": (5, 6)}}), 3)
  state = after(flexi, [(5, 1.0), (6, 9.0)])
  assert probs_of(flexi, state) == (0.25, 0.25, 0.5)
  state = after(flexi, [(8, 1.0)], state, first=3)
  third = probs_of(flexi, state)
  assert third[1] > 0.3
  assert probs_of(flexi, after(flexi, [(8, 7.0), (5, 7.0)], state, first=4)) == third


def test_the_state_is_json_and_a_new_one():
  flexi = adaptive(power=1.7, decay=0.83)
  state = after(flexi, [(5, 1 / 3), (6, np.pi), (5, 0.1)])
  before = json.dumps(state)
  assert json.loads(before) == state
  assert patch_schedule.init_state(patch_schedule.parse({"seqhw": {"v": (5, 6)}})) == {}
  drawn = {"seqhw": 6}
  after_one = patch_schedule.update(flexi, state, step=4, drawn=drawn, loss=7.0)
  assert json.dumps(state) == before and drawn == {"seqhw": 6} and after_one != state
  from_json = patch_schedule.update(flexi, json.loads(before), step=4, drawn=drawn, loss=7.0)
  assert from_json == after_one


def simulated(flexi, steps, state, total=60):
  """Draws of steps whose losses depend on value and step; returns them and the state after."""
  drawn = []
  for step in steps:
    size = patch_schedule.draw(flexi, seed=5, step=step, total_steps=total, state=state)
    loss = sum(size.values()) / (1 + step)
    state = patch_schedule.update(flexi, state, step=step + 1, drawn=size, loss=loss)
    drawn.append(size)
  return drawn, state


@given(
  stop=st.integers(0, 60), every=st.integers(1, 20), signal=st.sampled_from(["loss", "progress"])
)
def test_a_resumed_run_draws_the_same(stop, every, signal):
  adapt = {"every": every, "signal": signal}
  flexi = patch_schedule.parse(
    {
      "seqhw": {"v": (5, 6, 8), "adapt": adapt},
      "depth": {"v": (1, 3), "stages": "fine_to_coarse"},
      "stride": {"v": (2, 4), "adapt": adapt},
    }
  )
  whole, end = simulated(flexi, range(60), patch_schedule.init_state(flexi))
  first, state = simulated(flexi, range(stop), patch_schedule.init_state(flexi))
  rest, state = simulated(flexi, range(stop, 60), json.loads(json.dumps(state)))
  assert first + rest == whole and state == end


def test_adaptive_draws_need_the_state():
  # {}: of a run whose choice was not adaptive; the last: of a run that had other values
  fewer = {"seqhw": {"short": [None], "long": [None], "probs": [1.0]}}
  for state in (None, {}, fewer):
    with pytest.raises(UserError, match=r"flexi\.seqhw is adaptive; its draws need the state"):
      patch_schedule.draw(adaptive(), seed=0, step=0, state=state)


WEIGHTS = st.lists(st.sampled_from((0, 1, 3)), min_size=3, max_size=3).filter(any)


@given(
  first=WEIGHTS, second=WEIGHTS, until=st.floats(0.01, 0.99), p=WEIGHTS, seed=st.integers(0, 99)
)
def test_all_static_covers_everything_drawn(first, second, until, p, seed):
  flexi = patch_schedule.parse(
    {
      "seqhw": {"v": (5, 6, 8), "stages": ((until, first), (1, second))},
      "depth": {"v": (1, 2, 3), "p": p, "adapt": {"every": 2}},
    }
  )
  drawn, _ = simulated(flexi, range(60), patch_schedule.init_state(flexi))
  possible = patch_schedule.all_static(flexi)
  assert all(size in possible for size in drawn)
  # And nothing that is never drawn.
  assert len(possible) == np.count_nonzero(np.add(first, second)) * np.count_nonzero(p)
