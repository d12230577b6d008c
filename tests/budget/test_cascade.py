"""Cascades of scores whose truth is known."""

import itertools
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from flexivit_jax import errors
from flexivit_jax.budget import calibration, cascade, fitting, sealed

SIZES, COSTS = (2, 4, 8), (1.0, 3.0, 10.0)


def draw(n, seed=0, skill=(1.5, 2.2, 3.0), classes=10):
  """Scores of n images at three sizes, the finest the best; an image that is easy is so at all sizes."""
  rng = np.random.default_rng(seed)
  labels = rng.integers(classes, size=n)
  ease = rng.gamma(1.5, 1.0, size=n)
  scores = []
  for strength in skill:
    found = rng.normal(size=(n, classes))
    found[np.arange(n), labels] += strength * ease
    scores.append(found * 1.7)
  return scores, labels


def rates(made, scores, labels):
  """The share that is lost, and the mean cost."""
  own = [scores[k] for k in made.at(SIZES)]
  said, finest = made.answers(own) == labels, scores[-1].argmax(axis=1) == labels
  shares = np.bincount(made.stages(own), minlength=len(made.sizes)) / len(labels)
  return (finest & ~said).mean(), made.cost(shares.tolist())


@pytest.mark.parametrize("signal", cascade.SIGNALS)
def test_the_share_of_lost_images_is_kept_and_the_cost_falls(signal):
  scores, labels = draw(3000)
  made = fitting.fit(SIZES, COSTS, scores, labels, alpha=0.02, signal=signal)
  assert made.sizes[-1] == 8 and len(made.sizes) > 1
  lost, cost = rates(made, *draw(20000, seed=1))
  assert lost < 0.02
  assert cost == pytest.approx(made.expected_cost, rel=0.1) and cost < 9
  assert sum(made.shares) == pytest.approx(1)


def test_the_guarantee_fails_no_more_often_than_it_says():
  """A violation: the true share is above alpha. It is measured on many more images than the calibration has."""
  alpha, delta, seeds = 0.05, 0.2, 40
  scores, labels = draw(10000, seed=7)
  violations = 0
  for seed in range(seeds):
    some = np.random.default_rng(seed).choice(len(labels), 300, replace=False)
    own = [each[some] for each in scores]
    made = fitting.fit(SIZES, COSTS, own, labels[some], alpha=alpha, delta=delta, seed=seed)
    violations += rates(made, scores, labels)[0] > alpha
  from scipy import stats

  assert violations <= stats.binom.ppf(0.999, seeds, delta)


def test_an_easier_guarantee_costs_no_more():
  scores, labels = draw(2000)
  costs = [
    fitting.fit(SIZES, COSTS, scores, labels, alpha=alpha).expected_cost
    for alpha in (0.005, 0.01, 0.02, 0.05, 0.1)
  ]
  assert costs == sorted(costs, reverse=True)
  assert costs[0] > costs[-1]


def test_a_size_that_does_not_pay_is_left_out():
  scores, labels = draw(3000)
  made = fitting.fit(SIZES, (1.0, 9.9, 10.0), scores, labels, alpha=0.02)
  assert made.sizes == (2, 8)


def test_coarse_sizes_that_know_nothing_leave_the_finest_alone():
  scores, labels = draw(3000, skill=(0.0, 0.0, 4.0))
  made = fitting.fit(SIZES, (9.0, 9.5, 10.0), scores, labels, alpha=0.01)
  assert made.sizes == (8,) and made.expected_cost == 10 and made.shares == (1.0,)
  assert made.lost == 0 and made.value == made.finest_value
  assert made.stop(0, scores[0][:4]).all()


