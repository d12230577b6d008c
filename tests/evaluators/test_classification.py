"""Masked sums against NumPy; images are read once and programs traced once for all sizes."""

import collections
import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from flexivit_jax.data import label_maps
from flexivit_jax.data.loader import eval_batches
from flexivit_jax.data.sources import Source
from flexivit_jax.devices import sharding
from flexivit_jax.errors import UserError
from flexivit_jax.evaluators import per_size
from flexivit_jax.evaluators.classification import classification
from flexivit_jax.models import FlexiViT
from flexivit_jax.sizes import size_args, size_label
from flexivit_jax.training import steps

SIZES = [2, (3, 4)]
classification_module = importlib.import_module("flexivit_jax.evaluators.classification")


@functools.cache
def make_model(num_classes=7):
  model = FlexiViT(
    num_classes=num_classes, patch_size=(6, 6), posemb_size=(2, 2), width=8, depth=1, mlp_dim=8,
    num_heads=2, head_zeroinit=False,
  )  # fmt: skip
  init = jax.jit(lambda: steps.init_params(model, {"image": (12, 12, 3)}, seed=0))
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


# Of seven logits four stay; labels are over six classes, one of which the model lacks, or over those four and it.
SMALL = label_maps.LabelMap(
  model_classes=7, columns=(1, 2, 4, 6), labels={6: (0, 1, 3, 5), 5: (0, 1, 2, 4)}
)


@pytest.fixture
def small_map(monkeypatch):
  monkeypatch.setattr(label_maps, "label_map", {"small": SMALL}.__getitem__)


def some_labels(n, k):
  """Several labels an image, or one, or none."""
  rng = np.random.default_rng(1)
  labels = (rng.random((n, k)) < 0.25).astype(np.float32)
  assert {0, 1, 2} <= set(labels.sum(-1))
  return labels


@pytest.mark.parametrize("skip_unlabelled", [False, True])
@pytest.mark.parametrize("num_labels", [6, 5])
def test_label_maps_and_images_without_labels(small_map, num_labels, skip_unlabelled):
  """In NumPy, image by image: the prediction is a class of the set, and any of the image's labels is right."""
  n = 40
  batches, labels = make_batches(n=n, batch_size=n), some_labels(n, num_labels)
  rows = evaluate(
    [batches[0] | {"labels": labels}], label_map="small", skip_unlabelled=skip_unlabelled
  )
  for size, row in zip(SIZES, rows, strict=True):
    logits = np.asarray(forward(7, size)(jnp.asarray(batches[0]["image"])), np.float64)
    class_of = dict(zip(SMALL.columns, SMALL.labels[num_labels], strict=True))
    top1, loss = [], []
    for x, y in zip(logits, labels, strict=True):
      if skip_unlabelled and not y.any():
        continue
      best = max(class_of, key=lambda column: x[column])
      top1.append(y[class_of[best]] > 0)
      total = scipy.special.logsumexp([x[column] for column in class_of])
      loss.append(sum(total - x[column] for column, k in class_of.items() if y[k]))
    assert row["n"] == len(top1) == (np.count_nonzero(labels.any(-1)) if skip_unlabelled else n)
    assert row["top1"] == pytest.approx(np.mean(top1), abs=1e-12) and 0 < row["top1"] < 1
    np.testing.assert_allclose(row["loss"], np.mean(loss), rtol=1e-6)


def test_an_image_of_a_class_that_the_model_lacks_is_wrong_and_counts(small_map):
  batch = make_batches(n=6)[0]
  lacking = np.eye(6, dtype=np.float32)[[2] * 6]
  (row,) = evaluate(
    [batch | {"labels": lacking}], seqhw=[2], label_map="small", skip_unlabelled=True
  )
  assert (row["top1"], row["top5"], row["n"]) == (0, 0, 6)
  with pytest.raises(UserError, match="0 examples"):  # none has a label
    evaluate([batch | {"labels": 0 * lacking}], seqhw=[2], label_map="small", skip_unlabelled=True)


def test_real_any_label_is_right_and_images_without_are_left_out():
  """From records of several labels, through preprocessing and padding, to the row."""
  several = [(0, 3), (), (5,), (1, 2, 6), (), (4,), (0,), (), (2, 5), (6,)]
  picture = np.random.default_rng(0).integers(0, 256, (10, 12, 12, 3), np.uint8)

  def records(indices):
    return [{"image": picture[i], "label": several[i], "id": str(i)} for i in indices]

  pp = "value_range(-1, 1)|multihot(7)|keep('image', 'labels')"
  batches = eval_batches(Source("real", "test", 7, None, 10, records), pp, batch_size=4, threads=0)
  rows = evaluate(batches, skip_unlabelled=True)
  for size, row in zip(SIZES, rows, strict=True):
    image = jnp.asarray(picture.astype(np.float32) / np.float32(255) * 2 - 1)
    best = np.asarray(forward(7, size)(image)).argmax(-1)
    right = [b in labels for b, labels in zip(best, several, strict=True) if labels]
    assert row["n"] == len(right) == 7
    assert row["top1"] == pytest.approx(np.mean(right), abs=1e-12)


