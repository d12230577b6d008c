"""Every flipped bit, truncation and deletion in a checkpoint is found, and named, before anything is used."""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from flexivit_jax import cli
from flexivit_jax.errors import UserError
from flexivit_jax.running import checkpoint, manifest
from flexivit_jax.running.checkpoint import Checkpoints

pytestmark = pytest.mark.faults


def state(seed):
  rng = np.random.default_rng(seed)
  params = {"a": jnp.asarray(rng.normal(size=(64, 33)), jnp.float32), "b": {"c": jnp.ones(5)}}
  rest = {"step": jnp.int32(seed), "mu": jnp.asarray(rng.normal(size=(64, 33)), jnp.bfloat16)}
  return params, rest


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  """A folder with the steps 1, 2 and 3."""
  folder = tmp_path_factory.mktemp("saved") / "checkpoints"
  checkpoints = Checkpoints(folder, keep=None)
  for step in (1, 2, 3):
    checkpoints.save(step, *state(step), {"step": step})
  checkpoints.close()
  return folder


@pytest.fixture
def copy(saved, tmp_path):
  shutil.copytree(saved, tmp_path / "copy")
  return tmp_path / "copy"


def files(folder, step=3):
  """Of a step, but for Orbax's own notes on the save, which we do not read."""
  found = (folder / str(step)).rglob("*")
  notes = ("_CHECKPOINT_METADATA", "commit_success.txt")
  return sorted(p for p in found if p.is_file() and p.name not in notes)


def restored(folder, resume="latest", note=print):
  checkpoints = Checkpoints(folder, keep=None)
  try:
    step = checkpoints.choose(resume, note)
    return step, checkpoints.restore(step, *state(0))
  finally:
    checkpoints.close()


def test_what_is_whole_is_restored(saved):
  step, (params, rest, record) = restored(saved)
  assert step == record["step"] == 3
  for a, b in zip(jax.tree.leaves((params, rest)), jax.tree.leaves(state(3)), strict=True):
    assert a.dtype == b.dtype and np.array_equal(a, b)