def test_thresholds_are_the_best_of_all_on_few_images():
  """Each pair of thresholds is tried; those found cost no more at the same weight of a loss."""
  scores, labels = draw(60, seed=3)
  probabilities = [np.exp(calibration.log_softmax(each)) for each in scores]
  right = np.stack([each.argmax(axis=1) == labels for each in scores])
  lost = ~right & right[-1]
  found = fitting._settings((0, 1, 2), COSTS, lost.astype(int), probabilities, "confidence", 60)
  signals = [p.max(axis=1) for p in probabilities[:2]]
  every = []
  for pair in itertools.product(*([*s, math.inf] for s in signals)):
    stages = fitting._stages(signals, pair, 60)
    every.append((lost[stages, np.arange(60)].sum(), np.cumsum(COSTS)[stages].mean()))
  for weight in 10.0 * fitting._WEIGHTS:
    best = min(cost + weight * losses / 60 for losses, cost in every)
    ours = min(s.cost + weight * s.losses / 60 for s in found)
    assert ours <= best * 1.02


@settings(max_examples=10)
@given(st.integers(0, 10**6), st.integers(1, 40), st.sampled_from([*cascade.SIGNALS]))
def test_a_row_stops_by_itself_alone(seed, n, signal):
  """To the bit: alone, among others, and in another order."""
  rng = np.random.default_rng(seed)
  scores = [rng.normal(size=(n, 7)).astype(np.float32) * 3 for _ in range(2)]
  made = fitted(signal=signal)
  threshold = made._replace(thresholds=(0.0, 0.0), temperatures=(1.3, 0.9, 1.0))
  values = lambda a, b: cascade.SIGNALS[signal](  # noqa: E731
    cascade.calibrated(a, 1.3), cascade.calibrated(b, 0.9)
  )
  together, order = values(*scores), rng.permutation(n)
  assert (values(*(each[order] for each in scores)) == together[order]).all()
  for i in range(n):
    assert (values(*(each[i : i + 1] for each in scores)) == together[i]).all()
  assert threshold.stop(2, scores[0]).all()


def test_probabilities_are_scores_as_good_as_logits():
  logits = np.array([[1.0, 2.0, -3.0], [0.0, 0.0, 9.0]])
  for made in (fitted(), fitted(signal="margin")):
    probabilities = np.exp(calibration.log_softmax(logits)).astype(np.float32)
    own = cascade.of_probabilities(probabilities)
    assert (made.stop(0, own) == made.stop(0, logits)).all()
  assert np.isfinite(cascade.of_probabilities(np.array([[1.0, 0.0]]))).all()


def test_agreement_stops_only_where_two_stages_say_the_same():
  made = fitted(signal="agreement")._replace(thresholds=(math.inf, 0.5))
  first = np.array([[4.0, 0, 0], [4.0, 0, 0]])
  second = np.array([[4.0, 0, 0], [0, 4.0, 0]])
  assert made.stop(1, second, first).tolist() == [True, False]
  assert not made.stop(0, first).any()


def fitted(**fields):
  scores, labels = draw(600)
  return fitting.fit(SIZES, COSTS, scores, labels, alpha=0.05)._replace(
    sizes=SIZES, thresholds=(0.9, 0.8), temperatures=(1.0, 1.0, 1.0), costs=COSTS,
    shares=(0.5, 0.3, 0.2), **fields,
  )  # fmt: skip


def test_too_few_images_are_an_error_that_says_how_many():
  scores, labels = draw(200)
  with pytest.raises(errors.UserError, match=r"takes 597 or more, the calibration has 200"):
    fitting.fit(SIZES, COSTS, scores, labels, alpha=0.01)
  scores, labels = draw(597)
  fitting.fit(SIZES, COSTS, scores, labels, alpha=0.01)


def test_a_fall_of_accuracy_of_alpha_passes_no_more_often_than_delta():
  """All outcomes of 40 images, at several rates of losses whose gains are alpha less; exactly."""
  from scipy import stats

  n, alpha, delta = 40, 0.1, 0.2
  every = [(losses, gains) for losses in range(n + 1) for gains in range(n + 1 - losses)]
  passing = [pair for pair in every if fitting.drop_p(*pair, n, alpha, delta) <= delta]
  assert (0, 0) in passing and (1, 5) in passing and (4, 0) not in passing
  for lost in (0.1, 0.13, 0.2, 0.35, 0.5):
    rates = [lost, lost - alpha, 1 - 2 * lost + alpha]
    counts = [(losses, gains, n - losses - gains) for losses, gains in passing]
    assert stats.multinomial.pmf(counts, n, rates).sum() <= delta


