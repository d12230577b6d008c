"""The tool that measures names which no text named: its splits, captions, ridges and table."""

import runpy

import numpy as np
import pytest

N, HELD_OUT = 60, 10


@pytest.fixture
def tool(repository):
  found = runpy.run_path(str(repository / "tools" / "paper" / "unseen_names.py"))
  found["main"].__globals__.update(HELD_OUT=HELD_OUT, GRIDS=(2, 4))
  return found


@pytest.fixture
def photos(tool):
  """Photos that a linear map makes of the texts; the tower's logits are how alike they are."""
  rng = np.random.default_rng(0)
  texts = rng.normal(size=(N, 12))
  pooled = texts @ rng.normal(size=(12, 8))
  names = [f"name {k}" for k in range(N)]
  return tool["Photos"](
    names, (), {2: -pooled, 4: pooled}, pooled, np.zeros(N), pooled @ pooled.T, texts, texts
  )


def test_splits_hold_out_other_names(tool):
  splits = [tool["split_of"](k, N) for k in range(N // HELD_OUT)]
  assert sorted(np.concatenate([s.unseen for s in splits])) == list(range(N))
  for s in splits:
    assert sorted([*s.seen, *s.unseen]) == list(range(N))


def test_captions_are_names_that_are_seen(tool, photos):
  split = tool["split_of"](1, N)
  names = tool["captions"](photos, split, "names")
  assert names == {k: [k] for k in split.seen}
  ranked = tool["captions"](photos, split, "ranked")
  for k, called in ranked.items():
    others = [i for i in split.seen if i != k]
    assert called == [k] * 3 + sorted(others, key=lambda i: -photos.logits[k, i])[:10]


def test_shuffled_captions_are_the_ranked_ones_with_names_permuted(tool, photos):
  split = tool["split_of"](0, N)
  ranked, shuffled = (tool["captions"](photos, split, kind) for kind in ("ranked", "shuffled"))
  permuted = {ranked[k][0]: shuffled[k][0] for k in ranked}
  assert sorted(permuted.values()) == sorted(split.seen)
  assert permuted != {k: k for k in permuted}
  assert {k: [permuted[i] for i in called] for k, called in ranked.items()} == shuffled


def test_ridges_name_what_is_linear_in_the_texts_at_the_size_they_are_fitted_at(tool, photos):
  rows = tool["measure_ridges"](photos, tool["split_of"](0, N))
  assert len(rows) == 2 * 2 * 3  # ridges, sizes, what is scored
  of = {(r["model"], r["scored"], r["seqhw"]): r["top1"] for r in rows}
  assert of["ridge to classes", "unseen", 4] == of["ridge to classes", "unseen_all", 4] == 1.0
  assert of["ridge to classes", "unseen", 2] < 0.3  # these photos point the other way


def test_the_locked_tower_is_resized_as_it_was_flexified(tool):
  model = dict(variant="Ti", kernel_operator="cubic_antialias", num_classes=1000, dtype="float32")
  made = tool["image_fields"]({"model": model})
  assert made == dict(variant="Ti", kernel_operator="cubic_antialias", num_classes=0)


def test_the_table_pools_the_splits(tool):
  row = dict(model="LiT", scored="unseen", seqhw=4)
  made = tool["table"]([row | dict(split=k, top1=top1) for k, top1 in enumerate((0.2, 0.4, 0.6))])
  assert len(made) == 1
  one = made[0]
  assert (one["patch"], one["top1"], one["n"], one["each"]) == (60, "40.0", 30, "20 40 60")
  assert float(one["low"]) < 40 < float(one["high"])
