"""What the files in launch/ run, with stand-ins for gcloud, uv, srun: whether the commands fit together."""

import os
import pathlib
import re
import shlex
import subprocess
import sys
import time

import pytest
import yaml

from flexivit_jax import cli, config, storage
from flexivit_jax.devices import sharding
from flexivit_jax.running import exit_codes

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
  assert "uv pip install -q --python .venv jax[tpu] ./flexivit[gcs]\n" in said
  assert (home / "flexivit" / "configs" / "i1k_sup.py").exists()

  stand_in(home / ".venv" / "bin" / "flexivit", FLEXIVIT)
  given = ["--config", "configs/i1k_sup.py", "--config.optim.schedule={'a': 1}"]
  given += ["--workdir", "gs://bucket/runs/i1k"]
  assert run("tpu_pod.sh", "train", *given, **pod).returncode == 0
  end, log = time.monotonic() + 20, home / "flexivit.log"
  while not (log.exists() and log.read_text().endswith("\n")) and time.monotonic() < end:
    time.sleep(0.1)
  assert log.read_text() == "|".join([str(home / "flexivit"), "train", *given, "\n"])


def test_a_pod_is_stopped_by_its_loops_and_not_by_the_shell_that_says_so(home):
  stand_in(home / "bin" / "gcloud", GCLOUD)
  stand_in(home / "bin" / "pkill", 'printf "%s|" "$@" > "$HOME/killed"')
  assert run("tpu_pod.sh", "stop", NAME="pod", ZONE="here").returncode == 0
  assert (home / "killed").read_text() == "-TERM|-f|[l]aunch/again.sh|"


@pytest.mark.skipif(sys.platform != "linux", reason="the hosts are Linux")
def test_a_pod_is_asked_by_the_doctor_and_keeps_its_programs_in_a_bucket(home):
  stand_in(home / "bin" / "gcloud", GCLOUD)
  (home / "flexivit").mkdir()
  stand_in(home / ".venv" / "bin" / "flexivit", 'echo "$JAX_COMPILATION_CACHE_DIR $*"')
  pod = {"NAME": "pod", "ZONE": "here", "CACHE": "gs://b/c d"}
  done = run("tpu_pod.sh", "doctor", "--workdir", "a b", **pod)
  assert done.stdout == "gs://b/c d doctor --workdir a b\n"


