"""Masked sums against NumPy; images are read once and programs traced once for all sizes."""

import collections
import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from flexivit_jax import sharding, steps
from flexivit_jax.data.loader import eval_batches
from flexivit_jax.data.sources import Source
from flexivit_jax.errors import UserError
from flexivit_jax.evaluators import per_size
from flexivit_jax.evaluators.classification import classification
from flexivit_jax.models import FlexiViT, flexivit

SIZES = [2, (3, 4)]


@functools.cache
def make_model(num_classes=7):
  model = FlexiViT(
    num_classes=num_classes, patch_size=(6, 6), posemb_size=(2, 2), width=8, depth=1, mlp_dim=8,
    num_heads=2, head_zeroinit=False,
  )  # fmt: skip
  init = jax.jit(lambda: steps.init_params(model, (12, 12, 3), seed=0))
  return model, init()


@functools.cache
def forward(num_classes, size):
  """Returns the compiled function from images to logits."""
  model, params = make_model(num_classes)
  kwargs = {"grid_hw": size} if isinstance(size, tuple) else {"seqhw": size}
  return jax.jit(lambda image: model.apply({"params": params}, image, **kwargs)[0])


def make_batches(n=13, batch_size=6, num_classes=7, multi_hot=False):
  """Returns batches whose last is padded with NaN: it must not be seen."""
  rng = np.random.default_rng(0)
  image = rng.uniform(-1, 1, size=(n, 12, 12, 3)).astype(np.float32)
  labels = np.eye(num_classes, dtype=np.float32)[rng.integers(num_classes, size=n)]
  if multi_hot:
    labels = np.maximum(labels, np.roll(labels, 1, axis=0))
  arrays = {"image": image, "labels": labels, "_mask": np.ones(n, np.float32)}
  pad = -n % batch_size
  arrays = {
    k: np.concatenate([a, np.full((pad, *a.shape[1:]), 0 if k == "_mask" else np.nan, a.dtype)])
    for k, a in arrays.items()
  }
  whole = range(0, n + pad, batch_size)
  return [{k: a[i : i + batch_size] for k, a in arrays.items()} for i in whole]


def evaluate(batches, num_classes=7, **options):
  model, params = make_model(num_classes)
  evaluator = classification(model, batches, sharding.make_mesh(), **{"seqhw": SIZES, **options})
  return evaluator.run(params)


def expected(batches, size, num_classes=7, loss="softmax_xent"):
  """The same in NumPy, from the logits of the real images."""
  real = {k: np.concatenate([b[k] for b in batches]) for k in ("image", "labels", "_mask")}
  image, labels = (real[k][real["_mask"] > 0] for k in ("image", "labels"))
  logits = np.asarray(forward(num_classes, size)(jnp.asarray(image)), np.float64)
  order = np.argsort(-logits, axis=-1)
  right = np.take_along_axis(labels, order, axis=-1) > 0
  softmax = -(labels * scipy.special.log_softmax(logits, axis=-1)).sum(-1)
  sigmoid = -(labels * np.log(scipy.special.expit(logits))).sum(-1) - (
    (1 - labels) * np.log(scipy.special.expit(-logits))
  ).sum(-1)
  return {
    "top1": right[:, 0].mean(),
    "top5": right[:, :5].any(-1).mean(),
    "loss": {"softmax_xent": softmax, "sigmoid_xent": sigmoid}[loss].mean(),
  }


@pytest.mark.parametrize(
  ("data", "options"),
  [
    (dict(), dict()),
    (dict(multi_hot=True), dict(loss="sigmoid_xent")),
    (dict(num_classes=3), dict()),
  ],
  ids=["one_hot", "multi_hot", "three_classes"],
)
def test_means_are_those_of_the_real_images(data, options):
  num_classes = data.get("num_classes", 7)
  batches = make_batches(**data)
  rows = evaluate(batches, num_classes, **options)
  assert [row["seqhw"] for row in rows] == [2, "3x4"]
  for size, row in zip(SIZES, rows, strict=True):
    assert row.keys() == {"seqhw", "top1", "top5", "loss", "n"} and row["n"] == 13
    want = expected(batches, size, num_classes, **options)
    assert (row["top1"], row["top5"]) == pytest.approx((want["top1"], want["top5"]), abs=1e-12)
    np.testing.assert_allclose(row["loss"], want["loss"], rtol=1e-6)
  if num_classes < 5:
    assert {row["top5"] for row in rows} == {1.0}
  else:
    assert any(0 < row["top1"] < row["top5"] < 1 for row in rows)  # or the test would prove little


