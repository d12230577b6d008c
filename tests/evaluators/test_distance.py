"""Agreement and distances against NumPy, padding not counted."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from flexivit_jax import errors
from flexivit_jax.devices import sharding
from flexivit_jax.evaluators.classification import classification
from flexivit_jax.evaluators.distance import distance
from flexivit_jax.models import FlexiViT
from flexivit_jax.objectives.distill import Teacher
from flexivit_jax.training import steps

FIELDS = dict(
  num_classes=7, patch_size=(6, 6), posemb_size=(2, 2), width=8, depth=1, mlp_dim=8, num_heads=2
)


def made(seed, **fields):
  model = FlexiViT(**FIELDS | fields)
  params = jax.jit(lambda: steps.init_params(model, {"image": (12, 12, 3)}, seed=seed))()
  rng = np.random.default_rng(seed)
  return model, jax.tree.map(lambda a: jnp.float32(rng.normal(size=a.shape)), params)


def batches():
  """13 images in batches of 6, the last padded with NaN."""
  rng = np.random.default_rng(0)
  whole = {
    "image": rng.uniform(-1, 1, (13, 12, 12, 3)),
    "large": rng.uniform(-1, 1, (13, 18, 18, 3)),
    "_mask": np.ones(13),
  }
  whole = {k: np.concatenate([a, np.full((5, *a.shape[1:]), np.nan)]) for k, a in whole.items()}
  whole["_mask"][13:] = 0
  return [{k: np.float32(a[i : i + 6]) for k, a in whole.items()} for i in (0, 6, 12)]


def logits_of(model, params, image, **size):
  out = jax.jit(lambda p, x: model.apply({"params": p}, x, **size)[0])(params, image)
  return np.asarray(out, np.float64)


def test_means_are_those_of_the_real_images():
  (model, params), (teacher, frozen) = made(0), made(4)
  professor = Teacher(teacher, frozen, "large", {"seqhw": 3})
  evaluator = distance(model, batches(), sharding.make_mesh(), seqhw=[2, 4], teacher=professor)
  rows = evaluator.run(params)
  real = {k: np.concatenate([b[k] for b in batches()])[:13] for k in ("image", "large")}
  target = logits_of(teacher, frozen, real["large"], seqhw=3)
  for row in rows:
    logits = logits_of(model, params, real["image"], seqhw=row["seqhw"])
    log_p, log_q = (scipy.special.log_softmax(x, axis=-1) for x in (target, logits))
    first = np.argsort(-logits, axis=-1)[:, :5] == target.argmax(-1)[:, None]
    assert row["n"] == 13
    assert row["agree1"] == pytest.approx(first[:, 0].mean(), abs=1e-6)
    assert row["agree5"] == pytest.approx(first.any(-1).mean(), abs=1e-6)
    assert row["kl"] == pytest.approx((np.exp(log_p) * (log_p - log_q)).sum(-1).mean(), rel=1e-4)
    far = np.sqrt(((log_p - log_q) ** 2).sum(-1)).mean()
    assert row["logsoftmax_euclidean"] == pytest.approx(far, rel=1e-4)
    each = (np.exp(log_p) * (log_p - log_q)).sum(-1)
    low, high = row["intervals"]["kl"]
    assert row["intervals"].keys() == {"kl", "logsoftmax_euclidean"}
    assert (low + high) / 2 == pytest.approx(row["kl"], abs=each.std() / 13**0.5)
    assert high - low == pytest.approx(3.92 * each.std() / 13**0.5, rel=0.25)
  assert any(0 < row["agree5"] < 1 for row in rows)  # or the test would prove little


def test_the_teacher_runs_once_for_all_sizes_and_labels_are_used_where_there_are(monkeypatch):
  module = importlib.import_module("flexivit_jax.evaluators.distance")
  traced, teach = [], module.teach
  monkeypatch.setattr(module, "teach", lambda *args: traced.append(1) or teach(*args))
  model, params = made(0)
  labels = np.float32(np.eye(7)[[3] * 6])
  data = [b | {"labels": labels} for b in batches()]
  itself, mesh = Teacher(model, params, "image", {"seqhw": 4}), sharding.make_mesh()
  rows = distance(model, data, mesh, seqhw=[2, 4, 6], teacher=itself, labels=True).run(params)
  plain = classification(model, data, mesh, seqhw=[2, 4, 6]).run(params)
  assert len(traced) == 1
  for row, want in zip(rows, plain, strict=True):
    assert {k: row[k] for k in ("top1", "top5")} == {k: want[k] for k in ("top1", "top5")}


def test_a_model_agrees_with_itself():
  model, params = made(0)
  itself = Teacher(model, params, "image", {"seqhw": 4})
  evaluator = distance(model, batches(), sharding.make_mesh(), seqhw=[4], teacher=itself)
  (row,) = evaluator.run(params)
  assert row["agree1"] == 1.0 and abs(row["kl"]) < 1e-5


def test_a_teacher_of_other_classes_is_an_error():
  (model, _), (teacher, frozen) = made(0), made(1, num_classes=3)
  with pytest.raises(errors.UserError, match="The teacher has 3 classes, the model 7"):
    professor = Teacher(teacher, frozen, "image", {})
    distance(model, batches(), sharding.make_mesh(), seqhw=[2], teacher=professor)
