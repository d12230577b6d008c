"""The tool that runs all analyses on a checkpoint; and the probes among them."""

import csv
import functools
import json
import re
import runpy
import subprocess
import sys

import pytest
from PIL import Image

from flexivit_jax import cli, weights
from flexivit_jax.data import label_maps
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
  runpy.run_path(str(repository / "tools" / "paper" / "probes.py"), run_name="__main__")
  rows = json.loads((out / "probes.json").read_text())
  assert [(r["probe"], r["seqhw"], r["n"]) for r in rows] == [
    (probe, size, 360)
    for probe in ("1-shot ridge", "20-shot ridge", "5 nearest of 20 a class")
    for size in (2, 8)
  ]
  assert 0.1 < rows[0]["top1"] < rows[2]["top1"]
  assert len(list(csv.DictReader((out / "probes.csv").read_text().splitlines()))) == 6
  assert (out / "probes.png").stat().st_size > 1000


def refusal(repository, monkeypatch, capfd, tool, *given):
  """What a tool ends with: one line on stderr, and 2."""
  monkeypatch.setattr(sys, "argv", [f"{tool}.py", *map(str, given)])
  with pytest.raises(SystemExit) as ended:
    runpy.run_path(str(repository / "tools" / "paper" / f"{tool}.py"), run_name="__main__")
  err = capfd.readouterr().err
  errors = [line for line in err.splitlines() if not line.startswith("note: ")]
  assert ended.value.code == 2 and len(errors) == 1 and f"{tool}.py: error: " in errors[0], err
  return err


def test_what_cannot_be_measured_is_said_before(
  repository, checkpoint, tmp_path, monkeypatch, capfd
):
  given = [checkpoint, "--config=configs/digits.py", f"--out={tmp_path}"]
  for tool, more, words in (
    ("probes", "--shots=1", "--k=20 neighbours of 1 images of each of 10 classes"),
    ("relevance", "--seqhw=1,2", "At 1 there is one patch"),
    ("analyses", "--only=relevanse", "analysis 'relevanse'.*relevance"),
  ):
    assert re.search(words, refusal(repository, monkeypatch, capfd, tool, *given, more))
  assert not list(tmp_path.glob("*.json"))


OF_CONFIG = ("--config=configs/digits.py",)
TAKE_A_CHECKPOINT = {
  "representations": OF_CONFIG,
  "relevance": OF_CONFIG,
  "sizes_together": OF_CONFIG,
  "probes": OF_CONFIG,
  "token_similarity": (*OF_CONFIG, "--seqhw=4", "--with=2"),
  "patch_curve": ("photos",),
  "shape_texture": ("photos",),
}


@pytest.mark.parametrize("tool", TAKE_A_CHECKPOINT)
def test_a_file_that_is_not_there_is_one_line(
  repository, checkpoint, tmp_path, monkeypatch, capfd, tool
):
  """The checkpoint, where all else is there; then what is shown to it."""
  monkeypatch.chdir(tmp_path)
  for split in ("train", "val"):
    (tmp_path / "photos" / split / "cat").mkdir(parents=True)
    Image.new("RGB", (24, 24)).save(tmp_path / "photos" / split / "cat" / "0.png")
  for category in label_maps.cue_conflict() if tool == "shape_texture" else ():
    (tmp_path / "photos" / category).mkdir()
    Image.new("RGB", (24, 24)).save(tmp_path / "photos" / category / f"{category}1-cat1.png")
  more = TAKE_A_CHECKPOINT[tool]
  call = functools.partial(refusal, repository, monkeypatch, capfd, tool)
  assert "nothing.npz does not exist" in call("nothing.npz", *more, "--out=out")
  nothing = [m.replace("digits", "nothing").replace("photos", "nothing") for m in more]
  assert "nothing" in call(checkpoint, *nothing, "--out=out")


@pytest.mark.slow
def test_all_analyses_end_as_the_worst_of_them(repository, tmp_path, monkeypatch, capfd):
  given = ("nothing.npz", *OF_CONFIG, f"--out={tmp_path}", "--only=relevance")
  monkeypatch.setattr(sys, "argv", ["analyses.py", *given])
  with pytest.raises(SystemExit) as ended:
    runpy.run_path(str(repository / "tools" / "paper" / "analyses.py"), run_name="__main__")
  assert ended.value.code == 2
  assert "relevance.py: error: nothing.npz does not exist" in capfd.readouterr().err


def test_every_tool_ends_in_the_same_way(repository):
  """A test of the text: most are measurements that take minutes."""
  for file in (repository / "tools").glob("*/*.py"):
    text = file.read_text()
    assert ("def main(" in text) == text.endswith("\n  cli.tool(main)\n"), file


def test_a_file_that_a_tool_cannot_open_is_one_line(monkeypatch, capsys, tmp_path):
  monkeypatch.setattr(sys, "argv", ["tools/any.py"])
  with pytest.raises(SystemExit, match="2"):
    cli.tool((tmp_path / "nothing").read_text)
  assert (
    capsys.readouterr().err == f"any.py: error: {tmp_path}/nothing: No such file or directory\n"
  )
  cli.tool(lambda: None)


def run_analyses(repository, checkpoint, out, sizes, only):
  """What `tools/paper/analyses.py` gives back, on 64 images."""
  given = [
    checkpoint,
    "--config=configs/digits.py",
    f"--out={out}",
    f"--seqhw={sizes}",
    f"--only={only}",
  ]
  command = ["tools/paper/analyses.py", *given, "--config.evals.test.data.split=test[:64]"]
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
  assert run.returncode == 2
  assert run.stdout.splitlines()[-1].endswith("failed: relevance")
  assert (out / "representations" / "cka.json").is_file()
