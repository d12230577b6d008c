"""Queries of detection: own classes are always asked for, and what is drawn depends on the example alone."""

import dataclasses

import numpy as np
import pytest

from flexivit_jax.data import prompts, queries
from flexivit_jax.data.loader import eval_batches, train_batches
from flexivit_jax.data.preprocess import parse, tokens_of, without_files
from flexivit_jax.data.sources import Source
from flexivit_jax.data.text import load
from flexivit_jax.errors import UserError

NAMES = ("red_cell", "Platelet", "cat", "remote control", "dog", "owl", "bus", "kite")
BYTES = "'bytes', length=24, pad='[PAD]', end='[END]'"
KEPT = "keep('image', 'boxes', 'box_mask', 'box_targets', 'queries')"
PP = (
  "decode|flip_lr|sample_queries(6, 3)|value_range|pad_boxes(4)|relative_boxes('xyxy')"
  f"|query_tokens({BYTES}, templates=['a {{}}.', 'one {{}}'])|{KEPT}"
)


def scene(i: int) -> dict:
  rng = np.random.default_rng(i)
  number = i % 4
  low = rng.uniform(0, 4, (number, 2))
  return {
    "image": np.full((8, 8, 3), i, np.uint8),
    "boxes": np.concatenate([low, low + 3], 1).astype(np.float32),
    "box_labels": rng.integers(0, len(NAMES), number),
    "id": str(i),
  }


def scenes(size: int = 40, names: tuple[str, ...] | None = NAMES) -> Source:
  return Source("scenes", "train", len(NAMES), names, size, lambda at: [scene(i) for i in at])


def asked(record: dict, number: int, negatives: int, seed: int = 0) -> dict:
  rng = np.random.default_rng(seed)
  return queries.sample_queries(record, number, negatives, num_classes=len(NAMES), rng=rng)


def test_own_classes_are_asked_for_then_stated_negatives_then_others():
  for seed in range(50):
    record = scene(3) | {"neg_labels": np.array([6, 1]), "not_exhaustive": np.array([0, 7])}
    record["box_labels"] = np.array([5, 2, 5])
    made = asked(record, 6, 3, seed)
    found = made["query_labels"]
    assert found.dtype == np.int32 and found[:2].tolist() == [2, 5]
    assert set(found[2:4].tolist()) == {1, 6} and found[4] in (3, 4) and found[5] == -1
    targets = np.array([[0, 1, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0], [0, 1, 0, 0, 0, 0]], np.float32)
    np.testing.assert_array_equal(made["box_targets"], targets)
  assert len({tuple(asked(scene(3), 6, 3, seed)["query_labels"]) for seed in range(9)}) > 5


def test_stated_negatives_are_all_taken_and_room_ends_the_draw():
  record = scene(0) | {"neg_labels": np.array([6, 1, 3])}
  assert sorted(asked(record, 8, 1)["query_labels"][:4].tolist()) == [-1, 1, 3, 6]
  assert len(set(asked(record, 2, 1)["query_labels"].tolist()) & {1, 3, 6}) == 2
  assert (asked(scene(0), 3, 0)["query_labels"] == -1).all()
  whole = asked(scene(3), 20, 20)["query_labels"]  # there are no more classes than these
  assert sorted(whole[:8].tolist()) == [*range(8)] and (whole[8:] == -1).all()
  contradiction = scene(3) | {"not_exhaustive": scene(3)["box_labels"], "neg_labels": np.array([])}
  own = np.unique(scene(3)["box_labels"])
  np.testing.assert_array_equal(asked(contradiction, 6, 0)["query_labels"][: len(own)], own)


def test_boxes_of_several_classes_keep_them():
  targets = np.zeros((2, len(NAMES)), np.float32)
  targets[0, [1, 4]] = targets[1, 4] = 1
  made = asked({"box_targets": targets}, 5, 1)
  assert made["query_labels"][:2].tolist() == [1, 4]
  np.testing.assert_array_equal(made["box_targets"][:, :2], [[1, 1], [0, 1]])
  assert not made["box_targets"][:, 2:].any()