def test_where_losses_are_made_good_the_limit_on_accuracy_is_cheaper():
  scores, labels = draw(4000, skill=(1.5, 2.9, 3.0))
  costs = (1.0, 5.0, 10.0)
  lost, drop = (
    fitting.fit(SIZES, costs, scores, labels, alpha=0.03, risk=risk) for risk in cascade.RISKS
  )
  assert drop.expected_cost < lost.expected_cost - 1
  assert drop.risk == "drop" and drop.lost > 0.03
  more, answers = draw(20000, seed=1, skill=(1.5, 2.9, 3.0))
  said = drop.answers([more[k] for k in drop.at(SIZES)])
  assert (said == answers).mean() > (more[-1].argmax(axis=1) == answers).mean() - 0.03


@pytest.mark.parametrize(
  ("n", "alpha", "delta"), [(298, 0.01, 0.05), (299, 0.01, 0.05), (2500, 0.02, 0.1)]
)
def test_as_many_losses_are_allowed_as_the_upper_end_of_their_interval(n, alpha, delta):
  from scipy import stats

  most = fitting.allowed(n, alpha, delta)
  upper = lambda losses: stats.beta.ppf(1 - delta, losses + 1, n - losses)  # noqa: E731
  assert most == -1 or upper(most) <= alpha
  assert upper(most + 1) > alpha


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"alpha": 0.0}, "alpha=0; expected a share"),
    ({"delta": 1.0}, "delta=1; expected a share"),
    ({"risk": "loss"}, "Did you mean 'lost'"),
    ({"signal": "confidense"}, "Did you mean 'confidence'"),
    ({"costs": (1.0, -1.0, 2.0)}, "numbers above 0"),
    ({"sizes": (2, 2, 8)}, "two different sizes"),
    ({"labels": np.full(600, 10)}, "labels are 10 to 10, the scores are of 10 classes"),
    ({"labels": np.zeros(5, int)}, "expected the same of all"),
  ],
)
def test_values_that_cannot_be_are_refused(changes, message):
  scores, labels = draw(600)
  given = dict(sizes=SIZES, costs=COSTS, scores=scores, labels=labels, alpha=0.05) | changes
  positional = [given.pop(name) for name in ("sizes", "costs", "scores", "labels")]
  with pytest.raises(errors.UserError, match=message):
    fitting.fit(*positional, **given)


def test_a_file_is_what_was_written(tmp_path):
  made = fitted(signal="agreement", weights="a" * 64, names=("cat", "dog"), data={"n": 600})
  made = made._replace(sizes=(2, (4, 6), 8), thresholds=(math.inf, 0.8))
  cascade.write(tmp_path / "c.json", made)
  assert cascade.read(tmp_path / "c.json", "a" * 64) == made
  with pytest.raises(errors.UserError, match=r"other weights .sha256 aaaaaaaaaaaa; these are bbb"):
    cascade.read(tmp_path / "c.json", "b" * 64)


def test_damaged_and_newer_files_are_refused(tmp_path):
  path = tmp_path / "c.json"
  with pytest.raises(errors.UserError, match="cannot be read"):
    cascade.read(path)
  cascade.write(path, fitted())
  text = path.read_text()
  for broken in (text[:200], "[]", "{}", text.replace("0.9", "0.1"), "\xff"):
    path.write_bytes(broken.encode("latin-1"))
    with pytest.raises(errors.UserError, match="damaged"):
      cascade.read(path)
  path.write_text(text.replace("cascade 1", "cascade 2"))
  with pytest.raises(errors.UserError, match="format 'flexivit cascade 2'; this version reads"):
    cascade.read(path)
  content = json.loads(text)["cascade"] | {"thresholds": [0.5]}
  path.write_text(
    json.dumps({"format": cascade.FORMAT, "sha256": sealed._sha256(content), "cascade": content})
  )
  with pytest.raises(errors.UserError, match="is damaged"):
    cascade.read(path)
