"""A run of several processes in a bucket, on machines that share no file system: the bits of a run in a folder."""

import importlib.util
import json
import pathlib
import re
import shutil
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from flexivit_jax import storage
from flexivit_jax.running import bucket_run, gathered, manifest, signs
from flexivit_jax.running.checkpoint import Checkpoints

_spec = importlib.util.spec_from_file_location(
  "emulated", pathlib.Path(__file__).parent / "emulated.py"
)
emulated = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(emulated)
server_fixture, proxy_fixture = emulated.server_fixture, emulated.proxy_fixture

pytestmark = pytest.mark.faults

RUN = pathlib.Path(__file__).parent / "several.py"
MESHES = {"8x1": {}, "2x4": {"data": 2, "fsdp": 4}, "1x8": {"data": 1, "fsdp": 8}}
SMALL = {"evals": {}, "flexi": {"seqhw": {"v": (2,)}}, "total_steps": 100_000}


# --- one process ---


def test_a_whole_array_has_the_pieces_of_its_devices():
  tree = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": jax.numpy.ones(3)}
  host = jax.tree.map(gathered.whole, tree)
  assert all(isinstance(array, np.ndarray) for array in host.values())
  pieces, expected = manifest.pieces_of(host, tree), manifest.pieces(tree)
  assert pieces.keys() == expected.keys() == {"a", "b"}
  for name, array in expected.items():
    np.testing.assert_array_equal(pieces[name], array)


class Service:
  """What `signs.InService` uses of JAX's coordination service."""

  def __init__(self):
    self.text = {}

  def key_value_set(self, key, value, allow_overwrite=False):
    if key in self.text and not allow_overwrite:
      raise jax.errors.JaxRuntimeError("ALREADY_EXISTS")
    self.text[key] = value

  def key_value_try_get(self, key):
    if key not in self.text:
      raise jax.errors.JaxRuntimeError("NOT_FOUND")
    return self.text[key]

  def key_value_dir_get(self, folder):
    return [(key, text) for key, text in self.text.items() if key.startswith(folder)]


def test_processes_without_a_common_folder_read_heartbeats_and_the_first_word(monkeypatch):
  monkeypatch.setattr(signs, "_LOOK_S", 0.01)
  service, heeded = Service(), []
  both = [signs.InService(service, i, 2, heeded.append) for i in range(2)]
  both[1].write(1, "here")
  end = time.monotonic() + 10
  while both[0].read(1) != "here" and time.monotonic() < end:
    time.sleep(0.01)
  assert both[0].read(1) == "here" and both[0].word(0) is None
  both[0].leave_word(signs.Word(0, 2, "no disk"))
  both[0].wait_until_read()
  both[1].leave_word(signs.Word(1, 70, "because of it"))
  assert both[1].word(1) == (0, 2, "no disk")
  for one in both:
    one.close()
  assert set(heeded) == {(0, 2, "no disk")}


# --- several, each with its own cache folder ---


@pytest.fixture
def launch(environment_of, server, tmp_path):
  """Starts processes that do the jobs of several.py in turn; of a bucket's requests through a proxy, some fail."""
  started = []

  def call(jobs, *, processes=2, devices=4, faults=None, url=server, place=tmp_path, command=None):
    with socket.socket() as free:
      free.bind(("127.0.0.1", 0))
      port = free.getsockname()[1]
    for i in range(processes):
      given = {"count": processes, "process": i, "port": port, "jobs": jobs}
      given["fault"] = (faults or {}).get(i, {})
      line = [sys.executable, RUN, json.dumps(given)]
      if command is not None:
        line = [sys.executable, "-m", "flexivit_jax", *command]
        line += [f"--coordinator_address=127.0.0.1:{port}", f"--num_processes={processes}"]
        line += [f"--process_id={i}"]
      env = environment_of(devices) | emulated.environment(url, place / f"cache{i}")
      pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
      started.append(subprocess.Popen(line, env=env, **pipes))
    return started[-processes:]

  yield call
  for process in started:
    process.kill()
    process.communicate()


def ended(processes):
  """Waits; the exit codes and what was said on standard error."""
  said = [process.communicate(timeout=600)[1] for process in processes]
  return [process.returncode for process in processes], said


def done(processes):
  codes, said = ended(processes)
  assert set(codes) == {0}, said
  return said


def copied(url, to):
  """Copies a run in a bucket as it is, but for its lock, to another address."""
  bucket, other = storage.Bucket(url), storage.Bucket(to)
  for name in bucket.entries().keys() - {"lock.json"}:
    other.write(name, bucket.read(name))


