"""Zero-shot classification against NumPy, on one device and on eight, and from a config."""

import functools
import json

import jax
import numpy as np
import pytest

from flexivit_jax import experiment
from flexivit_jax.data import label_maps, text
from flexivit_jax.devices import sharding
from flexivit_jax.errors import UserError
from flexivit_jax.evaluators import zero_shot as module
from flexivit_jax.evaluators.classification import classification
from flexivit_jax.evaluators.zero_shot import zero_shot
from flexivit_jax.models import FlexiViT, TwoTowers
from flexivit_jax.training import steps

NAMES = ["Red_car", "blue car, auto", "cat", "dog's", "tree", "house", "sea"]
TEMPLATES = ["a photo of a {}.", "The {}!", "{}"]
SIZES = [2, 4]


@functools.cache
def made():
  model = TwoTowers(
    image=dict(width=16, depth=1, mlp_dim=16, num_heads=2, patch_size=(6, 6), posemb_size=(2, 2)),
    text=dict(width=12, depth=1, mlp_dim=16, num_heads=2, vocab_size=258, max_length=24),
    embed_dim=3,
  )
  shapes = {"image": (12, 12, 3), "tokens": (24,)}
  params = jax.eval_shape(lambda: steps.init_params(model, shapes, 0))
  rng = np.random.default_rng(1)
  params = jax.tree.map(lambda a: np.float32(rng.normal(size=a.shape)), params)
  return model, params, text.load("bytes", length=24, pad="[END]", end="[END]")


def batches(classes=7, n=21):
  """Images in batches of 8, the last padded with NaN; every third has two labels, the last one none."""
  rng = np.random.default_rng(0)
  labels = np.eye(classes)[np.arange(n) % classes]
  labels[::3, -1], labels[-1] = 1, 0
  whole = {"image": rng.uniform(-1, 1, (n, 12, 12, 3)), "labels": labels, "_mask": np.ones(n)}
  filler = -n % 8
  whole = {
    k: np.concatenate([a, np.full((filler, *a.shape[1:]), np.nan)]) for k, a in whole.items()
  }
  whole["_mask"][n:] = 0
  return [{k: np.float32(v[i : i + 8]) for k, v in whole.items()} for i in range(0, n, 8)]


def run(data=None, **options):
  model, params, tokens = made()
  given = dict(class_names=NAMES, tokens=tokens, seqhw=SIZES, templates=TEMPLATES) | options
  mesh = sharding.make_mesh()
  return zero_shot(model, data or batches(), mesh, **given).run(params)


@functools.cache
def of_texts(texts):
  model, params, tokens = made()
  embed = jax.jit(lambda t: model.apply({"params": params}, tokens=t)[0])
  return np.float64(embed(tokens.encode(texts)))


@functools.cache
def of_images(seqhw):
  model, params, _ = made()
  image = np.concatenate([b["image"] for b in batches()])[:21]
  return np.float64(jax.jit(lambda x: model.apply({"params": params}, x, seqhw=seqhw)[0])(image))


def by_numpy(seqhw, labels, places, candidates, templates):
  """The accuracies, where `labels` [n, k] stand at `places` among the candidates."""
  total = 0
  for template in templates:
    found = of_texts(tuple(template.replace("{}", name) for name in candidates))
    total = total + found / np.linalg.norm(found, axis=1, keepdims=True)
  total /= np.linalg.norm(total, axis=1, keepdims=True)
  order = np.argsort(-(of_images(seqhw) @ total.T), axis=1, kind="stable")
  right = np.zeros((len(labels), len(candidates)), bool)
  right[:, places] = labels > 0
  hits = np.take_along_axis(right, order, axis=1)
  return hits[:, 0], hits[:, :5].any(axis=1)


CANONICAL = ["red car", "blue car", "cat", "dogs", "tree", "house", "sea"]
PLAIN = ["a photo of a {}", "the {}", "{}"]


@pytest.mark.parametrize("rows", [pytest.param(256, marks=pytest.mark.full), 3])
def test_accuracies_are_those_of_the_mean_embedding_of_all_templates(rows, monkeypatch):
  monkeypatch.setattr(module, "ROWS", rows)
  labels = np.concatenate([b["labels"] for b in batches()])[:21]
  for row, seqhw in zip(run(), SIZES, strict=True):
    top1, top5 = by_numpy(seqhw, labels, np.arange(7), CANONICAL, PLAIN)
    assert row == {"seqhw": seqhw, "top1": top1.mean(), "top5": top5.mean(), "n": 21}
    assert 0 < row["top1"] < row["top5"] < 1
  (row, _) = run(skip_unlabelled=True)
  assert (
    row["n"] == 20
    and row["top1"] == by_numpy(2, labels, np.arange(7), CANONICAL, PLAIN)[0].sum() / 20
  )


@pytest.mark.full
def test_names_and_templates_are_taken_as_they_are_where_that_is_asked():
  labels = np.concatenate([b["labels"] for b in batches()])[:21]
  rows = run(canonical=False)
  top1, top5 = by_numpy(4, labels, np.arange(7), NAMES, TEMPLATES)
  assert (rows[1]["top1"], rows[1]["top5"]) == (top1.mean(), top5.mean())
  named = run(class_names=["x"] * 7, names=NAMES)
  assert named == run()


