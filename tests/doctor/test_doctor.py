"""`flexivit doctor`: green here, and with each of its faults injected a line that says what is wrong and what to do."""

import errno
import json
import os
import pathlib
import socket
import subprocess
import sys
import time
import types

import jax
import numpy as np
import pytest

from flexivit_jax import cli
from flexivit_jax.doctor import chips, examination, findings, hosts, machine, storage
from flexivit_jax.experiment import benchmarks
from flexivit_jax.running import distributed

pytestmark = pytest.mark.faults


def finding(call, limit=5.0):
  """The finding of one check, which is red; its line."""
  found = findings.within(limit, "check", call, "look")
  assert not found.ok and found.todo, found
  assert "\n" not in found.line()
  return found.line()


def test_all_is_green_here_and_nothing_is_left_behind(tmp_path, capsys):
  workdir = tmp_path / "new" / "run"
  assert cli.main(["doctor", f"--workdir={workdir}"]) == 0
  lines = capsys.readouterr().out.splitlines()
  assert all(line.startswith("ok ") for line in lines)
  assert [line[5 : 5 + examination.WIDTH].strip() for line in lines] == [
    *("versions", "host memory", "open files", "shared memory", "cache", "storage", "devices"),
    *("mesh", "device memory", "programs", "sum", "hosts", "clock"),
  ]
  assert not list(tmp_path.iterdir())


def test_a_red_line_is_code_2_and_stands_in_the_json(monkeypatch, capsys):
  monkeypatch.setattr(machine, "OPEN_FILES", 10**9)
  assert cli.main(["doctor", "--json"]) == 2
  out, err = capsys.readouterr()
  answer = json.loads(out)
  assert not answer["ok"] and answer["processes"] == 1
  assert [c["check"] for c in answer["checks"] if not c["ok"]] == ["open files"]
  assert "1 of 12 checks are not green: open files." in err


@pytest.mark.parametrize(
  ("arguments", "said"),
  [
    (["--limit=0"], "expected seconds"),
    (["--limit=nan"], "expected seconds"),
    (["--limit=inf"], "expected seconds"),
    (["--images_per_s=9"], "--data"),
    (["--config.seed=1"], "--data"),
  ],
)
def test_arguments_that_say_nothing_are_refused(arguments, said, capsys):
  assert cli.main(["doctor", *arguments]) == 2
  assert said in capsys.readouterr().err


# --- the host ---


@pytest.mark.parametrize(
  ("package", "version", "said"),
  [
    ("jaxlib", "0.9.1", "jax needs jaxlib<="),
    ("optax", "0.1.0", "optax>="),
    ("jax-cuda12-plugin", "0.9.1", "jax needs jax-cuda12-plugin"),
    ("flax", None, "flax>=0.12.8, which is not installed"),
  ],
)
def test_versions_that_do_not_fit(monkeypatch, package, version, said):
  found = machine.installed
  monkeypatch.setattr(machine, "installed", lambda n: version if n == package else found(n))
  line = finding(machine.versions)
  assert said in line and "pip install" in line


def test_little_memory_of_the_host_or_of_its_container(monkeypatch, tmp_path):
  monkeypatch.setattr(machine, "_physical", lambda: (2**36, 2**30))
  assert "1.0 GiB free of 64.0" in finding(machine.memory)
  monkeypatch.setattr(machine, "_physical", lambda: (2**36, 2**35))
  monkeypatch.setattr(machine, "_CGROUP", tmp_path)
  for name, text in {
    "memory.max": str(2**32),
    "memory.current": str(2**32 - 2**28),
    "memory.stat": f"anon 5\ninactive_file {2**28}\n",
  }.items():
    (tmp_path / name).write_text(text)
  assert "0.5 GiB free of 4.0" in finding(machine.memory)
  (tmp_path / "memory.max").write_text("max\n")
  assert machine.memory() == "32.0 GiB free of 64.0"


def test_few_open_files_and_little_shared_memory(monkeypatch, tmp_path):
  monkeypatch.setattr(machine.resource, "getrlimit", lambda kind: (256, 4096))
  line = finding(machine.open_files)
  assert "256 files" in line and "ulimit -n" in line and "4096" in line
  monkeypatch.setattr(machine, "_SHM", tmp_path)
  usage = types.SimpleNamespace(free=2**26)
  monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: usage)
  assert "shm-size" in finding(machine.shared_memory)


# --- storage ---


def failing(code):
  def fail(*args, **kwargs):
    raise OSError(code, os.strerror(code), "here")

  return fail


