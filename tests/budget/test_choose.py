import re

import pytest
from hypothesis import given, settings, strategies as st

from flexivit_jax import errors
from flexivit_jax.budget import choose, profile


def row(size, batch=1, ms=10.0, value=0.5, half=0.01, **fields):
  given = dict(ms_p90=ms * 1.2, gflops=float(size), low=value - half, high=value + half, n=1000)
  return profile.Row(size, batch, ms, value=value, **(given | fields))


def of(*rows, better="max", unit="%"):
  metric = dict(name="top1", better=better, unit=unit, interval="binomial")
  return profile.Profile("a" * 64, "cpu", metric, {}, (240, 240, 3), {}, 100.0, tuple(rows))


FOUR = of(
  row(5, ms=10.0, value=0.60),
  row(8, ms=20.0, value=0.70),
  row(15, ms=60.0, value=0.80),
  row(30, ms=300.0, value=0.805),
)
UNIT = st.floats(0.02, 0.98)


@st.composite
def profiles(draw):
  """Profiles of any rows, of a metric in which larger or smaller is better."""
  rows = draw(
    st.lists(
      st.builds(
        row,
        st.integers(1, 40),
        st.sampled_from([1, 4, 16]),
        ms=st.floats(0.1, 1e3),
        value=UNIT,
        half=st.floats(0, 0.02),
        gflops=st.floats(0.1, 1e3),
        memory_mb=st.floats(1, 1e4),
      ),
      min_size=1,
      max_size=8,
    )
  )
  return of(*rows, better=draw(st.sampled_from(["max", "min"])))


@st.composite
def budgets(draw):
  limit = dict(
    latency_ms=st.floats(0.1, 2e3),
    gflops=st.floats(0.1, 1e3),
    memory_mb=st.floats(1, 1e4),
    accuracy=UNIT,
    throughput=st.floats(0.1, 1e5),
  )
  names = draw(st.sets(st.sampled_from(sorted(limit)), min_size=1))
  return choose.Budget(**{name: draw(limit[name]) for name in sorted(names)})


def keeps(one, limits):
  """The rules in other words than the product's."""
  worse = one.high if limits.better == "min" else one.low
  of_accuracy = worse <= limits.accuracy if limits.better == "min" else worse >= limits.accuracy
  return (
    one.ms_p90 <= limits.latency_ms
    and one.gflops <= limits.gflops
    and one.memory_mb <= limits.memory_mb
    and of_accuracy
    and one.batch * 1000 / one.ms >= limits.throughput
  )


class _Limits:
  def __init__(self, better, budget):
    self.better = better
    loose = dict(latency_ms=1e9, gflops=1e9, memory_mb=1e9, throughput=0.0)
    loose["accuracy"] = 1e9 if better == "min" else -1e9
    for name, value in (loose | budget.given()).items():
      setattr(self, name, value)