def damage(path, kind, rng):
  content = bytearray(path.read_bytes())
  if kind == "delete":
    path.unlink()
  elif kind == "truncate":
    path.write_bytes(content[: rng.integers(len(content))])
  else:
    bit = rng.integers(8 * len(content))
    content[bit // 8] ^= 1 << (bit % 8)
    path.write_bytes(content)


@pytest.mark.parametrize("kind", ["flip", "truncate", "delete"])
def test_all_of_many_damages_are_found(copy, kind):
  """200 of them in all, in files drawn with the probability of their bytes, and in each file once."""
  rng, checkpoints = np.random.default_rng(0), Checkpoints(copy, keep=None)
  every = files(copy)
  sizes = np.array([p.stat().st_size for p in every], float)
  drawn = list(rng.choice(len(every), size=67 - len(every), p=sizes / sizes.sum()))
  assert any("ocdbt" in str(p) or "/d/" in str(p) for p in every) and len(every) >= 10
  for i in (*range(len(every)), *drawn):
    content = every[i].read_bytes()
    if not content:
      continue
    damage(every[i], kind, rng)
    with pytest.raises(manifest.Damaged):
      checkpoints.verify(3)
    every[i].write_bytes(content)
  checkpoints.verify(3)
  checkpoints.close()


def test_the_newest_being_damaged_is_an_error_that_names_it_and_the_way_out(copy):
  path = max(files(copy), key=lambda p: p.stat().st_size)
  damage(path, "flip", np.random.default_rng(1))
  with pytest.raises(UserError, match=r"newest checkpoint, step 3.*other bytes.*--resume=latest-v"):
    restored(copy)
  passed: list[str] = []
  step, (params, *_) = restored(copy, "latest-valid", passed.append)
  assert step == 2 and np.array_equal(params["a"], state(2)[0]["a"])
  assert len(passed) == 1 and path.name in passed[0]


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_again(copy):
  for step in (1, 2, 3):
    (copy / str(step) / "manifest" / manifest.NAME).unlink()
  for resume in checkpoint.RESUME:
    with pytest.raises(UserError, match=r"[Mm]ove the folder away|--resume=latest-valid"):
      restored(copy, resume)


@pytest.mark.parametrize("broken", ["empty", "garbled"])
def test_an_empty_step_and_a_garbled_one_are_not_chosen(copy, broken):
  if broken == "empty":
    shutil.rmtree(copy / "3")
    (copy / "3").mkdir()
  else:
    for path in (copy / "3").rglob("_METADATA"):
      path.write_text("{")
  with pytest.raises(UserError, match="step 3"):
    restored(copy)
  assert restored(copy, "latest-valid", lambda _: None)[0] == 2


def test_a_file_that_was_not_there_is_found(copy):
  (copy / "3" / "params" / "extra").write_text("x")
  with pytest.raises(UserError, match="params/extra was not there when it was written"):
    restored(copy)


def test_a_checkpoint_may_be_copied_elsewhere(copy):
  assert restored(copy)[0] == 3


def test_arrays_that_are_not_what_was_written_are_named(copy, monkeypatch):
  """Whatever made them so: here, a manifest of other arrays."""
  found = manifest.read(copy / "3" / manifest.FOLDER)
  wrong = found._replace(arrays={**found.arrays, "params": found.arrays["params"] | {"b/c": 1}})
  monkeypatch.setattr(Checkpoints, "verify", lambda self, step: wrong)
  with pytest.raises(UserError, match=r"params b/c \(1\) are not what was written"):
    restored(copy)


def divide_in_all_ways(path):
  """Saves the sums of pieces for (written, read) devices, and who was named when a value was wrong."""

  def divided(devices, values):
    mesh = jax.make_mesh((devices,), ("fsdp",), devices=jax.devices()[:devices])
    split = NamedSharding(mesh, PartitionSpec(None, "fsdp"))
    copies = NamedSharding(mesh, PartitionSpec())
    return {"k": jax.device_put(values, split), "b": jax.device_put(np.arange(3), copies)}

  values = np.random.default_rng(0).normal(size=(3, 16)).astype(np.float32)
  wrong = values.copy()
  wrong[2, 13] += 1e-6
  found = []
  for written, read in ((8, 8), (8, 2), (2, 8), (8, 1), (1, 8)):
    sums = manifest.array_sums(manifest.pieces(divided(written, values)))
    whole = manifest.Manifest({}, {"params": sums})
    manifest.check_arrays(pathlib.Path(), "params", divided(read, values), whole)
    try:
      manifest.check_arrays(pathlib.Path(), "params", divided(read, wrong), whole)
      said = "nothing"
    except manifest.Damaged as damage:
      said = str(damage)
    found.append([written, sorted(sums), said])
  pathlib.Path(path).write_text(json.dumps(found))


def test_arrays_divided_over_devices_are_compared_however_they_are_divided(
  on_eight_devices, tmp_path
):
  """A checksum a piece, and a wrong value is found by any other division; a copy on each device counts once."""
  on_eight_devices(divide_in_all_ways, str(tmp_path / "found.json"))
  found = json.loads((tmp_path / "found.json").read_text())
  assert len(found) == 5
  for written, names, said in found:
    assert len(names) == 1 + written and names[0] == "b" and "params k (1) are not what" in said
    assert names[1] == ("k" if written == 1 else f"k[0:3,0:{16 // written}]")


def test_a_checkpoint_that_is_replaced_is_never_listed_in_part(tmp_path, monkeypatch):
  """It is moved away at once, and deleted there: here, never."""
  monkeypatch.setattr(checkpoint, "_delete", lambda folders: None)
  checkpoints = Checkpoints(tmp_path / "checkpoints", keep=1)
  for step in (1, 2):
    checkpoints.save(step, *state(step), {})
    checkpoints.wait()
  checkpoints.close()
  listed = sorted(p.name for p in (tmp_path / "checkpoints").iterdir() if p.is_dir())
  assert listed == ["2", "old"]
  assert [p.name for p in (tmp_path / "checkpoints" / "old").iterdir()] == ["1"]
  monkeypatch.undo()
  checkpoints = Checkpoints(tmp_path / "checkpoints", keep=1)
  assert checkpoints.latest_step() == 2
  checkpoints.check()  # as a run does after each step
  checkpoints.close()
  assert not list((tmp_path / "checkpoints" / "old").iterdir())


def test_only_who_writes_cleans_up(copy):
  """A reader may look at a run that is at work: what is unfinished is that run's save, what is old it deletes."""
  unfinished, old = copy / "4.orbax-checkpoint-tmp", copy / "old" / "0"
  shutil.copytree(copy / "3", unfinished)
  old.mkdir(parents=True)
  listing = sorted(copy.rglob("*"))
  checkpoint.load_params(copy)
  assert cli.main(["verify", str(copy / "3")]) == 0
  reader = Checkpoints(copy, read_only=True)
  assert reader.choose() == 3
  reader.restore(3, *state(0))
  reader.close()
  assert sorted(copy.rglob("*")) == listing
  writer = Checkpoints(copy, keep=None)
  writer.save(5, *state(5), {})
  writer.check()
  writer.close()
  assert not unfinished.exists() and not old.exists()
  assert (copy / "5").is_dir()


def test_a_save_goes_on_while_others_read(tmp_path, monkeypatch):
  write, read = manifest.write, threading.Event()
  writer = Checkpoints(tmp_path / "checkpoints", keep=None)
  writer.save(1, *state(1), {})
  writer.wait()

  def slowly(*args):
    read.wait(50)
    write(*args)

  monkeypatch.setattr(manifest, "write", slowly)
  writer.save(2, *state(2), {})
  assert cli.main(["verify", str(tmp_path)]) == 0
  checkpoint.load_params(tmp_path)
  assert list((tmp_path / "checkpoints").glob("2.orbax-checkpoint-tmp*"))
  read.set()
  writer.close()
  assert restored(tmp_path / "checkpoints")[0] == 2


def test_a_reader_makes_no_folder(tmp_path):
  reader = Checkpoints(tmp_path / "checkpoints", read_only=True)
  assert reader.latest_step() is None
  reader.close()
  assert not list(tmp_path.iterdir())


def test_a_disk_without_room_for_one_checkpoint_is_an_error_before_anything_is_compiled(
  tmp_path, monkeypatch
):
  checkpoints = Checkpoints(tmp_path / "run" / "checkpoints")
  checkpoints.check_room(state(0))
  monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(2**30, 2**30, 999))
  with pytest.raises(UserError, match=r"takes 0 MiB.*there are 0 MiB; make room, or give another"):
    checkpoints.check_room(state(0))


