"""A run in a bucket: the same bits as a local one, whatever is killed, fails, or writes beside it."""

import contextlib
import functools
import importlib.util
import json
import pathlib
import random
import re
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest

from flexivit_jax import cli, config, errors, storage, train, weights
from flexivit_jax.running import bucket_lock, bucket_run, manifest, run_folder
from flexivit_jax.running.checkpoint import Checkpoints
from flexivit_jax.training import teachers

pytestmark = pytest.mark.faults

_spec = importlib.util.spec_from_file_location(
  "emulated", pathlib.Path(__file__).parent / "emulated.py"
)
emulated = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(emulated)

TOOL = pathlib.Path(__file__).parents[2] / "tools" / "bench" / "chaos.py"
CONFIG = """
import ml_collections


def get_config(arg=""):
  del arg
  data = dict(name="synthetic", image_size=12, num_classes=3, num_examples=64)
  pp = "value_range(-1, 1)|onehot(3)|keep('image', 'labels')"
  test = dict(data=dict(data, split="test"), pp=pp, batch_size=32, seqhw=(2, 3), every_steps=20)
  return ml_collections.ConfigDict(dict(
    total_steps=120,
    log_every=5,
    input=dict(data=dict(data, split="train"), pp=f"decode|flip_lr|{pp}", batch_size=8, threads=1),
    model=dict(variant="mu", patch_size=(4, 4), posemb_size=(3, 3), dropout=0.1),
    flexi=dict(seqhw=dict(v=(2, 3))),
    optim=dict(lr=1e-2, wd=1e-3, clip=1.0, schedule=dict(warmup_steps=2)),
    evals=dict(test=test),
    checkpoint=dict(every_steps=10, keep=2, best="test/top1@3"),
  ))
"""


# --- without a server ---


def rows(count, start=0):
  return b"".join(b'{"step": %d, "loss": 0.25}\n' % i for i in range(start, count))


def joined(objects):
  content = b""
  for start in sorted(objects):
    content = content[:start] + objects[start]
  return content


def test_rows_in_objects_are_the_rows_after_every_copy_and_every_kill(monkeypatch):
  monkeypatch.setattr(bucket_run, "_PART_BYTES", 200)
  objects, before = {}, {}
  # Rows come, the last one is added to, a resumed run drops some and makes them again.
  history = [rows(n) for n in (0, 1, 5, 20, 21, 60)]
  history += [rows(60)[:-2] + b', "top1": 1}\n', rows(33), rows(33) + rows(70, 33), rows(2), b""]
  for content in history:
    last = joined(objects)
    parts = bucket_run._parts(content, before)
    for start, total in parts.items():
      if before.get(start) != total:
        objects[start] = content[start:]
        known = {s: objects[s] for s in before}  # killed before the index names the new one
        assert joined(known).startswith(last[: min(len(last), start)])
    objects = {s: objects[s] for s in parts}
    assert joined(objects) == content
    before = parts
  starts = bucket_run._parts(rows(60), bucket_run._parts(rows(30)))
  assert len(starts) > 1 and all(rows(60)[s - 1 : s] in (b"", b"\n") for s in starts)


def test_a_checkpoint_counts_with_its_manifest_and_the_newest_is_chosen():
  seal = "manifest/manifest.json"
  names = [f"checkpoints/9/{seal}", "checkpoints/9/params/d/1", f"checkpoints/10/{seal}"]
  names += ["checkpoints/10/params/d/2", "checkpoints/11/params/d/3", "eval.json", "tb/events"]
  assert bucket_run.newest_checkpoint(names) == [names[2], names[3]]
  below = [name.removeprefix("checkpoints/") for name in names[:5]]
  assert bucket_run.newest_checkpoint(below) == below[2:4]
  assert bucket_run.newest_checkpoint(["model.npz"]) == ["model.npz"]
  assert bucket_run.without_checkpoints(names) == ["eval.json"]


def test_an_address_that_cannot_hold_a_run_is_refused():
  with pytest.raises(errors.UserError, match="is a whole bucket; give a folder in it, as s3://b"):
    run_folder.check_bucket("s3://bucket")


# --- with one ---


server_fixture, proxy_fixture = emulated.server_fixture, emulated.proxy_fixture


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
  file = tmp_path_factory.mktemp("config") / "config.py"
  file.write_text(CONFIG)
  return config.load(str(file), []), file


@pytest.fixture(scope="module")
def local(settings, tmp_path_factory):
  return train.train(settings[0], tmp_path_factory.mktemp("local") / "run")


