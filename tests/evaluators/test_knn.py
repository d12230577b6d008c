"""Nearest neighbours against scikit-learn and NumPy; the evaluator from a config, on one device and on eight."""

import functools
import importlib
import json

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier

from flexivit_jax import data, experiment
from flexivit_jax.devices import sharding
from flexivit_jax.errors import UserError
from flexivit_jax.evaluators.knn import blocks, classify, knn, normalized, votes
from flexivit_jax.experiment import sections
from flexivit_jax.models import FlexiViT, TwoTowers
from flexivit_jax.training import steps

PP = "resize(12)|value_range(-1, 1)|onehot(10)|keep('image', 'labels')"
DIGITS = dict(name="digits", split="test")
SECTION = dict(
  type="knn", data=DIGITS, train_data=DIGITS | dict(split="train"), pp=PP, batch_size=64,
  seqhw=(2, 4), threads=0,
)  # fmt: skip


def reference(k, temperature, features, classes):
  """scikit-learn's classifier, whose distance is 1 - cosine."""

  def weights(distance):
    return np.exp((1 - distance) / temperature)

  model = KNeighborsClassifier(k, metric="cosine", algorithm="brute", weights=weights)
  return model.fit(features, classes)


# --- the vote ---


@hypothesis.given(
  st.integers(0, 20), st.integers(1, 30), st.sampled_from([0.07, 1.0]), st.integers(2, 40)
)
def test_shares_of_votes_are_scikit_learns(seed, k, temperature, d):
  rng = np.random.default_rng(seed)
  known, asked = rng.normal(size=(30, d)), rng.normal(size=(12, d))
  classes = np.arange(30) % 4
  labels = np.eye(4, dtype=bool)[classes]
  found = votes(normalized(known), labels, normalized(asked), k=k, temperature=temperature)
  want = reference(k, temperature, known, classes).predict_proba(asked)
  found = np.asarray(found, np.float64)
  # 1e-7 of a similarity is 1.4e-6 of a vote at temperature 0.07.
  np.testing.assert_allclose(
    found / found.sum(axis=1, keepdims=True), want, rtol=0, atol=3e-7 / temperature
  )


def test_a_neighbour_votes_for_each_of_its_labels():
  known = np.float32([[1, 0], [0.6, 0.8], [-1, 0]])
  labels = np.array([[1, 1, 0], [0, 1, 0], [0, 0, 1]], bool)
  found = votes(known, labels, np.float32([[1, 0]]), k=2, temperature=0.5)
  np.testing.assert_allclose(found, [[1, 1 + np.exp(-0.8), 0]], rtol=1e-6)


def test_the_size_of_blocks_the_length_of_features_and_a_small_temperature_change_nothing():
  rng = np.random.default_rng(0)
  known, asked = np.float32(rng.normal(size=(2, 50, 8)))
  labels = np.eye(5, dtype=bool)[np.arange(50) % 5]
  vote = functools.partial(votes, normalized(known), labels, k=7, temperature=0.07)
  whole = classify(vote, asked, rows=1000)
  for rows in (1, 7, 50):
    np.testing.assert_array_equal(classify(vote, asked, rows=rows), whole)
  scale = np.float32(rng.uniform(0.1, 1e3, (50, 1)))
  np.testing.assert_array_equal(classify(vote, asked * scale, rows=7), whole)
  nearest = functools.partial(votes, normalized(known), labels, k=7, temperature=1e-4)
  only = functools.partial(votes, normalized(known), labels, k=1, temperature=1.0)
  np.testing.assert_array_equal(classify(nearest, asked, rows=7), classify(only, asked, rows=7))
  assert [block.shape for block in blocks(asked, 20)] == [(20, 8)] * 3
  assert not normalized(np.zeros((1, 3))).any()


# --- the evaluator ---


@functools.cache
def make_model():
  model = FlexiViT(
    num_classes=7, patch_size=(6, 6), posemb_size=(2, 2), width=48, depth=1, mlp_dim=32,
    num_heads=2, head_zeroinit=False, pool_type="gap",
  )  # fmt: skip
  return model, jax.jit(lambda: steps.init_params(model, {"image": (12, 12, 3)}, seed=0))()


def probed(**changes):
  """The rows for digits, from the same sections as in a config."""
  model, params = make_model()
  section = SECTION | changes
  sections.check_evaluation("evals.knn", section)
  return (
    experiment.build_evaluation("evals.test", section, every=1)
    .make(model, sharding.make_mesh())
    .run(params)
  )