def test_nothing_is_cast_and_no_shape_is_changed(saved):
  params, rest = state(0)
  checkpoints = Checkpoints(saved, keep=None)
  for like, message in (
    ((params, rest | {"mu": rest["mu"].astype(jnp.float32)}), r"mu: expected float32.*bfloat16"),
    (({**params, "a": params["a"].astype(jnp.bfloat16)}, rest), r"a: expected bfloat16"),
    (({**params, "a": params["a"][:12]}, rest), r"a: expected float32\[12,33\], got .*64,33"),
    (({"a": params["a"]}, rest), r"b/c"),
  ):
    with pytest.raises(UserError, match=message):
      checkpoints.restore(3, *like)
  checkpoints.close()


def test_a_failing_save_is_told_at_the_next_check(tmp_path, monkeypatch):
  def full(*_):
    raise OSError(28, "No space left on device")

  checkpoints = Checkpoints(tmp_path / "checkpoints", keep=None)
  checkpoints.save(1, *state(1), {})
  checkpoints.wait()
  monkeypatch.setattr(manifest, "write", full)
  checkpoints.save(2, *state(2), {})
  with pytest.raises(UserError, match=r"checkpoints: .*No space left.*run the same command again"):
    for _ in range(500):
      checkpoints.check()
      checkpoints.wait()
  monkeypatch.undo()
  assert Checkpoints(tmp_path / "checkpoints", keep=None).latest_step() == 1


FULL = """
import resource, sys
from flexivit_jax import cli
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))  # as a full disk
sys.exit(cli.main(sys.argv[1:]))
"""


def test_a_disk_that_is_full_ends_the_run_at_the_next_step_with_the_reason(tmp_path):
  arguments = [
    "train", "--config=configs/digits.py:debug", f"--workdir={tmp_path / 'run'}", "--config.model.width=256",
    "--config.total_steps=200", "--config.checkpoint.every_steps=2", "--config.flexi.seqhw.v=(2,)",
    "--config.evals.test.seqhw=(2,)", "--config.evals.test.every_steps=None",
  ]  # fmt: skip
  root = pathlib.Path(__file__).parents[2]
  environment = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "false"}
  run = subprocess.run(
    [sys.executable, "-c", FULL, *arguments],
    capture_output=True, text=True, check=False, cwd=root, env=environment,
  )  # fmt: skip
  assert run.returncode == 2, run.stderr
  (said,) = (line for line in run.stderr.splitlines() if line.startswith("flexivit: error"))
  assert "could not be written to" in said and str(tmp_path / "run" / "checkpoints") in said
  rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
  assert 2 <= len(rows) < 200
