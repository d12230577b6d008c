"""Any path that a file system takes is a run folder: what is saved there can be opened, wherever it lies."""

import os
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

from flexivit_jax import cli, files
from flexivit_jax.errors import UserError
from flexivit_jax.running import manifest
from flexivit_jax.running.checkpoint import Checkpoints
from flexivit_jax.weights import verification

PARAMS = {"a": jnp.arange(12.0).reshape(3, 4), "b": {"c": jnp.ones(5, jnp.bfloat16)}}
STATE = {"step": jnp.int32(3)}
NAMES = [
  "two words", "it's", 'say "x"', "caf\u00e9", "cafe\u0301", "\U0001f600", "a\nb", "tab\t", "-dash", "--workdir", "a:b",
  "a,b", "a=b", "lr=1e-3,wd=0.1", "50%", "%s", "%20", "{step}", "{a,b}", "~", "~root", "dot.", "..dots", "space ", "#1",
  "$HOME", "$(ls)", "a;b", "a|b", "<x>", "a&b", "!", "^", "`x`", "@eaDir", "gs", "s3", "file:", "n" * 255, ".hidden",
  "checkpoints", "7", "old", "params", "*", "**", "?", "[x]", "[", "]", "[!a]", "vit [lr=1e-3]", "a?b=c", "back\\slash",
  "\\", "C:\\runs\\a", "\udcff",
]  # fmt: skip


def save(folder, step=1, **given):
  checkpoints = Checkpoints(folder, **given)
  checkpoints.save(step, PARAMS, STATE, {"step": step})
  checkpoints.close()


def read(folder, step=1):
  checkpoints = Checkpoints(folder, read_only=True)
  checkpoints.verify_arrays(step)
  assert checkpoints.choose() == step
  params, state, record = checkpoints.restore(step, PARAMS, STATE)
  alone, _ = checkpoints.restore_params(step)
  checkpoints.close()
  assert np.array_equal(params["a"], PARAMS["a"]) and np.array_equal(alone["a"], PARAMS["a"])
  assert int(state["step"]) == 3 and record == {"step": step}


@pytest.mark.slow
def test_whatever_the_folder_is_called_what_is_saved_there_can_be_read(tmp_path):
  """By its path, and where it is moved to; nothing is written anywhere else, and no descriptor stays open."""
  opened = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
  for number, name in enumerate(NAMES):
    base = tmp_path / str(number)
    save(base / name / "checkpoints")
    assert os.listdir(base) == [name]
    read(base / name / "checkpoints")
    (base / name).rename(base / "plain")
    read(base / "plain" / "checkpoints")
  if opened:
    assert len(os.listdir("/proc/self/fd")) < opened + 10


@pytest.mark.parametrize("name", ["**", "vit [lr=1e-3]", "back\\slash", "\udcff", "a:b, c=1 %s\n"])
def test_a_newer_checkpoint_replaces_one_below_an_odd_name(tmp_path, name):
  for step in (1, 2):
    save(tmp_path / name / "checkpoints", step=step, keep=1)
  read(tmp_path / name / "checkpoints", step=2)
  assert sorted(os.listdir(tmp_path / name / "checkpoints")) == ["2", "old"]
  (tmp_path / name).rename(tmp_path / "plain")
  read(tmp_path / "plain" / "checkpoints", step=2)


def test_the_characters_that_need_another_path_are_known(tmp_path):
  odd = [name for name in NAMES if files.oddities(tmp_path / name)]
  assert len(odd) == 13 and {"[x]", "*", "\\", "\udcff"} < set(odd)


@pytest.mark.parametrize(
  "path", ["a/../b", "link/../b", "./b/.", "a//b", "link", "link/b", "{}/b", "/{}/b", "[a]/../b", "link/../[b]"]
)  # fmt: skip
def test_the_way_to_a_folder_does_not_matter(tmp_path, monkeypatch, path):
  for folder in ("a", "real/deep", "[a]"):
    (tmp_path / folder).mkdir(parents=True)
  (tmp_path / "link").symlink_to(tmp_path / "real" / "deep")
  monkeypatch.chdir(tmp_path)
  folder = pathlib.Path(path.replace("{}", str(tmp_path)))
  save(folder / "checkpoints")
  assert (folder / "checkpoints" / "1" / "params" / "manifest.ocdbt").is_file()
  read(folder / "checkpoints")


