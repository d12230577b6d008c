"""Confusion matrices and accuracies of classes: counted on the device, in eval.json, on the report's page."""

import json

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.metrics

from flexivit_jax import errors, report, train as train_lib
from flexivit_jax.devices import sharding
from flexivit_jax.evaluators.classification import (
  classification,
  confusion,
  scores,
  table_classes,
)
from flexivit_jax.evaluators.per_size import per_class
from flexivit_jax.evaluators.sums import masked_sums
from flexivit_jax.models import FlexiViT
from flexivit_jax.report import classes, runs
from flexivit_jax.running import metrics_writer

DATA = dict(name="synthetic", image_size=8, num_classes=3, num_examples=20)
PP = "decode|value_range(-1, 1)|onehot(3)|keep('image', 'labels')"
CONFIG = dict(
  total_steps=2,
  input=dict(data=dict(DATA, split="train"), pp=PP, batch_size=8, threads=0),
  model=dict(width=8, depth=1, mlp_dim=16, num_heads=2, patch_size=(4, 4), posemb_size=(2, 2)),
  flexi=dict(seqhw=dict(v=(2,))),
  optim=dict(lr=1e-2),
  evals=dict(
    test=dict(
      data=dict(DATA, split="test"), pp=PP, batch_size=8, seqhw=(2, 4), threads=0, per_class=True
    )
  ),
  checkpoint=dict(best="test/top1_macro"),
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  return train_lib.train(CONFIG, tmp_path_factory.mktemp("per_class") / "run <b>")


@hypothesis.settings(max_examples=6)
@hypothesis.given(
  st.lists(st.tuples(*[st.integers(0, 4)] * 2, st.booleans()), min_size=12, max_size=12)
)
def test_counts_are_those_of_sklearn(examples):
  true, predicted, real = map(np.array, zip(*examples, strict=True))
  logits, labels = (jax.nn.one_hot(jnp.asarray(x), 5) for x in (predicted, true))
  found = np.asarray(confusion(logits, labels, jnp.asarray(real, jnp.float32)))
  expected = np.zeros((5, 5), int)
  if real.any():
    expected = sklearn.metrics.confusion_matrix(true[real], predicted[real], labels=range(5))
  np.testing.assert_array_equal(found[:-1], expected)
  assert found[-1].sum() == 0 and found.sum() == real.sum()
  if real.any():
    row = per_class(found)
    in_both = np.isin(predicted[real], true[real])  # others make sklearn warn
    if in_both.all():
      wanted = sklearn.metrics.balanced_accuracy_score(true[real], predicted[real])
      assert row["top1_macro"] == pytest.approx(wanted)
    assert row["confusion"] == expected.tolist()


@hypothesis.settings(max_examples=6)
@hypothesis.given(st.integers(0, 2**32 - 1))
def test_the_diagonal_is_what_top1_counts_whatever_the_labels_are(seed):
  rng = np.random.default_rng(seed)
  logits = jnp.asarray(rng.normal(size=(16, 4)), jnp.float32)
  labels = jnp.asarray(rng.random((16, 4)) < 0.3, jnp.float32)  # several labels, and none
  mask = jnp.asarray(rng.random(16) < 0.8, jnp.float32)
  table = np.asarray(confusion(logits, labels, mask))
  right = scores(logits, labels, "softmax_xent")["top1"]
  assert table[:-1].diagonal().sum() == masked_sums({"x": right}, mask).total["x"]
  assert table.sum() == mask.sum()
  unlabelled = ((labels == 0).all(axis=-1) & (mask > 0)).sum()
  assert table[-1].sum() == unlabelled == per_class(table).get("unlabelled", 0)


def test_a_run_writes_counts_that_add_up_to_its_images(run):
  text = (run / "eval.json").read_text()
  data = json.loads(text)
  assert data["classes"] == ["0", "1", "2"]
  for row in data["rows"]:
    counts = np.array(row["confusion"])
    assert counts.shape == (3, 3) and counts.sum() == row["n"] == 20
    assert counts.sum(axis=1).tolist() == [7, 7, 6]
    assert row["top1"] == pytest.approx(counts.trace() / 20)
    assert row["top1_macro"] == pytest.approx((counts.diagonal() / [7, 7, 6]).mean())
    assert f"[{', '.join(map(str, counts[0]))}]" in text  # a class is one line
  last = metrics_writer.read_rows(run / "metrics.jsonl")[-1]
  assert last["test/top1_macro/seqhw=2"] == data["rows"][0]["top1_macro"]
  assert not any("confusion" in key for key in last)
  assert list((run / "best").glob("[0-9]*"))


def count_on_eight_devices(file):
  """The table of the same batches there; see `test_the_counts_are_the_same_on_eight_devices`."""
  batches = [{k: v for k, v in np.load(f"{file}.{i}.npz").items()} for i in range(2)]
  mesh = sharding.make_mesh()
  assert mesh.size == 8
  model = _model()
  params = model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)), seqhw=2)["params"]
  params = jax.device_put(params, sharding.replicated(mesh))
  rows = classification(model, batches, mesh, seqhw=(2,), per_class=True).run(params)
  assert rows[0]["confusion"] == np.load(f"{file}.npy").tolist()


