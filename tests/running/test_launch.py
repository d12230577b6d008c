"""What the files in launch/ run, with stand-ins for gcloud, uv, srun: whether the commands fit together."""

import os
import pathlib
import shlex
import subprocess
import sys
import time

import pytest

LAUNCH = pathlib.Path(__file__).parents[2] / "launch"

# One host: what is copied there comes to its home, what is run there runs there.
GCLOUD = """
echo "gcloud $*" >> "$HOME/said"
for a; do case $a in --command=*) (cd "$HOME" && exec bash -c "${a#--command=}") ;; esac; done
case $* in *" scp "*) cp "$5" "$HOME" ;; esac
"""
UV = 'echo "uv $*" >> "$HOME/said"; [[ $1 != venv ]] || mkdir -p .venv/bin'
FLEXIVIT = 'printf "%s|" "$PWD" "$@"; echo'


def stand_in(path, script):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(f"#!/usr/bin/env bash\nset -e\n{script}\n")
  path.chmod(0o755)


@pytest.fixture
def home(tmp_path, monkeypatch):
  """An empty home whose bin/ is looked into first."""
  home = tmp_path / "home"
  (home / "bin").mkdir(parents=True)
  monkeypatch.setenv("HOME", str(home))
  monkeypatch.setenv("PATH", f"{home / 'bin'}:{os.environ['PATH']}")
  return home


def run(file, *arguments, **environment):
  command = ["bash", LAUNCH / file, *arguments]
  given = {**os.environ, **environment}
  return subprocess.run(command, env=given, check=False, capture_output=True, text=True)


@pytest.mark.skipif(sys.platform != "linux", reason="the hosts are Linux")
def test_a_pod_gets_the_files_and_trains_without_the_terminal(home):
  stand_in(home / "bin" / "gcloud", GCLOUD)
  stand_in(home / "bin" / "python3", 'echo "python3 $*" >> "$HOME/said"')
  stand_in(home / ".local" / "bin" / "uv", UV)
  pod = {"NAME": "pod", "ZONE": "here"}
  made = run("tpu_pod.sh", "create", "v5litepod-8", **pod)
  assert made.returncode == 0, made.stderr
  said = (home / "said").read_text()
  assert "uv venv -q --python 3.12 .venv\n" in said
  assert "uv pip install -q --python .venv jax[tpu] ./flexivit\n" in said
  assert (home / "flexivit" / "configs" / "i1k_sup.py").exists()

  stand_in(home / ".venv" / "bin" / "flexivit", FLEXIVIT)
  given = ["--config", "configs/i1k_sup.py", "--config.optim.schedule={'a': 1}"]
  assert run("tpu_pod.sh", "train", *given, **pod).returncode == 0
  end, log = time.monotonic() + 20, home / "flexivit.log"
  while not (log.exists() and log.read_text().endswith("\n")) and time.monotonic() < end:
    time.sleep(0.1)
  assert log.read_text() == "|".join([str(home / "flexivit"), "train", *given, "\n"])


@pytest.mark.parametrize(("code", "requeued"), [(75, True), (2, False), (0, False)])
def test_a_job_whose_processes_have_saved_is_queued_again(home, code, requeued):
  said = home / "said"
  stand_in(home / "bin" / "srun", f'echo "$SRUN_CPUS_PER_TASK $*" >> {said}; exit {code}')
  stand_in(home / "bin" / "scontrol", f'echo "scontrol $*" >> {said}')
  job = {"SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "12"}
  assert run("slurm.sbatch", "--workdir", "a b", **job).returncode == code
  lines = said.read_text().splitlines()
  assert shlex.split(lines[0])[:2] == ["12", "--kill-on-bad-exit=0"]
  assert lines[1:] == (["scontrol requeue 7"] if requeued else [])