@pytest.mark.parametrize("path", ["/s3/run", "/gs/x/run", "/hf", "/az/a b"])
def test_a_mount_is_not_taken_for_a_bucket(path):
  assert files.oddities(pathlib.Path(path)) == "/" + path.split("/")[1]
  reader = Checkpoints(pathlib.Path(path), read_only=True)
  assert reader.latest_step() is None
  reader.close()


def test_where_a_system_names_no_descriptors_an_odd_path_is_refused_with_one_that_works(
  tmp_path, monkeypatch
):
  monkeypatch.setattr(files, "_DESCRIPTORS", tmp_path / "none")
  with pytest.raises(
    UserError, match=r"has \[ \] in its path.*e\.g\. one that ends in 'vit -lr=1'"
  ):
    Checkpoints(tmp_path / "vit [lr=1]", read_only=True)
  save(tmp_path / "vit -lr=1")


def unmerged(folder, number=1):
  """As a version before wrote it where a path has glob characters: the parts were not put together."""
  save(folder, number, keep=None)
  step = folder / str(number)
  for item in ("params", "state"):
    for path in (step / item / "manifest.ocdbt", *(step / item / "d").iterdir()):
      path.unlink()
    (step / item / "d").rmdir()
  sums = manifest.read(step / manifest.FOLDER)
  files = manifest.file_sums(step, ("manifest", "_CHECKPOINT_METADATA", "commit_success.txt"))
  manifest.write(step / manifest.FOLDER, sums._replace(files=files))


def test_a_checkpoint_whose_files_are_whole_and_that_cannot_be_opened_is_damaged(tmp_path, capsys):
  unmerged(tmp_path / "run" / "checkpoints")
  assert cli.main(["verify", str(tmp_path / "run")]) == 2
  said = capsys.readouterr()
  assert "params cannot be opened: FileNotFoundError: manifest.ocdbt is missing" in said.out
  assert said.err == f"flexivit: error: Damaged: {tmp_path / 'run' / 'checkpoints' / '1'}.\n"
  assert cli.main(["inspect", str(tmp_path / "run")]) == 2
  assert "cannot be opened" in capsys.readouterr().err
  save(tmp_path / "two" / "checkpoints", keep=None)
  unmerged(tmp_path / "two" / "checkpoints", 2)
  reader = Checkpoints(tmp_path / "two" / "checkpoints", read_only=True)
  with pytest.raises(manifest.Damaged, match=r"newest checkpoint, step 2.*--resume=latest-valid"):
    reader.choose()
  assert reader.choose("latest-valid", lambda _: None) == 1
  reader.close()


def test_verify_reads_the_values_of_arrays(tmp_path):
  """Files and listing are what the manifest says, and one array is not."""
  save(tmp_path / "checkpoints")
  folder = tmp_path / "checkpoints" / "1" / manifest.FOLDER
  found = manifest.read(folder)
  wrong = found._replace(arrays={**found.arrays, "state": {"step": 1}})
  manifest.write(folder, wrong)
  ((_, problem),) = verification.verify(tmp_path)
  assert problem and "state step (1) are not what was written" in str(problem)


@pytest.mark.parametrize("fault", ["lost", "other"])
def test_a_save_that_cannot_be_read_back_is_an_error_at_the_next_check(
  tmp_path, monkeypatch, fault
):
  """Of an array that is lost or not what was saved, and at once, not when a run goes on from it."""
  from flexivit_jax.running import checkpoint

  listing = checkpoint.listing

  def wrong(folder):
    found = listing(folder)
    return {"a": found["a"]} if fault == "lost" and folder.name == "params" else found | {"more": 1}

  checkpoints = Checkpoints(tmp_path / "checkpoints", keep=None)
  checkpoints.save(1, PARAMS, STATE, {"step": 1})
  checkpoints.wait()
  monkeypatch.setattr(checkpoint, "listing", wrong)
  checkpoints.save(2, PARAMS, STATE, {})
  with pytest.raises(UserError, match=r"could not be written.*params is not what was saved: "):
    checkpoints.wait()
  monkeypatch.undo()
  read(tmp_path / "checkpoints")
