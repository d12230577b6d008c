"""The tool that runs all analyses on a checkpoint; and the probes among them."""

import csv
import json
import runpy
import subprocess
import sys

import pytest

from flexivit_jax import weights
from flexivit_jax.errors import UserError
from flexivit_jax.models.flexivit import FlexiViT

FIELDS = dict(
  num_classes=10, patch_size=(4, 4), posemb_size=(3, 3), width=16, depth=1, mlp_dim=24, num_heads=4
)


@pytest.fixture
def checkpoint(tmp_path, random_params):
  params = random_params(FlexiViT(**FIELDS), (24, 24, 3))
  weights.save_npz(tmp_path / "vit.npz", FlexiViT(**FIELDS), params, {"model": FIELDS})
  return tmp_path / "vit.npz"


def test_probes_of_each_kind_and_size(repository, checkpoint, tmp_path, monkeypatch):
  """Random features of real digits are worth something, more of them more."""
  out = tmp_path / "probes"
  given = [checkpoint, "--config=configs/digits.py", f"--out={out}", "--seqhw=2,8"]
  monkeypatch.setattr(sys, "argv", ["probes.py", *map(str, given), "--shots=20,1", "--k=5"])
  runpy.run_path(str(repository / "tools" / "probes.py"), run_name="__main__")
  rows = json.loads((out / "probes.json").read_text())
  assert [(r["probe"], r["seqhw"], r["n"]) for r in rows] == [
    (probe, size, 360)
    for probe in ("1-shot ridge", "20-shot ridge", "5 nearest of 20 a class")
    for size in (2, 8)
  ]
  assert 0.1 < rows[0]["top1"] < rows[2]["top1"]
  assert len(list(csv.DictReader((out / "probes.csv").read_text().splitlines()))) == 6
  assert (out / "probes.png").stat().st_size > 1000


def test_what_cannot_be_measured_is_said_before(repository, checkpoint, tmp_path, monkeypatch):
  given = [checkpoint, "--config=configs/digits.py", f"--out={tmp_path}"]
  for tool, more, words in (
    ("probes", "--shots=1", "--k=20 neighbours of 1 images of each of 10 classes"),
    ("relevance", "--seqhw=1,2", "At 1 there is one patch"),
    ("analyses", "--only=relevanse", "analysis 'relevanse'.*relevance"),
  ):
    monkeypatch.setattr(sys, "argv", [f"{tool}.py", *map(str, given), more])
    with pytest.raises(UserError, match=words):
      runpy.run_path(str(repository / "tools" / f"{tool}.py"), run_name="__main__")
  assert not list(tmp_path.glob("*.json"))


def run_analyses(repository, checkpoint, out, sizes, only):
  """What `tools/analyses.py` gives back, on 64 images."""
  given = [
    checkpoint,
    "--config=configs/digits.py",
    f"--out={out}",
    f"--seqhw={sizes}",
    f"--only={only}",
  ]
  command = ["tools/analyses.py", *given, "--config.evals.test.data.split=test[:64]"]
  return subprocess.run(
    [sys.executable, *command], check=False, cwd=repository, capture_output=True, text=True
  )


@pytest.mark.slow
def test_those_that_are_asked_for_run_on_a_checkpoint(repository, checkpoint, tmp_path):
  out = tmp_path / "analyses"
  run = run_analyses(repository, checkpoint, out, "2,3,4", "token_similarity,sizes_together")
  assert run.returncode == 0, run.stdout + run.stderr
  assert "failed" not in run.stdout.splitlines()[-1]
  assert {p.name for p in out.iterdir()} == {"token_similarity", "sizes_together"}
  token = json.loads((out / "token_similarity" / "tokens.json").read_text())
  assert [(row["seqhw"], row["other"]) for row in token] == [("3", "2"), ("3", "4")]


@pytest.mark.slow
def test_one_that_fails_is_named_and_the_others_run(repository, checkpoint, tmp_path):
  """Relevance is compared between two sizes."""
  out = tmp_path / "analyses"
  run = run_analyses(repository, checkpoint, out, "2", "relevance,representations")
  assert run.returncode == 1
  assert run.stdout.splitlines()[-1].endswith("failed: relevance")
  assert (out / "representations" / "cka.json").is_file()