STORAGE = {
  "read-only": (pathlib.Path, "mkdir", failing(errno.EROFS), "Read-only file system"),
  "rights": (pathlib.Path, "open", failing(errno.EACCES), "here: Permission denied"),
  "full": (os, "fsync", failing(errno.ENOSPC), "No space left on device"),
  "quota": (os, "fsync", failing(errno.EDQUOT), "quota"),
  "nearly full": (storage, "FREE", 2**60, "MiB left"),
  "no rename": (os, "replace", failing(errno.EXDEV), "cross-device"),
  "a rename that copies": (os, "replace", lambda a, b: None, "does not replace a file"),
  "other bytes": (pathlib.Path, "read_bytes", lambda path: b"zeros", "other bytes"),
  "no locks": (storage, "_excludes", lambda lock: False, "one lock to two owners"),
  "locks that fail": (storage, "_excludes", failing(errno.ENOLCK), "No locks available"),
  "a clock": (storage.time, "time", lambda: 1e9, "clock"),
}


@pytest.mark.parametrize("name", STORAGE)
def test_a_folder_in_which_something_does_not_work(monkeypatch, tmp_path, name):
  where, attribute, fault, said = STORAGE[name]
  with monkeypatch.context() as patch:
    patch.setattr(where, attribute, fault)
    line = finding(lambda: storage.check(tmp_path, []))
  assert said in line and "->" in line
  assert not [path for path in tmp_path.iterdir() if "moved" not in path.name]


def test_a_file_in_the_place_of_the_folder(tmp_path):
  (tmp_path / "file").write_text("")
  assert "is a file" in finding(lambda: storage.check(tmp_path / "file" / "run", []))


def test_several_processes_with_a_bucket_leave_no_folder_of_its_name(tmp_path, monkeypatch):
  """Whether they see one folder is not asked: of a run in a bucket they need none."""
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(distributed, "is_on", lambda: True)
  monkeypatch.setattr(distributed, "texts", lambda text: [text])
  monkeypatch.setattr(storage, "_check_bucket", lambda url: url)
  bucket = pathlib.Path("s3://bucket/run")
  found, _ = examination.of_devices(bucket, None, {}, 5.0, lambda f: None)
  assert "storage" in {f.check for f in found} and all(f.ok for f in found), found
  assert "same folder" not in {f.check for f in found} and not list(tmp_path.iterdir())


def test_locks_of_a_real_folder_exclude(tmp_path):
  assert storage._excludes(tmp_path / "lock")


def test_a_folder_that_does_not_answer_is_left_after_its_time(monkeypatch, tmp_path):
  monkeypatch.setattr(storage, "check", lambda *args, **kwargs: time.sleep(60))
  begun = time.monotonic()
  found, reached = examination.of_devices(tmp_path, None, {}, 0.5, lambda f: None)
  assert time.monotonic() - begun < 10
  (red,) = (f for f in found if f.failure == "time")
  assert (
    reached
    and red.check == "storage"
    and "no answer within 0.5 s" in red.said
    and "mount" in red.todo
  )


def test_programs_that_cannot_be_kept(monkeypatch, tmp_path):
  keep = jax.config.values["jax_compilation_cache_dir"]
  (tmp_path / "file").write_text("")
  try:
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "file" / "cache"))
    assert "JAX_COMPILATION_CACHE_DIR" in finding(chips.cache)
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.setenv("FLEXIVIT_CACHE", str(tmp_path))
    assert "writable" in chips.cache()
    (tmp_path / "programs").chmod(0o777)
    assert "chmod 700" in finding(chips.cache)
  finally:
    jax.config.update("jax_compilation_cache_dir", keep)


# --- devices ---


class Device:
  platform = "gpu"

  def __init__(self, process_index=0, kind="H100", **stats):
    self.process_index, self.device_kind, self._stats = process_index, kind, stats

  def memory_stats(self):
    return self._stats

  def __str__(self):
    return f"device of {self.process_index}"


def test_devices_that_are_too_few_unused_or_of_two_kinds(monkeypatch):
  monkeypatch.setattr(chips, "_unused", lambda: "NVIDIA GPUs")
  assert "this host has NVIDIA GPUs" in finding(chips.backend)
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  monkeypatch.setattr(jax, "devices", lambda: [Device(0), Device(0), Device(1)])
  assert "process 0: 2, process 1: 1" in finding(chips.backend)
  monkeypatch.setattr(jax, "devices", lambda: [Device(0), Device(1, kind="A100")])
  assert "several kinds" in finding(chips.backend)


def test_devices_that_cannot_be_had(monkeypatch):
  def busy():
    raise RuntimeError("The TPU is already in use by process 7")

  monkeypatch.setattr(chips, "backend", busy)
  found, reached = examination.of_devices(None, None, {}, 5.0, lambda f: None)
  red = [f for f in found if not f.ok]
  assert not reached and "already in use" in red[0].said and "restart their host" in red[0].todo
  assert all(f.said == "not tried, because of devices" for f in red[1:]) and len(red) == 7