def test_objectnets_rule_is_the_best_of_each_of_its_classes():
  """As it is usually written: the largest logit of each ObjectNet class, then the best class."""
  rng = np.random.default_rng(0)
  folders = list(label_maps.objectnet().values())
  logits = rng.standard_normal((300, 1000)).astype(np.float32)
  truth = rng.integers(len(folders), size=300)
  for i, k in enumerate(truth):
    logits[i, folders[k][-1]] += 2
  labels = np.zeros((300, 1000), np.float32)
  for i, k in enumerate(truth):
    labels[i, list(folders[k])] = 1
  found = classification_module.scores(
    *classification_module.restricted(
      label_maps.label_map("i1k_objectnet"), jnp.asarray(logits), jnp.asarray(labels)
    ),
    "softmax_xent",
  )
  best = np.stack([logits[:, list(classes)].max(-1) for classes in folders], axis=-1).argmax(-1)
  np.testing.assert_array_equal(np.asarray(found["top1"]), best == truth)
  assert 0.2 < (best == truth).mean() < 0.8


def test_a_label_map_of_other_classes_is_an_error(small_map):
  batches = make_batches()
  with pytest.raises(
    UserError, match=r"labels have 7 classes, the model 7.* 6 or 5 .* models of 7"
  ):
    evaluate(batches, label_map="small")
  with pytest.raises(UserError, match="labels have 3 classes, the model 3"):
    evaluate(make_batches(num_classes=3), num_classes=3, label_map="small")


def test_an_unknown_label_map_is_an_error():
  with pytest.raises(UserError, match=r"Unknown label map 'i1k_b'; .*Did you mean"):
    evaluate(make_batches(), label_map="i1k_b")


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
  batches = eval_batches(source, pp, batch_size=4, threads=0, workers=0, keep_mb=0)
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
  assert traced == SIZES and compiled == [size_args(size) for size in SIZES]
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
    assert row["gflops"] == 2 * model.gmacs({"image": (12, 12, 3)}, grid_hw=grid)
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


def test_sizes_of_a_section():
  assert per_size.sizes_of([2, (3, 4)]) == [{"seqhw": 2}, {"grid_hw": (3, 4)}]
  assert per_size.sizes_of(stride=[2, 3]) == [{"stride": 2}, {"stride": 3}]
  assert per_size.sizes_of([2, 4], depth=[1, 2]) == [
    {"seqhw": s, "depth": k} for s in (2, 4) for k in (1, 2)
  ]
  for given in ({}, dict(depth=[1]), dict(seqhw=[2], stride=[3])):
    with pytest.raises(UserError, match=r"Got seqhw=.* and stride=.*; give one of them"):
      per_size.sizes_of(**given)


def test_rows_say_stride_and_depth():
  """Six pixels each three: 3 x 3 patches, after one block of two and after both."""
  model = FlexiViT(
    num_classes=7, patch_size=(6, 6), posemb_size=(2, 2), width=8, depth=2, mlp_dim=8,
    num_heads=2, head_zeroinit=False,
  )  # fmt: skip
  params = jax.jit(lambda: steps.init_params(model, {"image": (12, 12, 3)}, seed=0))()
  batches = make_batches()
  evaluator = classification(
    model, batches, sharding.make_mesh(), seqhw=(), stride=[3], depth=[1, 2]
  )
  rows = evaluator.run(params)
  assert [(r["seqhw"], r["stride"], r["depth"], r["n"]) for r in rows] == [
    (3, 3, 1, 13),
    (3, 3, 2, 13),
  ]
  assert [size_label(row) for row in rows] == ["3 stride=3 depth=1", "3 stride=3 depth=2"]
  real = {k: np.concatenate([b[k] for b in batches])[:13] for k in ("image", "labels")}
  for row in rows:
    logits, _ = model.apply({"params": params}, real["image"], stride=3, depth=row["depth"])
    want = -(real["labels"] * scipy.special.log_softmax(logits, axis=-1)).sum(-1).mean()
    np.testing.assert_allclose(row["loss"], want, rtol=1e-5)
  assert rows[0]["loss"] != rows[1]["loss"]
  costs = evaluator.costs(params, repeats=1)
  assert [(c["patch"], c["tokens"]) for c in costs] == [(6, 9), (6, 9)]
  for cost, depth in zip(costs, (1, 2), strict=True):
    assert cost["gflops"] == 2 * model.gmacs({"image": (12, 12, 3)}, stride=3, depth=depth)


def test_strides_and_depths_that_do_not_fit_are_errors():
  with pytest.raises(UserError, match="stride=4: patches"):
    evaluate(make_batches(), seqhw=(), stride=[4])
  model, params = make_model()
  evaluator = classification(model, make_batches(), sharding.make_mesh(), seqhw=[2], depth=[1, 2])
  compiled = []
  with pytest.raises(UserError, match="depth=2: the model has 1 blocks"):
    evaluator.compile(params, report=lambda size, program: compiled.append(size))
  assert not compiled
