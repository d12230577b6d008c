"""Checks of a host that need no JAX: versions, memory, open files, shared memory."""

import importlib.metadata
import os
import pathlib
import platform
import resource
import shutil
from collections.abc import Iterator

from packaging.requirements import Requirement

from flexivit_jax.doctor.findings import wrong

# Packages whose own requirements are compared with what is installed.
_LIBRARIES = ("flexivit_jax", "jax", "flax", "optax", "orbax-checkpoint")
SHOWN = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint")
_GIB = 2**30
HOST_MEMORY = 2 * _GIB  # a save and a loader of small images take less
OPEN_FILES = 1024  # the shards of one large data set
SHARED_MEMORY = _GIB  # containers often have 64 MiB
_CGROUP = pathlib.Path("/sys/fs/cgroup")
_SHM = pathlib.Path("/dev/shm")


def versions() -> str:
  """Compares the installed versions with the requirements of this package and of its libraries.

  Of accelerators' packages (plugins, libtpu), which are extras of jax, those that are installed have to fit.
  """
  misfits: dict[str, str] = {}
  for library in _LIBRARIES:
    for requirement in _requirements(library):
      found = installed(requirement.name)
      if found is None and requirement.marker is None:
        misfits[str(requirement)] = f"{library} needs {requirement}, which is not installed"
      elif found is not None and not requirement.specifier.contains(found, prereleases=True):
        misfits[str(requirement)] = f"{library} needs {_plain(requirement)}, here is {found}"
  if misfits:
    wrong(
      "; ".join(misfits.values()),
      "install this package once more into an empty environment, with the extra of the accelerator:"
      " pip install '.[tpu]' (or cuda13, cuda12)",
    )
  named = ", ".join(f"{name} {installed(name)}" for name in SHOWN)
  return f"Python {platform.python_version()}, {named}"


def installed(name: str) -> str | None:
  """The version of an installed package."""
  try:
    return importlib.metadata.version(name)
  except importlib.metadata.PackageNotFoundError:
    return None


def _requirements(library: str) -> Iterator[Requirement]:
  """What a package needs here; of an extra only what fixes an accelerator's package."""
  try:
    lines = importlib.metadata.requires(library) or []
  except importlib.metadata.PackageNotFoundError:
    return  # a checkout that is not installed
  for requirement in map(Requirement, lines):
    marker = requirement.marker
    if marker is None or marker.evaluate({"extra": ""}):
      requirement.marker = None  # it holds
      yield requirement
    elif library == "jax" and requirement.name.startswith(("jax-", "libtpu")):
      yield requirement


def _plain(requirement: Requirement) -> str:
  return f"{requirement.name}{requirement.specifier}"


def memory() -> str:
  """Compares the memory that is left on the host, within the limit of its container, with `HOST_MEMORY`."""
  total, free = _physical()
  for limit, used in _limits():
    total, free = min(total, limit), min(free, limit - used)
  said = f"{free / _GIB:.1f} GiB free of {total / _GIB:.1f}"
  if free < HOST_MEMORY:
    wrong(
      said,
      f"end other programs, or ask for more: reading and saving need {HOST_MEMORY / _GIB:g} GiB at least",
    )
  return said


def _physical() -> tuple[int, int]:
  """Bytes of the host: all, and those that are free or hold only cached files."""
  info = pathlib.Path("/proc/meminfo")
  if info.exists():
    rows = dict(line.split(":", 1) for line in info.read_text().splitlines())
    return tuple(int(rows[key].split()[0]) * 1024 for key in ("MemTotal", "MemAvailable"))  # type: ignore[return-value]
  page = os.sysconf("SC_PAGE_SIZE")
  total = os.sysconf("SC_PHYS_PAGES") * page
  return total, total


def _limits() -> Iterator[tuple[int, int]]:
  """(Limit, bytes in use) of the control group of this container, version 2 or 1."""
  for folder, names in (
    (_CGROUP, ("memory.max", "memory.current", "inactive_file")),
    (
      _CGROUP / "memory",
      ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ),
  ):
    try:
      limit, used = ((folder / name).read_text().strip() for name in names[:2])
      cached = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
      continue
    if limit.isdigit():  # "max" is none
      yield int(limit), int(used) - int(cached.get(names[2], 0))


def open_files() -> str:
  """Compares the limit of open files with `OPEN_FILES`."""
  soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
  if soft != resource.RLIM_INFINITY and soft < OPEN_FILES:
    wrong(
      f"a process may open {soft} files",
      f"ulimit -n 65536 before the command (the most that is allowed here is {hard})",
    )
  return f"a process may open {'any number of' if soft == resource.RLIM_INFINITY else soft} files"


def shared_memory() -> str:
  """Compares the free space of /dev/shm with `SHARED_MEMORY`; loaders with processes and NCCL use it."""
  if not _SHM.is_dir():
    return "this system has none, which is as it should be outside Linux"
  free = shutil.disk_usage(_SHM).free
  said = f"{free / _GIB:.2g} GiB free in {_SHM}"
  if free < SHARED_MEMORY:
    wrong(
      said,
      "give the container more (docker: shm-size=8g; Kubernetes: an emptyDir of medium Memory), or delete old files",
    )
  return said