def test_more_own_classes_than_queries_is_an_error():
  record = {"box_labels": np.arange(4)}
  with pytest.raises(UserError, match=r"have 4 classes, for which sample_queries\(3\) has no room"):
    asked(record, 3, 1)


def test_one_template_is_drawn_for_each_name():
  tokens = load("bytes", length=24, pad="[PAD]", end="[END]")
  made = prompts.templates(["a {}.", "one {}"])
  seen = set()
  pp = parse(f"query_tokens({BYTES}, templates={made!r})").of_classes(NAMES, len(NAMES))
  for seed in range(40):
    record = {"query_labels": np.array([0, 3, -1, 1], np.int32)}
    got = pp(record, np.random.default_rng(seed))["queries"]
    assert got.shape == (4, 24) and got.dtype == np.int32 and not got[2].any()
    texts = ["red cell", "remote control", "platelet"]
    for row, text in zip(got[[0, 1, 3]], texts, strict=True):
      rows = tokens.encode([f"a {text}", f"one {text}"])
      seen.add((text, *np.flatnonzero((rows == row).all(1)).tolist()))
  assert seen == {(text, k) for text in texts for k in (0, 1)}


def test_vectors_are_matched_by_name(tmp_path):
  path = tmp_path / "names.npz"
  order = np.random.default_rng(0).permutation(len(NAMES))
  vectors = np.arange(1, 17, dtype=np.float32).reshape(8, 2)
  np.savez(path, names=np.array(NAMES)[order], vectors=vectors[order])
  pp = parse(f"query_vectors({str(path)!r})").of_classes(NAMES, len(NAMES))
  got = pp({"query_labels": np.array([7, -1, 0], np.int32)}, None)["queries"]
  assert got.dtype == np.float32
  np.testing.assert_array_equal(got, [vectors[7], [0, 0], vectors[0]])
  with pytest.raises(UserError, match=r"no vector of 1 of the 2 classes: 'owls'"):
    parse(f"query_vectors({str(path)!r})").of_classes(("cat", "owls"), 2)
  np.savez(path, names=np.array(["cat", "cat"]), vectors=vectors[:2])
  with pytest.raises(UserError, match="two vectors of 'cat'"):
    parse(f"query_vectors({str(path)!r})").of_classes(("cat",), 1)
  np.savez(path, names=np.array(["cat"]), vectors=np.zeros((1, 2)))
  with pytest.raises(UserError, match=r"vector of 'cat' in .* is zero or not finite"):
    parse(f"query_vectors({str(path)!r})").of_classes(("cat",), 1)
  np.savez(path, names=np.array(["cat"]), vectors=np.zeros(2))
  with pytest.raises(UserError, match=r"expected texts \[k\] and floats \[k, d\]"):
    parse(f"query_vectors({str(path)!r})").of_classes(("cat",), 1)
  path.write_bytes(b"")
  with pytest.raises(UserError, match=r"cannot be read as an \.npz"):
    parse(f"query_vectors({str(path)!r})").of_classes(("cat",), 1)


@pytest.mark.parametrize(
  ("names", "pp", "expected"),
  [
    (None, f"query_tokens({BYTES})", "query_tokens needs the names of the classes"),
    (None, "query_vectors('names.npz')", "query_vectors needs the names of the classes"),
    (("cat", "_"), f"query_tokens({BYTES})", "Name 1 of 2, '_', is empty"),
    (("a cat", "a_cat"), f"query_tokens({BYTES})", "are the same text, 'a cat'"),
    (NAMES, f"query_tokens({BYTES}, templates=['a'])", "has no place"),
    (NAMES, "sample_queries(0, 1)", "expected 1 or more queries"),
    ((), "sample_queries(4, 1)", "and the data have none"),
  ],
)  # fmt: skip
def test_what_does_not_fit_the_classes_is_an_error_at_the_start(names, pp, expected):
  with pytest.raises(UserError, match=expected):
    parse(pp).of_classes(names, len(names or NAMES) if names != () else 0)
  source = dataclasses.replace(
    scenes(), class_names=names, num_classes=8 if names is None else len(names)
  )
  with pytest.raises(UserError, match=expected):
    train_batches(source, f"decode|{pp}|keep('image')", batch_size=2, seed=0, num_steps=1)