def wait_for_checkpoint(bucket, processes):
  """Waits until the index names one."""
  end = time.monotonic() + 200
  while time.monotonic() < end:
    assert all(process.poll() is None for process in processes), ended(processes)
    index = json.loads(bucket.read(bucket_run.INDEX) or b'{"names": []}')
    if any(name.startswith("checkpoints/") for name in index["names"]):
      return
    time.sleep(0.2)
  raise AssertionError("no checkpoint")


@emulated.needed
@pytest.mark.slow
class TestProcesses:
  def test_the_bits_of_a_run_in_a_folder_though_requests_fail(self, launch, proxy, tmp_path):
    """Copies of the weights, divided inside of each process, and over both; the best checkpoint is kept, too."""
    best = {"checkpoint": {"every_steps": 3, "keep": None, "best": "test/loss"}}
    jobs = [
      {"workdir": f"s3://bucket/{name}/run", "ids": str(tmp_path / name), "config": {"mesh": mesh}}
      for name, mesh in MESHES.items()
    ]
    for job in jobs:
      job["config"] |= best
    local = [{**job, "workdir": str(tmp_path / f"{n} local" / "run"), "ids": str(tmp_path / "local")}
             for n, job in zip(MESHES, jobs, strict=True)]  # fmt: skip
    proxy.share = 0.05
    said = done(launch(jobs, url=proxy.url))
    assert proxy.failed > 0 and " requests repeated" in said[0] and not said[1].strip()
    proxy.share = 0.0
    done(launch(local))
    for name in MESHES:
      copy = bucket_run.fetched(f"s3://bucket/{name}/run")
      assert emulated.content(copy) == emulated.content(tmp_path / f"{name} local" / "run")
      left = storage.Bucket(f"s3://bucket/{name}/run").entries()
      assert "lock.json" not in left and not any("processes" in n for n in left)
    parts = manifest.read(copy / "checkpoints" / "6" / manifest.FOLDER).arrays["params"]
    assert sum("[" in key for key in parts) >= 8, "divided arrays have checksums of their pieces"
    assert not list((tmp_path / "cache1").rglob("record")), "the other process has no checkpoint"

  def test_killed_and_restored_on_other_topologies(self, launch, proxy, tmp_path):
    url, job = "s3://bucket/killed/run", {"ids": str(tmp_path / "killed")}
    config = {"mesh": MESHES["1x8"], "total_steps": 9}
    fault = {1: {"kind": "SIGKILL", "at": 5}}
    jobs = [{**job, "workdir": url, "config": {**config, "checkpoint": {"every_steps": 2}}}]
    both = launch(jobs, faults=fault)
    codes, said = ended(both)
    assert codes[1] == -9 and codes[0] in (70, 134, -6), said
    assert "process 1 (" in said[0] and "silent for" in said[0], said[0]
    killed = bucket_run.fetched(url)
    step = max(int(p.name) for p in (killed / "checkpoints").iterdir())
    assert step in (2, 4)
    ways = [(4, 2, "1x8"), (4, 2, "2x4"), (8, 1, "2x4"), (2, 4, "1x8"), (1, 1, "8x1")]
    for devices, processes, mesh in ways:
      name = f"{devices} x {processes}, {mesh}"
      of = {"config": {**jobs[0]["config"], "mesh": MESHES[mesh]}, "ids": str(tmp_path / name)}
      to = f"s3://bucket/{devices}{processes}{mesh}/run"
      copied(url, to)
      folder = tmp_path / f"{name} local" / "run"
      shutil.copytree(killed, folder)
      topology = dict(devices=devices, processes=processes)
      said = done(launch([{**of, "workdir": to}], place=tmp_path / name, **topology))
      assert f"step {step}/9" in said[0], said
      done(launch([{**of, "workdir": str(folder)}], **topology))
      assert emulated.content(bucket_run.fetched(to)) == emulated.content(folder), name

  def test_when_process_0_is_killed_the_same_command_goes_on(self, launch, proxy, tmp_path):
    url = "s3://bucket/first/run"
    jobs = [{"workdir": url, "ids": str(tmp_path / "ids"), "config": {**SMALL, "total_steps": 12}}]
    codes, said = ended(launch(jobs, faults={0: {"kind": "SIGKILL", "at": 9}}))
    assert codes[0] == -9 and codes[1] not in (0, 75), said
    said = done(launch(jobs, place=tmp_path / "elsewhere"))
    assert "12/12" in said[0]

  @pytest.mark.parametrize("kind", ["SIGSTOP", "sleep"])
  def test_a_process_that_is_silent_or_does_nothing_is_named(self, launch, tmp_path, kind):
    config = SMALL | ({"hang_after": 40.0} if kind == "sleep" else {})
    jobs = [{"workdir": f"s3://bucket/{kind}/run", "ids": str(tmp_path / "ids"), "config": config}]
    both = launch(jobs, devices=1, faults={1: {"kind": kind, "at": 4}})
    _, said = both[0].communicate(timeout=240)
    assert both[0].returncode not in (0, 2, 75), said
    what = r"is silent for \d+ s" if kind == "SIGSTOP" else "has done nothing"
    assert re.search(rf"process 1 \(\d+ on .*, step \d+\) {what}", said), said

  def test_a_bucket_that_refuses_or_is_in_use_ends_all_before_anything_is_compiled(
    self, launch, proxy, tmp_path
  ):
    url = "s3://bucket/refused/run"
    jobs = [{"workdir": url, "ids": str(tmp_path / "ids"), "config": SMALL}]
    with bucket_run.opened(url):
      codes, in_use = ended(launch(jobs, devices=1, url=proxy.url))
    assert codes == [2, 2], in_use
    proxy.share, proxy.status = 1.0, 403
    codes, refused = ended(launch(jobs, devices=1, url=proxy.url))
    assert codes == [2, 2], refused
    for said, line in ((in_use, "is in use by process"), (refused, "no permission")):
      assert "".join(said).count(line) == 1 and line in said[0], said
      assert f"Process 0 could not go on ({url})" in said[1] and "compiled" not in said[0], said
      assert "Traceback" not in "".join(said)

  def test_a_bucket_that_stays_busy_ends_all(self, launch, proxy, tmp_path):
    url = "s3://bucket/busy/run"
    jobs = [{"workdir": url, "ids": str(tmp_path / "ids"), "config": SMALL}]
    impatient = {"kind": "impatient"}
    both = launch(jobs, devices=1, url=proxy.url, faults={0: impatient})
    wait_for_checkpoint(storage.Bucket(url), both)
    proxy.share = 1.0
    codes, said = ended(both)
    assert codes == [2, 2], said
    assert re.search(rf"error: process 0: {url}/.*: given up after 3 attempts", said[0]), said
    assert f"process 1: process 0 has ended: {url}/" in said[1] and "Traceback" not in said[1], said

  def test_an_error_of_one_process_ends_all_and_the_run_is_in_the_bucket(
    self, launch, proxy, tmp_path
  ):
    url = "s3://bucket/error/run"
    jobs = [{"workdir": url, "ids": str(tmp_path / "ids"), "config": SMALL}]
    codes, said = ended(launch(jobs, devices=1, faults={1: {"kind": "error", "at": 8}}))
    assert codes == [2, 2], said
    assert "process 1 has ended: no such luck" in said[0] and "Traceback" not in said[0], said
    assert "lock.json" not in storage.Bucket(url).entries()
    saved = [p.name for p in (bucket_run.fetched(url) / "checkpoints").iterdir()]
    assert "3" in saved

  def test_sigterm_to_one_saves_on_all_and_all_wait_for_the_bucket(self, launch, proxy, tmp_path):
    url = "s3://bucket/term/run"
    long = SMALL | {"log_every": 100, "checkpoint": {"every_steps": 3000}}
    jobs = [{"workdir": url, "ids": str(tmp_path / "ids"), "config": long}]
    codes, said = ended(launch(jobs, devices=1, faults={1: {"kind": "SIGTERM", "at": 3}}))
    assert codes == [75, 75], said
    step = int(re.search(r"stopped after step (\d+), which is saved", said[0])[1])
    checkpoints = Checkpoints(bucket_run.fetched(url) / "checkpoints", read_only=True)
    checkpoints.verify_arrays(step)
    checkpoints.close()
    assert "lock.json" not in storage.Bucket(url).entries()

  def test_other_commands_read_a_bucket_on_several_processes(self, launch, proxy, tmp_path):
    url, config = "s3://bucket/read/run", tmp_path / "config.py"
    spec = importlib.util.spec_from_file_location("several", RUN)
    several = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(several)
    text = f"import ml_collections\ndef get_config(arg=''):\n  return ml_collections.ConfigDict({several.CONFIG!r})\n"
    config.write_text(text)
    done(launch([], command=["train", f"--config={config}", f"--workdir={url}"]))
    copy, local = bucket_run.fetched(url), tmp_path / "local.json"
    given = [f"--config={config}"]
    both = launch(
      [], command=["eval", *given, f"--checkpoint={url}", f"--out={tmp_path / 'e.json'}"]
    )
    done(both)
    done(launch([], command=["eval", *given, f"--checkpoint={copy}", f"--out={local}"]))
    rows = [
      [{k: v for k, v in row.items() if k != "ms"} for row in json.loads(f.read_text())["rows"]]
      for f in (tmp_path / "e.json", local)
    ]
    assert rows[0] == rows[1] and rows[0]