def test_memory_of_a_device_that_another_program_has(monkeypatch):
  rows = [Device(bytes_limit=70 * 2**30), Device(1, bytes_limit=9 * 2**30)]
  monkeypatch.setattr(jax, "local_devices", lambda: rows)
  assert "device of 1 has 9 GiB, others 70" in finding(chips.memory)
  rows[1] = Device(1, bytes_limit=70 * 2**30, bytes_in_use=30 * 2**30)
  assert "30 GiB are in use" in finding(chips.memory)
  rows[1] = rows[0]
  assert chips.memory() == "70 GiB for programs on each of 1"


def test_a_mesh_and_a_batch_that_do_not_fit():
  assert "does not fit" in finding(lambda: chips.mesh({"mesh": {"fsdp": 7}}))
  assert chips.mesh({"input": {"batch_size": 6}}).endswith("6 examples of 6 each")


def test_a_device_that_computes_wrong(monkeypatch):
  product = chips.product
  monkeypatch.setattr(chips, "product", lambda *args: product(*args) + np.float32(1e-3))
  line = finding(chips.programs)
  assert "wrong numbers" in line and "leave" not in line and "report" in line


def test_devices_whose_sum_is_wrong(monkeypatch):
  monkeypatch.setattr(chips, "jnp", types.SimpleNamespace(sum=lambda x: x.sum() + 1))
  assert "the sum of 1 to 1 over the devices is 2, expected 1" in finding(chips.collective)


def test_data_that_are_not_there_or_too_slow(monkeypatch, capsys):
  row = {"image": "24x24x3", "images_per_s": 1e3, "images_per_core_s": 5e2}
  monkeypatch.setattr(benchmarks, "reading", lambda settings, seconds: row)
  config = ["--data=configs/digits.py:debug", "--images_per_s=1e12"]
  assert cli.main(["doctor", *config]) == 2
  (line,) = (text for text in capsys.readouterr().out.splitlines() if text.startswith("BAD"))
  assert "1000000000000 are wanted" in line and "flexivit pack" in line
  monkeypatch.undo()
  given = ["--data=configs/folder.py:data_dir=/no/such/folder"]
  assert cli.main(["doctor", *given]) == 2
  assert "/no/such/folder" in capsys.readouterr().out


@pytest.mark.parametrize("lost", [["test"], ["val"], ["test", "val"]])
def test_data_of_evaluations_that_are_not_there_are_all_named(monkeypatch, capsys, lost):
  row = {"image": "24x24x3", "images_per_s": 1e3, "images_per_core_s": 5e2}
  monkeypatch.setattr(benchmarks, "reading", lambda settings, seconds: row)
  given = ["doctor", "--data=configs/i1k_sup.py:debug"]
  assert cli.main([*given, *(f"--config.evals.{key}.data.name=not_there" for key in lost)]) == 2
  (line,) = (text for text in capsys.readouterr().out.splitlines() if text.startswith("BAD"))
  assert f"{len(lost)} of 2 have no data ({', '.join(lost)})" in line
  assert line.count("'not_there'") == 1 and "--config.evals.NAME=None" in line
  assert cli.main([*given, *(f"--config.evals.{key}=None" for key in lost)]) in (None, 0)
  kept = [key for key in ("test", "val") if key not in lost]
  said = f"{len(kept)}: {kept[0]}" if kept else "none"
  assert f"ok   evaluations    {said}" in capsys.readouterr().out


# --- several processes ---


@pytest.fixture
def two(monkeypatch):
  """This is process 0 of two; what process 1 says is the fixture's list."""
  theirs = []
  monkeypatch.setattr(distributed, "is_on", lambda: True)
  monkeypatch.setattr(distributed, "texts", lambda text: [text, theirs.pop(0)])
  return theirs


def test_hosts_that_differ_are_named_with_what_differs(two):
  mine = hosts.facts(os.environ)
  environment = {**mine["environment"], "XLA_FLAGS": "--other"}
  other = {**mine, "environment": environment, "config": {"seed": 1}}
  two.append(json.dumps(other | {"versions": {**mine["versions"], "jaxlib": "0.9"}}))
  line = finding(lambda: hosts.agreement({"seed": 0}))
  assert "process 1: " in line and "versions.jaxlib" in line and "'0.9'" in line
  assert "environment.XLA_FLAGS" in line and "config.seed: 0 -> 1" in line


def test_variables_that_name_a_process_may_differ():
  given = {"JAX_PROCESS_ID": "1", "JAX_COORDINATOR_ADDRESS": "a:1", "HOME": "/", "JAX_X": "1"}
  assert hosts.facts(given)["environment"] == {"JAX_X": "1"}