def test_order_of_operations_and_words_of_their_errors():
  rng = np.random.default_rng(0)
  pp = parse(f"query_tokens({BYTES})").of_classes(NAMES, 8)
  with pytest.raises(UserError, match="expected sample_queries"):
    pp(scene(1), rng)
  with pytest.raises(UserError, match="asks for the classes of the data"):
    parse("sample_queries(4, 2)")(scene(1), rng)
  with pytest.raises(UserError, match="no argument 'class_names'"):
    parse("sample_queries(4, 2, class_names=('a',))")
  with pytest.raises(UserError, match="box_labels"):
    asked({}, 4, 1)


def test_tokens_of_queries_are_those_of_a_run():
  assert tokens_of(PP) == load("bytes", length=24, pad="[PAD]", end="[END]")
  absent = PP.replace("'bytes'", "'nowhere/tokenizer.json'")
  assert tokens_of(without_files(absent)).length == 24


def test_vectors_may_be_random_and_always_the_same_for_a_name():
  made = queries.vectors_of("random:16", ("cat", "dog"))
  assert made.shape == (2, 16) and made.dtype == np.float32
  np.testing.assert_allclose(np.linalg.norm(made, axis=1), 1, rtol=1e-6)
  np.testing.assert_array_equal(queries.vectors_of("random:16", ("dog",)), made[1:])
  assert abs(made[0] @ made[1]) < 0.9
  for path in ("random:", "random:0", "random:x", "random:-3"):
    with pytest.raises(UserError, match="expected random:LENGTH"):
      queries.vectors_of(path, ("cat",))
  pp = "decode|query_vectors('nowhere.npz')|keep('queries')"
  assert without_files(pp, 384) == pp.replace("nowhere.npz", "random:384")
  assert without_files(pp.replace("('n", "(path='n"), 4).count("query_vectors('random:4')") == 1
  assert without_files(pp) == pp


def test_batches_of_queries_depend_on_nothing_but_seed_epoch_and_example():
  given = dict(batch_size=8, seed=3, num_steps=7)
  whole = list(train_batches(scenes(), PP, threads=0, **given))
  for other in ({"threads": 3}, {"threads": 0, "keep_mb": 0}):
    for a, b in zip(whole, train_batches(scenes(), PP, **given, **other), strict=True):
      for key in a:
        np.testing.assert_array_equal(a[key], b[key])
  parts = [
    list(train_batches(scenes(), PP, threads=0, process_index=k, process_count=2, **given))
    for k in (0, 1)
  ]
  for a, *halves in zip(whole, *parts, strict=True):
    for key in a:
      np.testing.assert_array_equal(a[key], np.concatenate([half[key] for half in halves]))
  (late,) = train_batches(scenes(), PP, threads=0, start_step=6, **given)
  np.testing.assert_array_equal(late["queries"], whole[6]["queries"])
  assert not np.array_equal(whole[0]["queries"], whole[5]["queries"])  # of another epoch


def test_an_evaluation_may_have_queries_without_a_seed():
  pp = f"decode|value_range|sample_queries(8, 8)|pad_boxes(4)|query_tokens({BYTES}, templates='name')|{KEPT}"
  first, again = (list(eval_batches(scenes(10), pp, batch_size=4, threads=0)) for _ in range(2))
  for a, b in zip(first, again, strict=True):
    np.testing.assert_array_equal(a["queries"], b["queries"])
