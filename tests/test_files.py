"""Where things are cached, and small files that are whole or not there."""

import hashlib
import os
import pathlib
import time

import jax
import numpy as np
import pytest

from flexivit_jax import files
from flexivit_jax.devices import compilation
from flexivit_jax.errors import UserError
from flexivit_jax.evaluators import results
from flexivit_jax.models import FlexiViT
from flexivit_jax.running import ledger, metrics_writer, peers, run_folder
from flexivit_jax.training import teachers
from flexivit_jax.weights import npz
from flexivit_jax.weights.export import stablehlo

pytestmark = pytest.mark.faults


def test_the_cache_is_where_the_environment_says(monkeypatch, tmp_path):
  monkeypatch.delenv("FLEXIVIT_CACHE", raising=False)
  monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
  monkeypatch.setenv("HOME", str(tmp_path))
  assert files.cache_folder() == tmp_path / ".cache" / "flexivit_jax"
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
  assert files.cache_folder() == tmp_path / "xdg" / "flexivit_jax"
  monkeypatch.setenv("FLEXIVIT_CACHE", str(tmp_path / "mine"))
  assert files.cache_folder() == tmp_path / "mine"


@pytest.mark.parametrize("before", [None, "old"])
def test_a_file_is_written_whole_or_left_as_it_was(tmp_path, before):
  file = tmp_path / "a.json"
  if before:
    files.write_atomically(file, before)
  (tmp_path / "a.json.tmp").symlink_to("/dev/full")
  with pytest.raises(UserError, match=rf"^{file} cannot be written: No space left on device\.$"):
    files.write_atomically(file, "new")
  assert (file.read_text() if file.exists() else None) == before
  assert not (tmp_path / "a.json.tmp").is_symlink()
  files.write_atomically(file, "new")
  assert file.read_text() == "new" and [p.name for p in tmp_path.iterdir()] == ["a.json"]


class Crash(BaseException):
  """The end of a process, which no code handles."""


def write_ledger(folder: pathlib.Path, version: int) -> pathlib.Path:
  times = ledger.Ledger(folder / "ledger.json", time.perf_counter())
  times.go_on_from(version)
  times.write(version)
  return folder / "ledger.json"


def write_metrics(folder: pathlib.Path, version: int) -> pathlib.Path:
  file = folder / "metrics.jsonl"
  if version == 1:
    file.write_text('{"step": 1}\n{"step": 2}\n')
  metrics_writer.MetricsWriter(folder, restored_step=2 - version, tensorboard=False).close()
  return file


def write_heartbeat(folder: pathlib.Path, version: int) -> pathlib.Path:
  peers.Peers(folder, 0, 2).tick()
  return folder / "0.json"


def write_targets(folder: pathlib.Path, version: int) -> pathlib.Path:
  cache = teachers.TeacherCache(folder, {"seed": 0}, (0, 1))
  cache.write(3, [np.full(2, version)])
  cache.close()
  return folder / "process_0_of_1" / "000000" / "000000003.npz"


def write_results(folder: pathlib.Path, version: int) -> pathlib.Path:
  results.write(folder / "eval.json", {"step": version}, [{"n": 1}])
  return folder / "eval.json"


def write_config(folder: pathlib.Path, version: int) -> pathlib.Path:
  run_folder.write_config(folder, {"seed": version}, run_folder.Start({}, [], None, same=False))
  return folder / "config.json"


def write_bad_step(folder: pathlib.Path, version: int) -> pathlib.Path:
  return run_folder.write_bad_step(folder, step=version, size={}, measured={}, ids=None)


def write_weights(folder: pathlib.Path, version: int) -> pathlib.Path:
  model = FlexiViT(variant="mu", num_classes=version)
  params = {"Transformer": {"encoder_norm": {"bias": np.zeros(version)}}}
  npz.save_npz(folder / "model.npz", model, params, {"model": {}})
  return folder / "model.npz"


def write_artifact(folder: pathlib.Path, version: int) -> pathlib.Path:
  # Its public function compiles a program first.
  stablehlo._write(folder / "model.zip", {"record.json": b"{}" * version})
  return folder / "model.zip"


WRITERS = (
  write_ledger, write_metrics, write_heartbeat, write_targets, write_results, write_config, write_bad_step,
  write_artifact,
)  # fmt: skip


@pytest.mark.parametrize("write", [*WRITERS, write_weights], ids=lambda f: f.__name__)
def test_a_crash_before_the_rename_leaves_the_old_file(write, tmp_path, monkeypatch):
  def crash(*_: object) -> None:
    raise Crash

  replaces = write is not write_weights  # which refuses a file that exists
  file = write(tmp_path, 1) if replaces else tmp_path / "model.npz"
  before = file.read_bytes() if replaces else None
  with monkeypatch.context() as patched:
    patched.setattr(os, "replace", crash)
    with pytest.raises(Crash):
      write(tmp_path, 2)
  assert (file.read_bytes() if file.exists() else None) == before
  assert write(tmp_path, 2) == file and file.exists()
  assert not list(tmp_path.rglob("*.tmp"))


def test_two_processes_write_the_same_file_under_two_temporary_names(tmp_path, monkeypatch):
  names = []
  monkeypatch.setattr(os, "replace", lambda part, _: names.append(part))
  for _ in range(2):
    files.write_atomically(tmp_path / "a", "new", unique=True)
  assert len(set(names)) == 2 and {name.parent for name in names} == {tmp_path}


@pytest.mark.parametrize("size", [0, 3, 2**20, 2**20 + 7])
def test_the_sha256_of_a_file_is_that_of_its_bytes(tmp_path, size):
  content = os.urandom(size)
  file = tmp_path / "a"
  file.write_bytes(content + b"tail")
  assert files.sha256(file, without_last=4) == hashlib.sha256(content).hexdigest()
  assert files.sha256(file) == hashlib.sha256(content + b"tail").hexdigest()


def test_without_a_home_folder_the_cache_is_an_error_that_says_what_to_set(monkeypatch, tmp_path):
  def unknown(_):
    raise RuntimeError("Could not determine home directory.")

  for name in ("FLEXIVIT_CACHE", "XDG_CACHE_HOME", "HOME"):
    monkeypatch.delenv(name, raising=False)
  monkeypatch.setattr(pathlib.Path, "expanduser", unknown)
  with pytest.raises(UserError, match=r"~/.cache is none; set FLEXIVIT_CACHE"):
    files.cache_folder()
  assert compilation.keep_programs() is None or jax.config.values["jax_compilation_cache_dir"]
  monkeypatch.undo()
  monkeypatch.delenv("FLEXIVIT_CACHE", raising=False)
  monkeypatch.setenv("HOME", str(tmp_path))
  monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # which the standard says to ignore
  assert files.cache_folder() == tmp_path / ".cache" / "flexivit_jax"
  monkeypatch.setenv("FLEXIVIT_CACHE", "~nobody-of-this-name/x")
  with pytest.raises(UserError, match="set FLEXIVIT_CACHE"):
    files.cache_folder()