@pytest.mark.parametrize(
  ("code", "restarts", "requeued"),
  [
    (75, 0, True),
    (75, 99, True),
    (70, 0, True),
    (134, 3, True),
    (70, 20, False),
    (2, 0, False),
    (1, 0, False),
    (0, 0, False),
  ],
)
def test_a_job_that_resumes_is_queued_again(home, code, restarts, requeued):
  said = home / "said"
  stand_in(home / "bin" / "srun", f'echo "$SRUN_CPUS_PER_TASK $*" >> {said}; exit {code}')
  stand_in(home / "bin" / "scontrol", f'echo "scontrol $*" >> {said}')
  job = {"SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "12", "SLURM_RESTART_COUNT": str(restarts)}
  assert run("slurm.sbatch", "--workdir", "a b", **job).returncode == code
  lines = said.read_text().splitlines()
  assert shlex.split(lines[0])[:4] == ["12", "--kill-on-bad-exit=0", "flexivit", "train"]
  assert lines[1:] == (["scontrol requeue 7"] if requeued else [])


# --- again.sh, and one machine with GPUs ---

# Ends with the next of the codes in a file.
NEXT = """
code=$(head -n 1 "$HOME/codes"); sed -i 1d "$HOME/codes"
printf "%s|" "$@" >> "$HOME/said"; echo >> "$HOME/said"; exit "$code"
"""


@pytest.mark.parametrize(
  ("codes", "retries", "ends", "starts"),
  [
    ([75, 70, 134, 0], 9, 0, 4),
    ([70, 2], 9, 2, 2),
    ([1], 9, 1, 1),
    ([137], 9, 137, 1),
    ([70, 70, 70], 1, 70, 2),
  ],
)
def test_what_resumes_starts_again(home, codes, retries, ends, starts):
  (home / "codes").write_text("".join(f"{code}\n" for code in codes))
  stand_in(home / "bin" / "flexivit", NEXT)
  given = ["flexivit", "train", "--workdir", "a b"]
  assert run("again.sh", *given, RETRIES=str(retries), WAIT="0").returncode == ends
  assert (home / "said").read_text().splitlines() == ["train|--workdir|a b|"] * starts


def test_a_stopped_command_has_saved_and_does_not_start_again(home):
  """SIGTERM to the script goes to the command, whose code is the script's."""
  saves = 'trap "echo saved >> $HOME/said; exit 75" TERM; touch "$HOME/begun"; while true; do sleep 0.05; done'
  stand_in(home / "bin" / "flexivit", saves)
  script = ["bash", LAUNCH / "again.sh", "flexivit", "train"]
  with subprocess.Popen(script, env={**os.environ, "WAIT": "0"}) as process:
    end = time.monotonic() + 20
    while not (home / "begun").exists() and time.monotonic() < end:
      time.sleep(0.02)
    process.terminate()
    assert process.wait(20) == 75
  assert (home / "said").read_text() == "saved\n"


def test_one_machine_with_gpus(home):
  stand_in(home / "bin" / "flexivit", 'echo "$XLA_PYTHON_CLIENT_MEM_FRACTION $(ulimit -n) $*"')
  done = run("gpus.sh", "--workdir", "runs/x", FLEXIVIT="flexivit", COMMAND="doctor")
  fraction, files, *rest = done.stdout.split()
  assert (fraction, rest) == ("0.92", ["doctor", "--workdir", "runs/x"]) and int(files) >= 1024


# --- what the files say ---

CHIPS = {"4x8": 32}
JOBSETS = sorted(path.name for path in LAUNCH.glob("*.yaml"))


@pytest.mark.parametrize("file", [*sorted(p.name for p in LAUNCH.glob("*.sh")), "slurm.sbatch"])
def test_scripts_are_valid_and_their_examples_are_commands(file):
  assert subprocess.run(["bash", "-n", LAUNCH / file], check=False).returncode == 0
  text = (LAUNCH / file).read_text()
  assert os.access(LAUNCH / file, os.X_OK) or file.endswith(".sbatch")
  examples = re.findall(
    r"^# .*(?:launch/\S+\.\w+(?: \d)?|flexivit)((?: (?:train|doctor))? --.*)", text, re.M
  )
  assert examples or file == "again.sh"
  for example in examples:
    if "..." not in example:
      words = shlex.split(example.split("  #")[0])
      command = [] if words[0] in cli.COMMANDS else ["doctor" if "--data" in words else "train"]
      cli.parse([*command, *words])


@pytest.mark.parametrize("file", JOBSETS)
def test_a_jobset_starts_as_many_processes_as_it_has_hosts_and_resumes(file):
  spec = yaml.safe_load((LAUNCH / file).read_text())["spec"]
  (replicated,) = spec["replicatedJobs"]
  job = replicated["template"]["spec"]
  assert job["parallelism"] == job["completions"] and job["completionMode"] == "Indexed"
  pod = job["template"]["spec"]
  (container,) = pod["containers"]
  # Code 2 ends it; all other codes restart all pods: one alone cannot go on.
  assert job["backoffLimit"] == 0 and pod["restartPolicy"] == "Never"
  assert spec["failurePolicy"]["maxRestarts"] > 0
  (ends,) = spec["failurePolicy"]["rules"]
  assert (ends["action"], ends["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
  (rule,) = job["podFailurePolicy"]["rules"]
  assert rule["onExitCodes"]["values"] == [exit_codes.ERROR]
  assert rule["onExitCodes"]["containerName"] == container["name"]
  # The command is one of ours, with keys that its config has.
  words = [word.replace("$(JOB_COMPLETION_INDEX)", "0") for word in container["command"]]
  assert words[0] == "flexivit"
  args = cli.parse(words[1:])
  settings = config.load(args.config, args.overrides)
  # Pods share a bucket and nothing else.
  environment = {variable["name"]: variable["value"] for variable in container["env"]}
  shared = [str(args.workdir), environment["JAX_COMPILATION_CACHE_DIR"]]
  shared.append(settings["input"]["data"]["data_dir"])
  assert all(storage.address(place) for place in shared)
  assert not storage.address(environment["FLEXIVIT_CACHE"])
  assert [list(volume) for volume in pod["volumes"] if "emptyDir" not in volume] == []
  names = {mount["name"] for mount in container["volumeMounts"]}
  assert names == {volume["name"] for volume in pod["volumes"]}
  (chips,) = container["resources"]["limits"].values()
  if "gpus" in file:
    assert args.num_processes == job["completions"]
    name = f"{yaml.safe_load((LAUNCH / file).read_text())['metadata']['name']}-{replicated['name']}"
    assert args.coordinator_address.startswith(f"{name}-0-0.")
  else:
    topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    assert chips * job["completions"] == CHIPS[topology]
  devices = chips * job["completions"] * replicated["replicas"]
  fsdp = settings.get("mesh", {}).get("fsdp", 1)
  sharding.mesh_shape(devices, fsdp=fsdp)
  assert chips * job["completions"] % fsdp == 0, "the parameters of a slice stay in it"
  assert settings["input"]["batch_size"] % devices == 0


def test_slices_are_jobs_on_node_pools_of_their_own():
  multislice = yaml.safe_load((LAUNCH / "gke_multislice.yaml").read_text())
  where = multislice["metadata"]["annotations"]["alpha.jobset.sigs.k8s.io/exclusive-topology"]
  assert where == "cloud.google.com/gke-nodepool"
  assert multislice["spec"]["replicatedJobs"][0]["replicas"] == 2