@emulated.needed
@pytest.mark.slow
class TestBucket:
  def test_a_run_in_a_bucket_has_the_bits_of_a_local_one_though_requests_fail(
    self, proxy, settings, local, capfd
  ):
    proxy.share = 0.05
    train.train(settings[0], pathlib.Path("s3://bucket/whole/run"))
    # Those of the lock's end are not in the line.
    repeated = re.search(r"(\d+) requests repeated", capfd.readouterr().err)[1]
    assert 0 < int(repeated) <= proxy.failed <= int(repeated) + 3
    proxy.share = 0.0
    copy = bucket_run.fetched("s3://bucket/whole/run")
    assert emulated.content(copy) == emulated.content(local)
    left = storage.Bucket("s3://bucket/whole/run").entries()
    assert bucket_lock.NAME not in left
    assert {n for n in left if n != bucket_run.INDEX} == set(
      json.loads(storage.Bucket("s3://bucket/whole/run").read(bucket_run.INDEX))["names"]
    )

  def test_kills_change_nothing(self, proxy, settings, tmp_path):
    proxy.share = 0.05
    command = [sys.executable, TOOL, "3", f"--config={settings[1]}", f"--out={tmp_path / 'chaos'}"]
    command += ["--workdir=s3://bucket/killed/run", "--terminate=0", "--seed=3", "--flips=5"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "3 kills: 0 differences; the end is the same" in run.stdout
    assert "two writers: the second is refused" in run.stdout
    assert "5 flipped bits: 0 not found" in run.stdout

  def test_one_of_two_writers_is_refused_and_nothing_is_changed(self, proxy, settings):
    url = "s3://bucket/two/run"
    with bucket_run.opened(url) as mirror:
      (mirror.folder / "eval.json").write_text("{}")
      mirror.copy(final=True)
      before = storage.Bucket(url).entries().keys() - {bucket_lock.NAME}
      with pytest.raises(errors.UserError, match=r"is in use by process \d+ on .* since 20"):
        train.train(settings[0], pathlib.Path(url))
      assert storage.Bucket(url).entries().keys() - {bucket_lock.NAME} == before

  def test_a_lock_of_a_silent_machine_is_taken_over_and_the_silent_one_writes_nothing_more(
    self, proxy, monkeypatch
  ):
    monkeypatch.setattr(bucket_lock, "_EXPIRY_S", 2.0)
    bucket = storage.Bucket("s3://bucket/silent/run")
    silent = bucket_lock.Lock(bucket)
    silent._ended.set()
    silent._thread.join()
    other = bucket_lock.Lock(storage.Bucket(bucket.url))
    with pytest.raises(errors.UserError, match="was taken over by process"):
      silent.check()
    silent.release()
    assert bucket.stat(bucket_lock.NAME) is not None
    other.check()
    other.release()
    assert bucket.stat(bucket_lock.NAME) is None

  def test_what_cannot_be_written_is_found_before_anything_is_compiled(
    self, proxy, settings, capfd
  ):
    proxy.share, proxy.status = 1.0, 403
    with pytest.raises(errors.UserError, match=r"^s3://bucket/no/run/probe\.\w+: no permission"):
      train.train(settings[0], pathlib.Path("s3://bucket/no/run"))
    assert "compiled" not in capfd.readouterr().err

  def test_a_bucket_that_stays_busy_ends_the_run_with_the_name_of_the_object(
    self, proxy, settings, monkeypatch
  ):
    impatient = functools.partial(storage.Bucket, attempts=3, wait_s=0.01, longest_s=0.1)
    monkeypatch.setattr(storage, "Bucket", impatient)
    url, opened = "s3://bucket/busy/run", threading.Event()
    copy = bucket_run.Mirror.copy

    def then_busy(mirror, **options):
      if any((mirror.folder / "checkpoints").glob("[0-9]*")):
        proxy.share = 1.0
        opened.set()
      copy(mirror, **options)

    monkeypatch.setattr(bucket_run.Mirror, "copy", then_busy)
    with pytest.raises(
      errors.UserError, match=r"s3://bucket/busy/run/.*: given up after 3 attempts"
    ):
      train.train({**settings[0], "total_steps": 100_000}, pathlib.Path(url))
    assert opened.is_set()

  def test_a_start_makes_the_local_folder_what_the_bucket_says(self, proxy):
    url = "s3://bucket/again/run"
    with bucket_run.opened(url) as mirror:
      (mirror.folder / "eval.json").write_text("{}")
    for left in ("checkpoints/20/manifest/manifest.json", "best/3/x", "eval.json", "more.json"):
      (mirror.folder / left).parent.mkdir(parents=True, exist_ok=True)
      (mirror.folder / left).write_text("killed before it was copied")
    with bucket_run.opened(url) as mirror:
      assert [p.name for p in mirror.folder.rglob("*")] == ["eval.json"]
      assert (mirror.folder / "eval.json").read_text() == "{}"

  def test_commands_read_a_run_in_a_bucket(self, proxy, settings, local, tmp_path, capsys):
    url, bucket = "s3://bucket/read/run", storage.Bucket("s3://bucket/read/run")
    for file in (p for p in local.rglob("*") if p.is_file()):  # a copy without an index
      bucket.upload(file, file.relative_to(local).as_posix())
    assert cli.main(["verify", url]) == 0
    assert capsys.readouterr().out.count(f"{url}/checkpoints/120: as it was written") == 1
    assert not cli.main(["report", url, "--out", str(tmp_path / "page")])
    assert (tmp_path / "page" / "report.html").is_file()
    assert cli.main(["report", url]) == 2 and "give --out" in capsys.readouterr().err
    for path in (url, f"{url}/checkpoints", f"{url}/checkpoints/110"):
      (tmp_path / "weights.npz").unlink(missing_ok=True)
      assert not cli.main(["convert", path, str(tmp_path / "weights.npz")])
    assert not cli.main(["convert", str(local / "checkpoints" / "110"), str(tmp_path / "same.npz")])
    assert (tmp_path / "weights.npz").read_bytes() == (tmp_path / "same.npz").read_bytes()
    storage.Bucket("s3://bucket/read").upload(tmp_path / "same.npz", "same.npz")
    model, params = weights.load("s3://bucket/read/same.npz")
    expected = weights.load(tmp_path / "same.npz")
    assert model == expected[0]
    jax.tree.map(np.testing.assert_array_equal, params, expected[1])
    with pytest.raises(errors.UserError, match="nothing at s3://bucket/read/none"):
      weights.load("s3://bucket/read/none")

  def test_a_cache_of_teachers_in_a_bucket_gives_the_bits_that_were_written(self, proxy):
    url, proxy.share = "s3://bucket/teachers", 0.05
    targets = [np.arange(12, dtype=np.float32).reshape(4, 3) * i for i in range(7)]
    with contextlib.closing(teachers.TeacherCache(url, {"seed": 0}, (0, 1))) as cache:
      assert not cache.has(0)
      for step, array in enumerate(targets):
        cache.write(step, {"a": array})
    with contextlib.closing(teachers.TeacherCache(url, {"seed": 0}, (0, 1))) as cache:
      like = {"a": jax.ShapeDtypeStruct((4, 3), np.float32)}
      assert all(map(cache.has, range(7))) and not cache.has(7)
      for step in (3, 4, 5, 6, 0, 1, 2):
        np.testing.assert_array_equal(cache.read(step, like)["a"], targets[step])
    assert not teachers.TeacherCache(url, {"seed": 0}, (1, 2)).has(0)
    with pytest.raises(errors.UserError, match="was made for other targets"):
      teachers.TeacherCache(url, {"seed": 1}, (0, 1))
    bucket, name = storage.Bucket(url), "process_0_of_1/000000/000000002.npz"
    damaged = bytearray(bucket.read(name))
    damaged[len(damaged) // 2] ^= 1
    bucket.write(name, bytes(damaged))
    cache = teachers.TeacherCache(url, {"seed": 0}, (0, 1))
    with contextlib.closing(cache), pytest.raises(errors.UserError, match=f"^{url}/{name} is dam"):
      cache.read(2, like)

  def test_each_flipped_bit_in_a_checkpoint_is_found(self, proxy, local):
    bucket = storage.Bucket("s3://bucket/flips/run")
    names = [p.relative_to(local).as_posix() for p in local.rglob("*") if p.is_file()]
    for name in names:
      bucket.upload(local / name, name)
    sealed = json.loads((local / "checkpoints/120/manifest/manifest.json").read_text()[17:])
    covered = [f"checkpoints/120/{name}" for name, (size, _) in sealed["files"].items() if size]
    rng, missed = random.Random(0), []
    for _ in range(100):
      name = rng.choice([*covered, "checkpoints/120/manifest/manifest.json"])
      whole = bucket.read(name)
      flipped = bytearray(whole)
      flipped[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
      bucket.write(name, bytes(flipped))
      checkpoints = Checkpoints(bucket_run.fetched(bucket.url) / "checkpoints", read_only=True)
      try:
        checkpoints.verify(120)
        missed.append(name)
      except manifest.Damaged:
        pass
      finally:
        checkpoints.close()
        bucket.write(name, whole)
    assert not missed