@functools.cache
def features_of(size, split):
  """Features and classes of digits, from `model.apply` and the source itself."""
  model, params = make_model()
  source = data.make_source(name="digits", split=split)
  (batch,) = data.eval_batches(source, PP, batch_size=len(source), threads=0)
  kwargs = {"grid_hw": size} if isinstance(size, tuple) else {"seqhw": size}
  forward = jax.jit(lambda p, x: model.apply({"params": p}, x, **kwargs)[1]["pre_logits"])
  found = forward(params, jnp.asarray(batch["image"]))
  return np.asarray(found, np.float64), batch["labels"].argmax(-1)


def test_rows_are_scikit_learns_of_all_training_images_and_far_above_chance(monkeypatch):
  module = importlib.import_module("flexivit_jax.evaluators.knn")
  monkeypatch.setattr(module, "BLOCK", 1437 * 50)  # eight blocks, the last not full
  sizes = (2, (3, 4))
  rows = probed(seqhw=sizes)
  for row, size, name in zip(rows, sizes, (2, "3x4"), strict=True):
    asked, expected = features_of(size, "test")
    right = reference(20, 0.07, *features_of(size, "train")).predict(asked) == expected
    assert row == {"seqhw": name, "top1": right.mean(), "n": 360}
    assert row["top1"] > 0.5


def test_k_and_shots_are_what_the_section_says():
  row = probed(seqhw=(4,), k=1, temperature=1.0)[0]
  asked, expected = features_of(4, "test")
  right = reference(1, 1.0, *features_of(4, "train")).predict(asked) == expected
  assert row["top1"] == right.mean()
  assert probed(seqhw=(4,), shots=3)[0]["top1"] < probed(seqhw=(4,))[0]["top1"]


@pytest.mark.full
def test_of_two_towers_the_images_features_are_taken():
  image = dict(variant="mu", depth=1, patch_size=(6, 6), posemb_size=(2, 2))
  text = dict(width=16, depth=1, mlp_dim=16, num_heads=2, vocab_size=20, max_length=5)
  model = TwoTowers(image=image, text=text, embed_dim=8, bias=None)
  params = steps.init_params(model, {"image": (12, 12, 3), "tokens": (5,)}, seed=0)
  evaluation = experiment.build_evaluation("evals.test", SECTION, every=1)
  found = []
  for network, weights in ((model, params), (model.parts["image"], params["image"])):
    evaluator = evaluation.make(network, sharding.make_mesh())
    rows = evaluator.run(weights)
    found.append((rows, evaluator.costs(weights, 1)))
  (rows, costs), (of_image, costs_of_image) = found
  assert rows == of_image
  for one, other in zip(costs, costs_of_image, strict=True):
    assert one["tokens"] == other["tokens"]
    assert one["gflops"] == pytest.approx(other["gflops"], rel=0.01)  # a projection more


def test_what_is_masked_is_not_seen():
  model, params = make_model()
  rows = []
  for padding in (1.0, np.nan):
    rng = np.random.default_rng(0)
    batches = []
    for _ in range(2):
      image, labels = rng.uniform(-1, 1, (12, 12, 12, 3)), np.eye(3)[np.arange(12) % 3]
      whole = {"image": image, "labels": labels, "_mask": np.ones(12)}
      batch = {k: np.concatenate([v[:9], padding * np.ones_like(v[9:])]) for k, v in whole.items()}
      batch["_mask"][9:] = 0
      batches.append([{k: np.float32(v) for k, v in batch.items()}])
    given = dict(seqhw=[2, 3], train_batches=batches[0], num_classes=3, k=4)
    rows.append(knn(model, batches[1], sharding.make_mesh(), **given).run(params))
  assert rows[0] == rows[1] and {row["n"] for row in rows[0]} == {9}


def test_what_cannot_be_is_an_error():
  for wrong in (dict(k=0), dict(temperature=0.0), dict(temperature=float("nan"))):
    with pytest.raises(UserError, match=r"k=.*, temperature=.*; expected 1 or more, and over 0"):
      probed(**wrong)
  with pytest.raises(UserError, match="k=31 of 30 training images; expected as many as k"):
    probed(shots=3, k=31)
  with pytest.raises(UserError, match=r"'evals.knn.ks'.*Did you mean 'evals.knn.k'"):
    probed(ks=3)
  with pytest.raises(UserError, match=r"lacks evals.knn.train_data"):
    sections.check_evaluation("evals.knn", {k: v for k, v in SECTION.items() if k != "train_data"})


def probe_on_all_devices(path: str) -> None:
  """Writes the rows on all devices that there are, and how many these are."""
  with open(path, "w") as file:
    json.dump({"rows": probed(shots=20), "devices": jax.device_count()}, file)


@pytest.mark.full
def test_eight_devices_probe_as_one(tmp_path, on_eight_devices):
  path = tmp_path / "eight.json"
  on_eight_devices(probe_on_all_devices, str(path))
  eight = json.loads(path.read_text())
  assert eight["devices"] == 8 and eight["rows"] == probed(shots=20)