def test_results_do_not_depend_on_the_batch_size():
  small, large = (evaluate(make_batches(batch_size=n), seqhw=[2]) for n in (6, 13))
  assert small[0]["top1"] == large[0]["top1"] and small[0]["n"] == large[0]["n"]
  np.testing.assert_allclose(small[0]["loss"], large[0]["loss"], rtol=1e-6)


def test_each_image_is_read_and_decoded_once_for_all_sizes():
  read = collections.Counter()

  def records(indices):
    read.update(int(i) for i in indices)
    image = np.zeros((12, 12, 3), np.uint8)
    return [{"image": image + np.uint8(i), "label": i % 7, "id": str(i)} for i in indices]

  source = Source("counted", "test", 7, None, 10, records)
  pp = "value_range(-1, 1)|onehot(7)|keep('image', 'labels')"
  batches = eval_batches(source, pp, batch_size=4, threads=0, workers=0)
  model, params = make_model()
  evaluator = classification(model, batches, sharding.make_mesh(), seqhw=SIZES)
  evaluator.compile(params)
  read.clear()  # to compile, the first batch is looked at
  rows = evaluator.run(params)
  assert read == dict.fromkeys(range(10), 1)
  assert [row["n"] for row in rows] == [10, 10]


def test_each_size_is_traced_once_for_all_evaluations(monkeypatch):
  module = importlib.import_module("flexivit_jax.evaluators.classification")
  traced, original = [], module.eval_step

  def counted(*args, **kwargs):
    traced.append(kwargs.get("seqhw", kwargs.get("grid_hw")))
    return original(*args, **kwargs)

  monkeypatch.setattr(module, "eval_step", counted)
  model, params = make_model()
  compiled = []
  evaluator = classification(model, make_batches(), sharding.make_mesh(), seqhw=SIZES)
  evaluator.compile(params, report=lambda size, program: compiled.append(size))
  assert traced == SIZES and compiled == [per_size.static(size) for size in SIZES]
  first = evaluator.run(params)
  evaluator.costs(params, repeats=1)
  other = evaluator.run(jax.tree.map(lambda x: 2 * x, params))
  assert traced == SIZES
  assert evaluator.run(params) == first != other


def test_costs_say_patch_tokens_gflops_and_time_of_one_image():
  model, params = make_model()
  evaluator = classification(model, make_batches(), sharding.make_mesh(), seqhw=SIZES)
  evaluator.compile(params)
  rows = evaluator.costs(params, repeats=2)
  assert [(row["patch"], row["tokens"]) for row in rows] == [(6, 4), ("4x3", 12)]
  for row, grid in zip(rows, [(2, 2), (3, 4)], strict=True):
    assert row["gflops"] == 2 * flexivit.gmacs(model, (12, 12), grid)
    assert 0 < row["ms"] < 1e3


def test_mistakes_are_errors_before_anything_is_compiled():
  batches = make_batches()
  with pytest.raises(UserError, match=r"Unknown loss 'softmax'; .*Did you mean 'softmax_xent'"):
    evaluate(batches, loss="softmax")
  with pytest.raises(UserError, match=r"seqhw=5 does not divide the image \(12, 12\)"):
    evaluate(batches, seqhw=[2, 5])
  for key in ("labels", "_mask"):
    lacking = [{k: a for k, a in batch.items() if k != key} for batch in batches]
    with pytest.raises(UserError, match=rf"batches lack \['{key}'\], they have \[.*'image'.*mend"):
      evaluate(lacking)


def test_sizes_are_integers_or_pairs():
  assert per_size.static(8) == {"seqhw": 8}
  assert per_size.static((2, 4)) == {"grid_hw": (2, 4)}
  assert [per_size.size_text(s) for s in (8, (2, 4))] == [8, "2x4"]