@pytest.mark.full
def test_some_classes_are_scored_among_themselves_all_or_others_too():
  labels = np.concatenate([b["labels"] for b in batches()])[:21, [2, 4]]
  counted = labels.any(axis=1)
  wide = [*CANONICAL[::-1], "boat", "plane"]
  for candidates, places, given in (
    (CANONICAL, [2, 4], {}),  # generalised: all names compete
    (["cat", "tree", "sea"], [0, 1], {"candidates": ["cat", "Tree", "sea"]}),
    (wide, [4, 2], {"candidates": wide}),
  ):
    rows = run(classes=["CAT", "tree"], seqhw=[4], **given)
    for row in rows:
      top1, top5 = by_numpy(row["seqhw"], labels, places, candidates, PLAIN)
      assert row["n"] == counted.sum() == 6
      assert (row["top1"], row["top5"]) == (top1[counted].mean(), top5[counted].mean())


@pytest.mark.full
def test_a_label_map_keeps_its_classes_of_the_labels_and_of_the_names(monkeypatch):
  small = label_maps.LabelMap(7, columns=(5, 1, 2), labels={3: (0, 1, 2), 7: (5, 1, 2)})
  monkeypatch.setattr(label_maps, "label_map", lambda name: small)
  labels = np.concatenate([b["labels"] for b in batches()])[:21, [5, 1, 2]]
  kept = ["house", "blue car", "cat"]
  (row, _) = run(label_map="i1k_a")
  assert row["n"] == 21
  assert row["top1"] == by_numpy(2, labels, [0, 1, 2], kept, PLAIN)[0].mean()
  (row, _) = run(label_map="i1k_a", candidates=NAMES)
  assert row["top1"] == by_numpy(2, labels, [5, 1, 2], CANONICAL, PLAIN)[0].mean()
  own = np.concatenate([b["labels"] for b in batches(3)])[:21]
  (row, _) = run(batches(3), label_map="i1k_a")
  assert row["top1"] == by_numpy(2, own, [0, 1, 2], kept, PLAIN)[0].mean()


@pytest.mark.parametrize(
  ("options", "expected"),
  [
    (dict(class_names=None), "The data name no classes; give names"),
    (dict(names=["cat", ""]), "Name 1 of 2, '', is empty"),
    (dict(names=["cat"] * 7), "Names 0 and 1 and .* are the same text, 'cat'"),
    (dict(names=["cat", "dog"]), "The labels have 7 classes, expected 2"),
    (dict(classes=["cta"]), r"class 'cta' is not among the 7 names. Did you mean 'cat'\?"),
    (dict(candidates=["cat", "sea"]), "scored class 'red car' is not among the 2 candidates"),
    (dict(label_map="i1k_a"), "is of 1000 classes, and there are 7 names"),
    (dict(label_map="i1k_a", classes=["cat"]), "both say what is scored"),
    (dict(templates="two"), "templates='two' is neither of"),
    (dict(tokens=None), "needs the tokenizer of the text tower"),
  ],
)
def test_what_cannot_be_asked_is_refused(options, expected):
  with pytest.raises(UserError, match=expected):
    run(**options)


@pytest.mark.full
def test_sentences_that_are_cut_are_counted():
  (row,) = run(templates=["a long sentence about a {}", "{}"], seqhw=[2])
  assert row["sentences_cut"] == 7 and list(run(seqhw=[2])[0]) == ["seqhw", "top1", "top5", "n"]


def test_a_model_without_texts_is_refused():
  with pytest.raises(UserError, match="A FlexiViT embeds no texts"):
    zero_shot(FlexiViT(variant="mu"), batches(), None, class_names=NAMES, seqhw=SIZES)


def test_the_classes_of_two_towers_are_no_logits():
  with pytest.raises(UserError, match="has no classes, but texts; use type='zero_shot'"):
    classification(made()[0], batches(), None, seqhw=SIZES)


def on_all_devices(path: str) -> None:
  """Writes the rows on all devices that there are, and how many these are."""
  with open(path, "w") as file:
    json.dump({"rows": run(), "devices": jax.device_count()}, file)


@pytest.mark.full
def test_eight_devices_find_as_one(tmp_path, on_eight_devices):
  on_eight_devices(on_all_devices, str(tmp_path / "eight.json"))
  found = json.loads((tmp_path / "eight.json").read_text())
  assert found == {"rows": run(), "devices": 8}


@pytest.mark.full
def test_a_config_asks_for_it():
  data = dict(name="digits", split="test[:40]")
  pp = "resize(12)|value_range(-1, 1)|onehot(10)|keep('image', 'labels')"
  names = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
  section = dict(
    type="zero_shot", data=data, pp=pp, batch_size=20, seqhw=(2,), names=names, threads=0,
    templates="clip_best",
  )  # fmt: skip
  model, params, tokens = made()
  build = functools.partial(experiment.build_evaluation, "evals.test", every=1)
  evaluation = build(section, tokens=tokens)
  evaluator = evaluation.make(model, sharding.make_mesh())
  (row,) = evaluator.run(params)
  assert row["n"] == 40 and [m.name for m in evaluation.metrics] == ["top1", "top5"]
  assert [c["tokens"] for c in evaluator.costs(params, 1)] == [4]
  build(section).check(model)  # as a plan does, without the tokenizer
  with pytest.raises(UserError, match=r"evals\.test\.candidate.*evals\.test\.candidates"):
    build(section | {"candidate": names})
