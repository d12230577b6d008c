"""A start that is refused changes nothing, and what is advised then works."""

import contextlib
import re
import shlex
import shutil

import numpy as np
import pytest
from PIL import Image

from flexivit_jax import cli
from flexivit_jax.running import manifest, run_folder

CONFIG = """
import ml_collections
from flexivit_jax.config import parse_arg
def get_config(arg=""):
  arg = parse_arg(arg, steps=2, data="photos")
  pp = "decode|value_range(-1, 1)|onehot(2)|keep('image', 'labels')"
  data = dict(name="folder", split="train", data_dir=arg.data)
  return ml_collections.ConfigDict(dict(
    total_steps=arg.steps, accumulate="auto", memory_gib=1.0, seed=0,
    input=dict(data=data, pp=pp, batch_size=4, threads=0),
    model=dict(variant="mu", depth=1, patch_size=(4, 4), posemb_size=(3, 3)),
    flexi=dict(seqhw=dict(v=(3,))),
    objective=dict(name="distill", teachers=dict(t=dict(
      model=dict(variant="mu", depth=1, num_classes=2, patch_size=(4, 4), posemb_size=(3, 3))))),
    optim=dict(lr=1e-2),
    checkpoint=dict(every_steps=1, keep=None),
  ))
"""


def photos(folder, names=("cat", "dog"), more=0):
  rng = np.random.default_rng(0)
  for name in names:
    (folder / "train" / name).mkdir(parents=True)
    for i in range(4 + more * (name == "cat")):
      image = Image.fromarray(rng.integers(0, 255, (12, 12, 3), np.uint8))
      image.save(folder / "train" / name / f"{i}.png")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
  """A folder with a config, data and a run of two steps; the current directory of each test."""
  folder = tmp_path_factory.mktemp("place")
  (folder / "tiny.py").write_text(CONFIG)
  photos(folder / "photos")
  photos(folder / "one more", more=1)
  photos(folder / "renamed", names=("dog", "tomcat"))
  with contextlib.chdir(folder):
    assert train() == 0
  return folder


@pytest.fixture
def run(place, monkeypatch):
  monkeypatch.chdir(place)
  return place / "run"


def train(*arguments, workdir="run", steps=2):
  return cli.main(["train", f"--config=tiny.py:steps={steps}", f"--workdir={workdir}", *arguments])


def contents(folder):
  """Names, bytes and times of all files, and the times of all folders but itself: it holds a lock for a while."""
  paths = sorted(folder.rglob("*"))
  return [(p, p.stat().st_mtime_ns, p.is_file() and p.read_bytes()) for p in paths]


REFUSED = {
  "another run": (["--config.optim.lr=0.1"], r"lr: 0.01 -> 0.1. .*, or --allow_config_change"),
  "batch size": (["--config.input.batch_size=2"], "trained in batches of 4, not of 2"),
  "batch size, allowed": (
    ["--config.input.batch_size=2", "--allow_config_change"],
    "trained in batches of 4, not of 2",
  ),
  "seed, allowed": (["--config.seed=1", "--allow_config_change"], "seed was 0, and is 1"),
  "one image more": (
    ["--config.input.data.data_dir=one more"],
    "one more/train has 9 examples, and had 8",
  ),
  "one image more, allowed": (
    ["--config.input.data.data_dir=one more", "--allow_config_change"],
    "one more/train has 9 examples, and had 8",
  ),
  "other classes": (["--config.input.data.data_dir=renamed"], "tomcat"),
  "no data": (["--config.input.data.data_dir=none"], "none"),
  "model": (["--config.model.width=16"], r"model.width.* does not fit the model of this config"),
  "model, allowed": (
    ["--config.model.width=16", "--allow_config_change"],
    "does not fit the model of this config",
  ),
  "teachers": (
    ["--config.objective.teachers.t.model.width=16", "--allow_config_change"],
    "trained with other teachers",
  ),
  "a typo": (["--config.optim.lrr=1"], "Did you mean 'optim.lr'"),
  "a value": (["--config.optim.lr=-1"], "optim.lr"),
  "a size": (["--config.flexi.seqhw.v=(5,)"], "5"),
  "a way to resume": (["--resume=last"], "Did you mean 'latest'"),
  "memory": (["--config.memory_gib=1e-9"], "smaller batch"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_refused_start_changes_nothing_in_the_run_folder(run, capfd, kind):
  arguments, message = REFUSED[kind]
  before = contents(run)
  assert train(*arguments, steps=4) == 2
  said = capfd.readouterr().err.splitlines()
  assert contents(run) == before
  assert said[-1].startswith("flexivit: error: ") and re.search(message, said[-1]), said[-1]
  if kind != "another run":
    assert "--allow_config_change" not in said[-1]


def test_a_refused_start_changes_nothing_whatever_the_state_of_the_folder(run, monkeypatch, capfd):
  newest = run / "checkpoints" / "2" / "record" / "metadata"
  configs = [run / "config.json", run / "config.001.json"]
  for damaged in ([newest], configs):
    good = [path.read_bytes() for path in damaged]
    for path in damaged:
      path.write_text("{")
    (run / "checkpoints" / "3.orbax-checkpoint-tmp").mkdir()  # of a save that was cut short
    before = contents(run)
    assert train(steps=4) == 2
    assert contents(run) == before
    (run / "checkpoints" / "3.orbax-checkpoint-tmp").rmdir()
    for path, content in zip(damaged, good, strict=True):
      path.write_bytes(content)
  before = contents(run)
  with run_folder.locked(run):
    held = contents(run)
    assert train() == 2 and "in use by process" in capfd.readouterr().err
    assert contents(run) == held
  monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(2**30, 2**30, 9))
  assert train(steps=4) == 2 and "make room" in capfd.readouterr().err
  assert contents(run) == before


@pytest.mark.parametrize("workdir", ["new", "new/a/b", "made"])
@pytest.mark.parametrize(
  "arguments",
  [["--config.memory_gib=1e-9"], ["--config.optim.lrr=1"], ["--config.model.attention=splash"]],
)
def test_a_refused_start_leaves_no_folder(run, workdir, arguments):
  made = run.parent / "made"
  made.mkdir(exist_ok=True)
  assert train(*arguments, workdir=workdir) == 2
  assert not (run.parent / "new").exists() and not list(made.iterdir())


def test_after_all_refusals_the_same_command_goes_on(run, capfd):
  """The last test of this run: of all that was refused nothing is left."""
  assert train(steps=3) == 0
  said = capfd.readouterr().err
  assert "config: total_steps: 2 -> 3" in said and "resumed from" in said
  assert manifest.read(run / "checkpoints" / "3" / "manifest").files


@pytest.mark.parametrize(
  "arguments",
  [REFUSED["batch size"][0], pytest.param(REFUSED["one image more"][0], marks=pytest.mark.full)],
)
def test_a_new_run_from_the_weights_is_begun_as_is_advised(run, capfd, arguments, tmp_path):
  assert train(*arguments) == 2
  said = capfd.readouterr().err
  (advice,) = (word for word in shlex.split(said) if word.startswith("--config.init="))
  assert train(*arguments, advice, workdir=tmp_path / "new") == 0
