"""All checks of `flexivit doctor` in their order, each under its time limit."""

import functools
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from flexivit_jax.doctor import findings, machine
from flexivit_jax.doctor.findings import Finding, within

Show = Callable[[Finding], None]
Rows = list[tuple[str, Finding]]
WIDTH = 13  # of the longest name of a check
_ALONE = 6  # checks before the first one in which the processes wait for each other


def of_machine(limit: float) -> list[Finding]:
  """Checks this host, without JAX; `limit` is the seconds for each check."""
  checks: dict[str, tuple[Callable[[], str], str]] = {
    "versions": (machine.versions, "install this package once more"),
    "host memory": (machine.memory, "look at free -h"),
    "open files": (machine.open_files, "look at ulimit -n"),
    "shared memory": (machine.shared_memory, "look at df -h /dev/shm"),
  }
  return [within(limit, name, *check) for name, check in checks.items()]


def of_jax(limit: float) -> Finding | None:
  """Imports JAX; returns what is wrong with it, or None."""

  def load() -> str:
    import jax

    return jax.__version__

  finding = within(limit, "JAX", load, "install this package once more into an empty environment")
  return None if finding.ok else finding


def of_devices(
  workdir: pathlib.Path | None,
  settings: Mapping[str, Any] | None,
  needs: Mapping[str, tuple[Callable[[], str], str]],
  limit: float,
  show: Show,
) -> tuple[list[Finding], bool]:
  """Checks the devices, the folder, and what the processes of a run must have in common; all must call it.

  Leaves nothing behind in the folder.

  Args:
    workdir: the run folder; None: it is not checked.
    settings: the config that is to run; None: plain data parallelism.
    needs: name -> (check of what the config needs, what to do where it fails).
    limit: seconds for each check; those that wait for other processes have as much for what these do before.
    show: called with each finding.

  Returns:
    The findings; and whether all devices have answered, so that the processes can reach each other.
  """
  from flexivit_jax.doctor import chips, hosts, storage
  from flexivit_jax.running import distributed

  hang = "look whether another process has the devices (lsof /dev/accel0, nvidia-smi), and restart their host"
  network = (
    "look whether the hosts reach each other: firewall, NCCL_SOCKET_IFNAME, the logs of each"
  )
  slow = "its file system does not answer: look at its server and at the mount, or give another --workdir"
  several = distributed.is_on()
  together = limit * (_ALONE if several else 1)
  new: list[pathlib.Path] = []
  found = [_shown(within(limit, "cache", chips.cache, slow), show)]
  if workdir is not None:
    check = functools.partial(storage.check, workdir, new, several=several)
    found.append(_shown(within(limit, "storage", check, slow), show))
  checks = [
    ("devices", limit, chips.backend, hang),
    ("mesh", limit, lambda: chips.mesh(settings), "mend the config's mesh and batch_size"),
    ("device memory", limit, chips.memory, hang),
    ("programs", limit, chips.programs, hang),
    ("sum", together, chips.collective, network),
    ("hosts", together, lambda: hosts.agreement(settings), network),
    ("clock", together, hosts.clocks, network),
  ]
  if workdir is not None and several and not storage.in_bucket(workdir):
    same = functools.partial(hosts.same_folder, workdir)
    checks.append(("same folder", max(together, 60.0), same, slow))
  checks += [(name, limit, check, todo) for name, (check, todo) in needs.items()]
  broken = ""
  for name, seconds, call, todo in checks:
    if broken:
      finding = Finding(name, False, f"not tried, because of {broken}", "mend that first")
    else:
      finding = within(seconds, name, call, todo)
      if finding.failure == "time" or (name == "devices" and finding.failure):
        broken = name  # what holds the devices holds all that comes after
    found.append(_shown(finding, show))
  if several and not broken:  # others may still need the folder
    within(together, "end", lambda: "".join(distributed.texts("")), "")

  def tidy() -> str:
    storage.remove(new)
    return ""

  within(limit, "end", tidy, "")
  return found, not broken


def of_all(found: list[Finding], limit: float, *, reached: bool) -> tuple[Rows, bool]:
  """Exchanges the findings of all processes.

  Args:
    found: of this process.
    limit: seconds for a check.
    reached: see `of_devices`; where it is False this process does not wait for the others.

  Returns:
    (Processes, finding) to print; and whether they are of all processes: where these do not reach each other, they
    are this one's.
  """
  from flexivit_jax.running import distributed

  texts: list[str] = []

  def exchange() -> str:
    texts.extend(distributed.texts(json.dumps(found)))
    return ""

  if not reached:
    return [("", f) for f in found], False
  answer = within(_ALONE * limit, "processes", exchange, "read what the others print")
  if not answer.ok:
    return [("", f) for f in [*found, answer]], False
  return findings.merged([[Finding(*f) for f in json.loads(text)] for text in texts]), True


def _shown(finding: Finding, show: Show) -> Finding:
  show(finding)
  return finding
