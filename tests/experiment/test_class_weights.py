"""Class weights: what a config may say, what a training step makes of it."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexivit_jax import config, errors, experiment
from flexivit_jax.data.sources import Source, make_source
from flexivit_jax.experiment import class_weights
from flexivit_jax.objectives import OBJECTIVES, losses
from flexivit_jax.objectives.distill import Teacher


def source_of(labels, num_classes, names=None):
  return Source("made", "train", num_classes, names, len(labels), lambda ii: [], lambda: labels)


@hypothesis.settings(max_examples=20)
@hypothesis.given(st.lists(st.integers(0, 5), min_size=1, max_size=40))
def test_balanced_weights_are_inverse_to_the_frequency_and_one_on_average(labels):
  weights = class_weights.resolve("balanced", source_of(labels, 6), 7)
  count = np.bincount(labels, minlength=7)
  assert np.mean([weights[k] for k in labels]) == pytest.approx(1)
  shares = [weights[k] * count[k] for k in set(labels)]
  np.testing.assert_allclose(shares, shares[0])  # each class has the same share of the loss
  assert all(weights[k] == 1 for k in range(7) if not count[k])


def test_each_label_of_an_image_counts():
  weights = class_weights.resolve("balanced", source_of([(0, 1), (0,), (0, 2), ()], 3), 3)
  np.testing.assert_allclose(weights, [5 / 9, 5 / 3, 5 / 3])


@pytest.mark.parametrize(
  ("given", "expected"),
  [
    ((1, 2.5, 0), (1, 2.5, 0)),
    ({"cat": 3}, (3, 1, 1)),
    ({"caf\u00e9": 2, "7": 4}, (1, 2, 4)),  # a name, before it is a number
    ({"cafe\u0301": 2}, (1, 2, 1)),
    ({0: 5, "1": 6}, (5, 6, 1)),
  ],
)
def test_weights_by_place_name_or_number(given, expected):
  source = source_of([0, 1, 2], 3, ("cat", "caf\u00e9", "7"))
  assert class_weights.resolve(given, source, 3) == expected


@pytest.mark.parametrize(
  ("given", "message"),
  [
    ((1, 2), "has 2 numbers, the model 3 classes"),
    ((1, -1, 1), r"class 'dog' is -1; expected a finite number >= 0"),
    ((1, float("nan"), 1), "is nan"),
    ({"cat": "x"}, "class 'cat' is 'x'"),
    ({"cta": 2}, "Unknown class in class_weights 'cta'; known: cat, dog, owl. Did you mean 'cat'"),
    ({3: 2}, "Unknown class in class_weights 3"),
    ({"cat": 2, 0: 3}, "names the class 'cat' twice"),
    ((0, 0, 0), "all 0"),
  ],
)
def test_bad_weights_are_named(given, message):
  with pytest.raises(errors.UserError, match=message):
    class_weights.resolve(given, source_of([0, 1, 2], 3, ("cat", "dog", "owl")), 3)


@pytest.mark.parametrize("loss", sorted(losses.LOSSES))
def test_the_loss_of_an_example_is_multiplied_by_the_mean_weight_of_its_labels(loss):
  rng = np.random.default_rng(0)
  logits, weights = jnp.asarray(rng.normal(size=(6, 4)), jnp.float32), (0.5, 3.0, 0.0, 1.5)
  labels = np.eye(4, dtype=np.float32)[[0, 1, 2, 3, 0, 1]]
  labels[4], labels[5] = [0.25, 0.75, 0, 0], 0
  found = losses.weighted(loss, weights)(logits, jnp.asarray(labels))
  plain = losses.LOSSES[loss](logits, jnp.asarray(labels))
  mixed = 0.25 * 0.5 + 0.75 * 3.0
  np.testing.assert_allclose(found, plain * np.array([0.5, 3, 0, 1.5, mixed, 1]), rtol=1e-6)
  assert losses.weighted(loss, None) is losses.LOSSES[loss]


def logits_of(inputs, **_):
  """A model whose logits are its images."""
  return {"logits": inputs["image"]}


def test_an_example_has_the_same_weighted_loss_whatever_is_in_its_part_of_the_batch():
  objective = OBJECTIVES["supervised"](class_weights=(0.2, 1.0, 5.0))
  rng = np.random.default_rng(0)
  batch = {
    "image": jnp.asarray(rng.normal(size=(8, 3)), jnp.float32),
    "labels": jax.nn.one_hot(jnp.asarray([0, 0, 0, 0, 0, 1, 1, 2]), 3),
  }
  whole = objective.loss(logits_of, batch).total
  parts = [
    objective.loss(logits_of, jax.tree.map(lambda x, i=i: x[i : i + 2], batch)).total
    for i in range(0, 8, 2)
  ]
  np.testing.assert_array_equal(np.concatenate(parts), whole)


@pytest.mark.parametrize("name", ["supervised", "self_distill", "distill"])
def test_an_objective_refuses_weights_that_it_would_not_use(name):
  teacher = Teacher(None, {}, "image", {})
  given = {"self_distill": {"size": {"seqhw": 3}}, "distill": {"teachers": {"t": teacher}}}
  with pytest.raises(errors.UserError, match=r"expected a number for each class|label_weight"):
    OBJECTIVES[name](**given.get(name, {}), class_weights="balanced")


def test_a_run_resolves_them_from_its_training_images():
  settings = config.load("digits:debug", ["objective.class_weights=balanced"])
  exp = experiment.from_config(settings)
  assert any(line.startswith("class weights: ") for line in exp.class_lines())
  plain = experiment.from_config(config.load("digits:debug", []))
  labels = jnp.eye(10)
  logits = jnp.zeros((10, 10))
  ratio = [
    e.objective.loss(logits_of, {"image": logits, "labels": labels}).total for e in (exp, plain)
  ]
  expected = class_weights.balanced(make_source(**settings["input"]["data"]), 10)
  np.testing.assert_allclose(ratio[0] / ratio[1], expected, rtol=1e-5)
