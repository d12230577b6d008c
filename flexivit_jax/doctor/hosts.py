"""Checks between the processes of a run: that all are of one kind, see one folder, and have one time."""

import os
import pathlib
import platform
import time
from collections.abc import Mapping

import jax
import xxhash

from flexivit_jax.config import Section
from flexivit_jax.doctor import machine, storage
from flexivit_jax.doctor.findings import wrong
from flexivit_jax.running import distributed, processes
from flexivit_jax.trees import Json

CLOCK_S = 2.0
# Variables that change programs or numbers. Those that name a process (JAX_PROCESS_ID) are none.
_VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "NCCL_ALGO", "NCCL_PROTO", "TF_CPP_MIN_LOG_LEVEL")
_PREFIXES = ("JAX_", "XLA_PYTHON_CLIENT_")
_OWN = ("JAX_PROCESS_ID", "JAX_COORDINATOR", "JAX_LOCAL_DEVICE_IDS", "JAX_COMPILATION_CACHE_DIR")


def facts(environment: Mapping[str, str]) -> Json:
  """What has to be equal on all processes, by name."""
  variables = {
    name: value
    for name, value in sorted(environment.items())
    if (name in _VARIABLES or name.startswith(_PREFIXES)) and not name.startswith(_OWN)
  }
  devices = sorted({d.device_kind for d in jax.local_devices()})
  return {
    "Python": platform.python_version(),
    "versions": {name: machine.installed(name) for name in machine.SHOWN},
    "code of flexivit_jax": _code(),
    "devices": f"{jax.local_device_count()} x {', '.join(devices)}",
    "environment": variables,
  }


def _code() -> str:
  """A checksum of this package's own files: of hosts that have other versions of a checkout."""
  root = pathlib.Path(__file__).parents[1]
  digest = xxhash.xxh3_64()
  for file in sorted(root.rglob("*.py")):
    digest.update(file.relative_to(root).as_posix().encode() + b"\0" + file.read_bytes())
  return digest.hexdigest()


def agreement(settings: Section | None) -> str:
  """Compares versions, code, devices, environment and config of all processes."""
  if not distributed.is_on():
    return "one process"
  mine = facts(os.environ) | {"config": settings or {}}
  lines = processes.differences(mine)
  if lines:
    wrong(
      f"(process 0 -> theirs) {'; '.join(lines)}",
      "install and start the same everywhere: the same image, the same checkout, the same variables",
    )
  return (
    f"{jax.process_count()} processes have equal versions, code, devices, environment and config"
  )


def clocks() -> str:
  """Compares the clocks of all processes, at a moment that is nearly the same."""
  if not distributed.is_on():
    return time.strftime("%Y-%m-%d %H:%M:%S UTC, one process", time.gmtime())
  distributed.texts("")  # all go on at once
  times = [float(text) for text in distributed.texts(repr(time.time()))]
  away = [t - sorted(times)[len(times) // 2] for t in times]
  late = {i: s for i, s in enumerate(away) if abs(s) > CLOCK_S}
  if late:
    named = ", ".join(f"process {i} {s:+.0f} s" for i, s in list(late.items())[:8])
    wrong(
      f"clocks differ from the median: {named}",
      "set them by NTP (timedatectl set-ntp true): buckets and licences refuse a wrong time",
    )
  return f"{len(times)} clocks within {max(times) - min(times):.2g} s"


def same_folder(workdir: pathlib.Path) -> str:
  """Checks that all processes see the folder that process 0 sees."""
  if not distributed.is_on():
    return "one process"
  number = distributed.on_first(lambda: storage.mark(workdir), f"the folder {workdir}")
  seen = distributed.texts("yes" if storage.sees(workdir, number or 0) else "")
  distributed.on_first(lambda: storage.unmark(workdir), f"the folder {workdir}")
  if blind := [str(i) for i, text in enumerate(seen) if not text]:
    wrong(
      f"process {', '.join(blind[:8])} ({len(blind)} of {len(seen)}) does not see {workdir} as process 0 has it",
      "mount one shared file system on all hosts, and give --workdir there",
    )
  return f"{len(seen)} processes see the same {workdir}"
