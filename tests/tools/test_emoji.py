"""The tool of the miniature on emoji: its anchors, intervals and tables, on vectors and ranks of a few images."""

import csv
import json
import runpy
import sys

import numpy as np
import pytest
from PIL import Image

from flexivit_jax import config

NAMES = ("red cat", "red dog", "blue cat", "blue dog", "red cow", "blue cow")


@pytest.fixture
def tool(repository):
  return runpy.run_path(str(repository / "tools" / "paper" / "emoji.py"))


@pytest.fixture
def out(tmp_path, tool):
  """Captioned images and vectors that say the words: the colour, and the animal, with little noise."""
  rng = np.random.default_rng(0)
  (tmp_path / "vectors").mkdir()
  for split, n in {"train": 6, "val": 6, "test": 4}.items():
    folder = tmp_path / "data" / "emoji" / split
    folder.mkdir(parents=True)
    lines = []
    for i, name in enumerate(NAMES[:n]):
      Image.new("RGB", (4, 4)).save(folder / f"{i}.png")
      lines.append(json.dumps({"file_name": f"{i}.png", "text": name}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    said = [name.split() for name in tool["captions_of"](tmp_path, "emoji", split)]
    told = np.array([[color == "red", what == "cat", what == "dog"] for color, what in said], float)
    sizes = {str(s): told + 0.01 * rng.normal(size=told.shape) for s in tool["PATCHES"]}
    np.savez(tmp_path / "vectors" / f"flexified_{split}.npz", **sizes)
  return tmp_path


def test_ridge_on_words_finds_what_the_vectors_say(tool, out):
  tool["measure_anchor"]("bag_of_words", out, "")
  (ranks,) = tool["read"]("bag_of_words", out).values()
  assert ranks["i2t"].shape == (5, 4) and (ranks["i2t"] == 1).all() and (ranks["t2i"] == 1).all()
  assert set(ranks["lambda"].tolist()) <= set(tool["LAMBDAS"])
  rows = tool["measured"]("bag_of_words", out)
  assert next((r["patch"], r["r1"], r["low"], r["seeds"]) for r in rows) == (
    40,
    "100.0",
    "100.0",
    1,
  )


def write_ranks(tool, out, name, seed, ranks):
  path = tool["folder_of"](name, out, seed) / "ranks.npz"
  path.parent.mkdir(parents=True)
  np.savez(path, i2t=np.tile(ranks, (5, 1)), t2i=np.tile(ranks, (5, 1)))


def test_tables_and_claims_of_what_is_done(tool, tmp_path, monkeypatch, capsys, repository):
  for seed, first in ((0, (1, 1, 1, 2)), (1, (1, 1, 2, 2)), (2, (1, 1, 1, 1))):
    write_ranks(tool, tmp_path, "random", seed, first)
  for seed in (0, 1):
    write_ranks(tool, tmp_path, "fixed16", seed, (1, 2, 2, 6))
  read = lambda name: list(csv.DictReader((tmp_path / name).read_text().splitlines()))  # noqa: E731
  given = ["emoji.py", f"--out={tmp_path}", "--tables", f"--csv={tmp_path}"]
  monkeypatch.setattr(sys, "argv", given)
  runpy.run_path(str(repository / "tools" / "paper" / "emoji.py"), run_name="__main__")
  rows = read("emoji.csv")
  assert [(r["run"], r["patch"]) for r in rows[:6:5]] == [("random", "40"), ("fixed16", "40")]
  assert (rows[0]["i2t_r1"], rows[0]["least"], rows[0]["most"]) == ("75.0", "50.0", "100.0")
  assert (rows[5]["i2t_r1"], rows[5]["t2i_r5"], rows[5]["seeds"]) == ("25.0", "75.0", "2")
  claims = read("emoji_claims.csv")
  # Of the seeds that both have: 0.75 - 0.25 and 0.5 - 0.25.
  assert [c["patch"] for c in claims] == ["16", "40", "32", "20", "16", "10"]
  own = claims[0]
  assert own["what"] == "random sizes against the own size"
  assert (own["difference"], own["by_seed"]) == ("+37.5", "+50.0 +25.0")
  assert float(own["low"]) < 37.5 < float(own["high"])
  assert "| random | 40 | 16 | 75.0 |" in capsys.readouterr().out


def test_an_interval_draws_emoji_and_seeds(tool):
  rng = np.random.default_rng(1)
  hits = (rng.random((1, 300)) < 0.3).astype(float)
  low, high = tool["interval"](hits)
  assert high - low == pytest.approx(2 * 1.96 * np.sqrt(0.3 * 0.7 / 300), rel=0.1)
  assert low < hits.mean() < high
  wide = tool["interval"](np.array([[0.0] * 50, [1.0] * 50, [1.0] * 50]))
  assert wide == pytest.approx((0.0, 1.0))


def test_every_run_is_one_of_the_config(tool, repository):
  for run in tool["RUNS"].values():
    settings = config.load(f"{repository / tool['CONFIG']}:{run.argument}")
    assert settings["evals"]["test"]["seqhw"] == tuple(tool["PATCHES"])
    assert run.captions in tool["CAPTIONS"]
  compared = {name for claim in tool["CLAIMS"] for name in (claim.first, claim.second)}
  assert compared <= tool["RUNS"].keys() | tool["ANCHORS"].keys()
