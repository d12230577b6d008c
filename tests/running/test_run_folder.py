"""One process a folder; a config that would make another run of it is refused and shown."""

import contextlib
import json
import os
import pathlib
import subprocess
import sys
import time

import pytest

from flexivit_jax.errors import UserError
from flexivit_jax.running import peers, processes, run_folder

pytestmark = pytest.mark.faults

HOLD = """
import pathlib, sys, time
from flexivit_jax.running import run_folder
with run_folder.locked(pathlib.Path(sys.argv[1])):
  print("held", flush=True)
  time.sleep(60)
"""


def test_a_second_process_is_refused_by_name_until_the_first_is_gone(tmp_path):
  with subprocess.Popen(
    [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
  ) as process:
    assert process.stdout
    assert process.stdout.readline() == "held\n"
    with (
      pytest.raises(UserError, match=rf"in use by process {process.pid} on .* since 20"),
      run_folder.locked(tmp_path),
    ):
      pass
    process.kill()  # leaves its files behind, which hold nobody back
  with run_folder.locked(tmp_path):
    assert json.loads((tmp_path / "holder.json").read_text())["pid"] == os.getpid()
  assert not (tmp_path / "holder.json").exists()


def test_a_folder_that_only_has_the_name_of_ours_is_left_alone(tmp_path):
  """A run's own has a mark, and what else lies there stays."""
  signs = tmp_path / peers.FOLDER
  signs.mkdir()
  for name in ("0.json", "notes.txt"):
    (signs / name).write_text("mine")
  for marked in (False, True):
    if marked:
      peers.mark(signs)
    with contextlib.ExitStack() as stack:
      processes.take(tmp_path, stack)
    left = {"notes.txt"} if marked else {"notes.txt", "0.json"}
    assert {p.name for p in signs.iterdir()} == left


def test_a_folder_that_cannot_be_written_is_said_at_once(tmp_path):
  (tmp_path / "file").write_text("")
  begun = time.monotonic()
  with (
    pytest.raises(UserError, match=r"cannot be written to: .*give another --workdir"),
    run_folder.locked(tmp_path / "file" / "run"),
  ):
    pass
  assert time.monotonic() - begun < 5


OLD = {"model": {"width": 8}, "input": {"threads": 1, "batch_size": 4}, "log_every": 5}


def kept(tmp_path, settings, begun=True, allow=False):
  start = run_folder.compare(tmp_path, settings, begun=begun)
  if begun:
    run_folder.check_config(tmp_path, settings, start, allow_change=allow)
  run_folder.write_config(tmp_path, settings, start)
  return start.notes


def names(tmp_path):
  return sorted(p.name for p in tmp_path.glob("config*"))


def test_each_start_with_another_config_keeps_its_own(tmp_path):
  assert kept(tmp_path, OLD) == [] and names(tmp_path) == ["config.001.json", "config.json"]
  assert kept(tmp_path, OLD) == [] and names(tmp_path) == ["config.001.json", "config.json"]
  other = {**OLD, "log_every": 9, "input": {"threads": 8, "batch_size": 4}}
  said = kept(tmp_path, other)
  assert said == ["config: input.threads: 1 -> 8", "config: log_every: 5 -> 9"]
  assert names(tmp_path) == ["config.001.json", "config.002.json", "config.json"]
  assert json.loads((tmp_path / "config.001.json").read_text()) == OLD
  assert json.loads((tmp_path / "config.json").read_text()) == other


@pytest.mark.parametrize(
  ("section", "value", "line"),
  [
    ("model", {"width": 9}, "model.width: 8 -> 9"),
    ("input", {"threads": 1, "batch_size": 8}, "input.batch_size: 4 -> 8"),
    ("flexi", {"seqhw": {"v": [2]}}, r"flexi.seqhw.v: 'absent' -> \[2\]"),
    ("seed", 3, "seed: 'absent' -> 3"),
    ("token_budget", {"most": 4}, "token_budget.most: 'absent' -> 4"),
    ("token_budget", {}, "token_budget: 'absent' -> {}"),
    ("skip_above", 3.0, "skip_above: 'absent' -> 3.0"),
  ],
)
def test_what_makes_it_another_run_is_refused_unless_allowed(tmp_path, section, value, line):
  kept(tmp_path, OLD)
  with pytest.raises(UserError, match=rf"{line}.*makes it another run.*--allow_config_change"):
    kept(tmp_path, {**OLD, section: value})
  assert json.loads((tmp_path / "config.json").read_text()) == OLD
  assert len(kept(tmp_path, {**OLD, section: value}, allow=True)) == 1
  assert json.loads((tmp_path / "config.json").read_text()) != OLD


@pytest.mark.parametrize(
  "model", [{"width": 8, "dropout": 0.1}, {"image": {"stochastic_depth": 0.1}}]
)
def test_the_parts_of_a_batch_make_another_run_where_masks_are_drawn_by_them(tmp_path, model):
  kept(tmp_path, OLD)
  assert kept(tmp_path, {**OLD, "accumulate": 2}) == ["config: accumulate: 'absent' -> 2"]
  dropping = {**OLD, "model": model}
  kept(tmp_path, dropping, allow=True)
  with pytest.raises(UserError, match="accumulate makes it another run"):
    kept(tmp_path, {**dropping, "accumulate": 4})


def test_before_anything_is_saved_a_config_may_become_another(tmp_path):
  kept(tmp_path, OLD)
  said = kept(tmp_path, {**OLD, "model": {"width": 9}}, begun=False)
  assert said == ["config, before anything was saved: model.width: 8 -> 9"]


def test_absent_and_none_are_the_same(tmp_path):
  kept(tmp_path, OLD)
  assert kept(tmp_path, {**OLD, "seed": None}) == []


@pytest.mark.parametrize("left", ["", '{"model": {"wid', "[]", "\x80"])
def test_of_a_config_that_is_damaged_the_copy_is_taken(tmp_path, left):
  kept(tmp_path, OLD)
  (tmp_path / "config.json").write_bytes(left.encode("latin1"))
  with pytest.raises(UserError, match=r"model.width: 8 -> 9.*makes it another run"):
    kept(tmp_path, {**OLD, "model": {"width": 9}})
  said = kept(tmp_path, OLD)
  assert said == [
    f"{tmp_path / 'config.json'} is damaged; config.001.json is the last that is whole"
  ]
  assert json.loads((tmp_path / "config.json").read_text()) == OLD
  assert kept(tmp_path, OLD) == []


def test_without_any_config_that_is_whole_a_run_is_not_gone_on_with_unless_told(tmp_path):
  kept(tmp_path, OLD)
  for name in ("config.json", "config.001.json"):
    (tmp_path / name).write_text("{")
  with pytest.raises(
    UserError, match=r"config.json, .*config.001.json: damaged.*--allow_config_ch"
  ):
    kept(tmp_path, OLD)
  assert len(kept(tmp_path, OLD, allow=True)) == 2
  assert kept(tmp_path, OLD) == []


@pytest.mark.parametrize("name", ["config.json", "config.001.json", "holder.json"])
def test_a_full_disk_is_one_line_with_the_file(tmp_path, name):
  (tmp_path / f"{name}.tmp").symlink_to("/dev/full")
  with (
    pytest.raises(UserError, match=rf"{name} cannot be written: No space left on device"),
    run_folder.locked(tmp_path),
  ):
    kept(tmp_path, OLD)
  assert kept(tmp_path, OLD) == []


@pytest.mark.parametrize(
  ("path", "message"),
  [
    ("file", r"file is a file, where a folder is needed; give another --workdir"),
    ("file/run", r"file is a file, where a folder is needed"),
    ("broken", r"broken is a link to .*nowhere, which does not exist; mend it, or give another"),
    ("broken/run", r"is a link to .*nowhere, which does not exist"),
    ("n" * 256, r"cannot be a folder: File name too long; give another --workdir"),
    ("a/" * 2100 + "b", r"cannot be a folder: File name too long"),
    ("az://bucket/run", r"az:/bucket/run is an address; expected a folder of this machine"),
    ("file:///tmp/run", r"is an address"),
    ("new/run", None),
    ("link/run", None),
    ("link/../new", None),
    ("a:/b", None),
    ("~", None),
    (".", None),
    ("[x]", None),
  ],
)
def test_a_path_that_cannot_be_a_folder_is_refused_in_one_line_and_nothing_is_made(
  tmp_path, monkeypatch, path, message
):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "file").write_text("")
  (tmp_path / "broken").symlink_to(tmp_path / "nowhere")
  (tmp_path / "real").mkdir()
  (tmp_path / "link").symlink_to(tmp_path / "real")
  before = sorted(tmp_path.rglob("*"))
  if message is None:
    run_folder.check_path(pathlib.Path(path))
  else:
    with pytest.raises(UserError, match=message) as error:
      run_folder.check_path(pathlib.Path(path))
    assert "\n" not in str(error.value)
  assert sorted(tmp_path.rglob("*")) == before


def test_several_processes_refuse_a_path_that_each_would_have_another_name_for(tmp_path):
  run_folder.check_path(tmp_path / "plain", several=True)
  with pytest.raises(UserError, match=r"has \[ \] in its path.*ends in 'vit -lr=1'"):
    run_folder.check_path(tmp_path / "vit [lr=1]", several=True)


def test_what_changes_memory_alone_may_change_when_a_run_resumes():
  assert not run_folder.is_identity("model.remat", {})
  assert run_folder.is_identity("model.scan", {})  # names of the parameters