def _model():
  return FlexiViT(
    num_classes=4, width=8, depth=1, mlp_dim=16, num_heads=2, patch_size=(4, 4), posemb_size=(2, 2),
    head_zeroinit=False,
  )  # fmt: skip


@pytest.mark.slow
def test_the_counts_are_the_same_on_eight_devices(tmp_path, on_eight_devices):
  rng, file = np.random.default_rng(0), tmp_path / "batch"
  batches = []
  for i in range(2):
    image = rng.normal(size=(16, 8, 8, 3)).astype(np.float32)
    labels = np.eye(4, dtype=np.float32)[rng.integers(0, 4, 16)]
    batches.append({"image": image, "labels": labels, "_mask": np.float32(rng.random(16) < 0.7)})
    np.savez(f"{file}.{i}.npz", **batches[-1])
  mesh, model = sharding.make_mesh(), _model()
  params = model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)), seqhw=2)["params"]
  rows = classification(model, batches, mesh, seqhw=(2,), per_class=True).run(params)
  counts = np.array(rows[0]["confusion"])
  assert counts.sum() == sum(b["_mask"].sum() for b in batches)
  np.save(f"{file}.npy", counts)
  on_eight_devices(count_on_eight_devices, str(file))


def test_more_classes_than_a_table_bears_are_refused():
  model = FlexiViT(num_classes=1001, width=8, depth=1, mlp_dim=16, num_heads=2)
  with pytest.raises(errors.UserError, match=r"per_class=True of 1001 classes.*at most 1000"):
    classification(model, [], None, seqhw=(2,), per_class=True)


@pytest.mark.parametrize(
  ("names", "num_classes", "label_map", "expected"),
  [
    (("cat", "dog"), 2, None, ["cat", "dog"]),
    (None, 2, None, ["0", "1"]),
    (None, 1000, "i1k_a", 200),
    (tuple(f"c{i}" for i in range(200)), 200, "i1k_a", [f"c{i}" for i in range(200)]),
  ],
)
def test_names_of_classes(names, num_classes, label_map, expected):
  found = table_classes(names, num_classes, label_map)
  assert (len(found) if isinstance(expected, int) else found) == expected


# --- the report ---


def written(tmp_path, counts, **changes):
  counts = np.array(counts)
  row = dict(
    seqhw=2, patch=4, tokens=4, gflops=1.0, top1=counts.trace() / counts.sum(), loss=1.0,
    n=int(counts.sum()), top1_macro=0.25, confusion=counts.tolist(),
  )  # fmt: skip
  file = tmp_path / "eval.json"
  data = {"name": "r", "classes": [f"<{i}>" for i in range(len(counts))], "rows": [row]}
  data["rows"][0] |= changes.pop("row", {})
  file.write_text(json.dumps(data | changes))
  return file


def test_the_page_has_the_worst_class_first_and_a_matrix(run, tmp_path):
  page = report.report([run], tmp_path).read_text()
  assert "Classes: run &lt;b&gt;" in page and '<th scope="col">macro<small>%' in page
  counts = [[5, 1, 0], [0, 0, 4], [1, 1, 3]]
  page = report.report([written(tmp_path, counts)], tmp_path / "other").read_text()
  table = page[page.index('class="classes"') :]
  order = [table.index(f"&lt;{k}&gt;</span></th><td") for k in (1, 2, 0)]
  assert order == sorted(order)
  assert table.count('class="wrong"') == 4 and "<script" not in page


def test_of_many_classes_the_page_lists_the_most_confused_pairs(tmp_path):
  counts = np.diag(np.arange(40)) + np.eye(40, k=1, dtype=int)
  counts[7, 3] = 50
  page = report.report([written(tmp_path, counts)], tmp_path / "out").read_text()
  pairs = page[page.index('class="pairs"') :]
  assert 'class="heat"' not in page
  assert pairs.index(">&lt;7&gt;") < pairs.index(">&lt;3&gt;") < pairs.index("<td>50</td>")
  assert classes.confused(counts)[0] == (7, 3, 50)


def test_a_report_without_counts_is_as_it_was(tmp_path):
  file = written(tmp_path, np.eye(3, dtype=int), row={"confusion": None, "top1_macro": None})
  page = report.report([file], tmp_path / "out").read_text()
  assert 'class="classes"' not in page and "macro" not in page


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"row": {"confusion": [[1, 2]]}}, r"confusion is 'no table'; expected k lists of k counts"),
    ({"row": {"confusion": [[1, 2], [3]]}}, r"expected k lists of k counts"),
    ({"row": {"confusion": [[1.5, 2], [3, 1]]}}, r"expected k lists of k counts"),
    ({"row": {"confusion": [[-1, 2], [1, 1]]}}, r"expected k lists of k counts"),
    ({"row": {"n": 4}}, r"a table of 3'; expected counts of 4 images"),
    ({"row": {"confusion": 3}}, r"confusion is 3; expected a list"),
    ({"classes": ["a"]}, r"classes is .*expected one name for each row"),
  ],
)
def test_a_damaged_table_is_named(tmp_path, changes, message):
  with pytest.raises(errors.UserError, match=message):
    runs.read(written(tmp_path, np.eye(3, dtype=int), **changes))