class TestRules:
  @settings(max_examples=300, deadline=None)
  @given(profiles(), budgets())
  def test_the_best_row_that_keeps_every_limit_or_an_error_that_names_one(self, measured, budget):
    better = measured.metric["better"]
    sign = -1 if better == "min" else 1
    fitting = [one for one in measured.rows if keeps(one, _Limits(better, budget))]
    if not fitting:
      with pytest.raises(errors.UserError, match=r"No size fits .* nearest is seqhw="):
        choose.choose(measured, budget)
      return
    taken = choose.choose(measured, budget)
    assert taken in fitting
    best = max(sign * one.value for one in fitting)
    bests = [one for one in fitting if sign * one.value == best]
    ends = [one.high if better == "min" else one.low for one in bests]
    assert sign * taken.value >= min(sign * end for end in ends)  # as good as the best
    for one in fitting:  # nothing is both better and cheaper
      assert not (
        sign * one.value > sign * taken.value and one.ms / one.batch < taken.ms / taken.batch
      )

  @settings(max_examples=100, deadline=None)
  @given(profiles(), budgets(), st.randoms(use_true_random=False))
  def test_the_order_of_the_rows_does_not_matter(self, measured, budget, random):
    shuffled = measured._replace(rows=tuple(random.sample(measured.rows, len(measured.rows))))
    answers = []
    for one in (measured, shuffled):
      try:
        taken = choose.choose(one, budget)
        answers.append((taken.ms / taken.batch, taken.gflops, taken.batch))
      except errors.UserError:
        answers.append(None)
    assert answers[0] == answers[1]

  def test_of_equally_good_sizes_the_cheapest(self):
    assert choose.choose(FOUR, choose.Budget(latency_ms=1000)).size == 15
    assert choose.choose(FOUR, choose.Budget(latency_ms=71)).size == 8

  def test_latency_goes_by_the_90th_percentile_and_accuracy_by_the_worse_end(self):
    assert choose.choose(FOUR, choose.Budget(latency_ms=24)).size == 8
    assert choose.choose(FOUR, choose.Budget(latency_ms=23.9)).size == 5
    one = of(row(8, value=0.70, half=0.02))
    assert choose.choose(one, choose.Budget(accuracy=0.679)).size == 8
    with pytest.raises(errors.UserError, match=r"its accuracy is 0\.68"):
      choose.choose(one, choose.Budget(accuracy=0.69))

  def test_a_metric_that_is_better_when_smaller(self):
    errors_of = of(row(5, value=0.4), row(15, value=0.2, ms=50.0), better="min")
    assert choose.choose(errors_of, choose.Budget(latency_ms=100)).size == 15
    assert choose.choose(errors_of, choose.Budget(accuracy=0.25)).size == 15
    with pytest.raises(errors.UserError, match="nearest is seqhw=15"):
      choose.choose(errors_of, choose.Budget(accuracy=0.1))

  def test_no_row_fits_names_the_nearest_and_what_it_misses(self):
    with pytest.raises(errors.UserError) as e:
      choose.choose(FOUR, choose.Budget(latency_ms=9, accuracy=0.5))
    assert re.search(
      r"latency_ms=9,accuracy=0.5. The nearest is seqhw=5 batch=1: its latency_ms is 12",
      str(e.value),
    )

  def test_memory_that_is_not_known_is_no_memory_that_fits(self):
    with pytest.raises(errors.UserError, match="the profile has no memory"):
      choose.choose(FOUR, choose.Budget(memory_mb=100))

  def test_rows_of_one_batch(self):
    both = of(row(5, batch=1, ms=10.0), row(5, batch=4, ms=20.0))
    assert choose.choose(both, choose.Budget(latency_ms=100)).batch == 4
    assert choose.choose(both, choose.Budget(latency_ms=100), batch=1).batch == 1
    with pytest.raises(errors.UserError, match="no batches of 2 images; it has 1, 4"):
      choose.choose(both, choose.Budget(latency_ms=100), batch=2)


class TestText:
  @given(budgets())
  @settings(max_examples=50, deadline=None)
  def test_text_and_back(self, budget):
    again = choose.parse(",".join(f"{name}={limit!r}" for name, limit in budget.given().items()))
    assert again == budget

  @pytest.mark.parametrize(
    ("text", "problem"),
    [
      ("20", "no limit; expected NAME=NUMBER"),
      ("", "no limit"),
      ("latency=20", "Unknown limit of --budget 'latency'.*Did you mean 'latency_ms'"),
      ("latency_ms=20,latency_ms=30", "given twice"),
      ("latency_ms=fast", "expected a number"),
      ("latency_ms=-1", "latency_ms=-1; expected a number above 0"),
      ("latency_ms=0", "above 0"),
      ("latency_ms=nan", "above 0"),
      ("latency_ms=inf", "above 0"),
      ("gflops=1,,accuracy=.5", "no limit"),
    ],
  )
  def test_bad_budgets(self, text, problem):
    with pytest.raises(errors.UserError, match=problem):
      choose.parse(text)

  def test_percent_in_the_place_of_a_fraction(self):
    with pytest.raises(errors.UserError, match=r"accuracy=0.7 for 70 %"):
      choose.choose(FOUR, choose.Budget(accuracy=70))