def test_a_clock_that_is_wrong(two):
  two += ["", repr(time.time() - 3600)]
  line = finding(hosts.clocks)
  assert "process 1" in line or "process 0 " in line
  assert "NTP" in line


def test_findings_of_all_processes_are_put_together():
  good, bad = findings.Finding("a", True, "x"), findings.Finding("a", False, "y", "z")
  assert findings.merged([[good], [good._replace(said="other")]]) == [("", good)]
  assert findings.merged([[good], [bad], [bad]]) == [("processes 1, 2: ", bad)]
  assert findings.merged([[bad], [bad]]) == [("all processes: ", bad)]


def test_processes_that_do_not_answer_are_a_red_line_of_the_others(monkeypatch):
  monkeypatch.setattr(distributed, "texts", lambda text: time.sleep(60))
  good = findings.Finding("a", True, "x")
  rows, whole = examination.of_all([good], 0.05, reached=True)
  assert not whole and [(f.check, f.ok) for _, f in rows] == [("a", True), ("processes", False)]
  assert examination.of_all([good], 0.05, reached=False) == ([("", good)], False)


LATE = "import time; time.time = lambda now=time.time: now() + 3600"


@pytest.mark.slow
def test_two_processes_that_differ(tmp_path, environment_of):
  """The second has other flags, another config, a clock that is an hour ahead, and another folder."""
  with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    port = s.getsockname()[1]
  processes = []
  for i in (0, 1):
    given = ["doctor", f"--coordinator_address=127.0.0.1:{port}", "--num_processes=2"]
    given += [f"--process_id={i}", "--data=configs/digits.py:debug", f"--config.seed={i}"]
    given += [f"--workdir={tmp_path / str(i)}"]
    code = f"{LATE if i else ''}\nfrom flexivit_jax import cli\ncli.entry({given!r})"
    environment = environment_of(2)
    environment["XLA_FLAGS"] += " --xla_cpu_enable_fast_math=false" * i
    processes.append(
      subprocess.Popen(
        [sys.executable, "-c", code],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
      )
    )
  out = [p.communicate(timeout=200) for p in processes]
  assert [p.returncode for p in processes] == [2, 2], out
  lines = {line.split()[1]: line for line in out[0][0].splitlines() if line.startswith("BAD")}
  assert set(lines) == {"hosts", "clock", "same", "storage"}, out
  assert "environment.XLA_FLAGS" in lines["hosts"] and "config.seed: 0 -> 1" in lines["hosts"]
  assert "process 1 does not see" in lines["same"].replace("(1 of 2) ", "")
  assert "process 1" in lines["storage"] and "clock" in lines["storage"]
  assert out[1][0] == ""
  assert not list(tmp_path.iterdir())


HANGS = """
import sys, time
from flexivit_jax import cli
from flexivit_jax.doctor import chips
chips.backend = lambda: time.sleep(3600)
cli.entry(["doctor", "--limit=2"])
"""


@pytest.mark.slow
def test_one_process_whose_devices_never_answer_ends_both(environment_of):
  """The other waits six times as long for what it has to do before, and says that nobody answers."""
  with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    port = s.getsockname()[1]
  processes = []
  for i in (0, 1):
    given = ["doctor", "--limit=2", f"--coordinator_address=127.0.0.1:{port}"]
    given += ["--num_processes=2", f"--process_id={i}"]
    code = (HANGS if i else "from flexivit_jax import cli\n").replace('["doctor", "--limit=2"]', "")
    code = code.replace("cli.entry()", "") + f"\ncli.entry({given!r})"
    command = [sys.executable, "-c", code]
    processes.append(
      subprocess.Popen(
        command, env=environment_of(1), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
      )
    )
  out = [p.communicate(timeout=100) for p in processes]
  assert processes[1].returncode == 2 and "no answer within 2 s" in out[1][1]
  assert processes[0].returncode == 2 and "BAD  sum" in out[0][0], out


@pytest.mark.slow
def test_devices_that_never_answer_do_not_keep_the_command(environment_of):
  begun = time.monotonic()
  command = [sys.executable, "-c", HANGS]
  done = subprocess.run(command, env=environment_of(1), capture_output=True, text=True, check=False)
  assert done.returncode == 2 and time.monotonic() - begun < 60
  lines = [line for line in done.stdout.splitlines() if line.startswith("BAD")]
  assert "no answer within 2 s" in lines[0] and "restart their host" in lines[0]
  assert all("not tried, because of devices" in line for line in lines[1:]) and len(lines) == 7
  assert "7 of 12 checks are not green: devices, mesh" in done.stderr
