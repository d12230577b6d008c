"""Several processes of one run: how they join, agree, and end.

JAX does the work: `jax.distributed` joins the processes, its coordination service detects a lost one, its preemption
service chooses the step after which all save when one gets SIGTERM.
"""

import contextlib
import importlib.util
import itertools
import json
import os
import pathlib
import sys
import threading
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
import xxhash
from jax._src import distributed as jax_distributed  # JAX has no public name for its client
from jax.experimental import multihost_utils

from flexivit_jax import errors
from flexivit_jax.running import exit_codes

T = TypeVar("T")
_HEARTBEAT = [100.0]
_CALLS = itertools.count()  # of `on_first`
_LONG_MS = 7 * 24 * 3600 * 1000  # what process 0 does alone may take: a lost process ends the wait
_FAILED = "failed"
_TPU = "the TPU's"
FLAGS = ("coordinator_address", "num_processes", "process_id")
# Launchers of several processes: name -> (variables they set, variable with the number of processes).
_LAUNCHERS = {
  "SLURM": (("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID"), "SLURM_NTASKS"),
  "Open MPI": (("OMPI_MCA_orte_hnp_uri", "OMPI_COMM_WORLD_RANK"), "OMPI_COMM_WORLD_SIZE"),
}


def start(
  coordinator_address: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
  *,
  join_timeout: int = 300,
  heartbeat_timeout: int = 100,
  saves: bool = True,
) -> None:
  """Joins the processes of a run; call it before anything else of JAX. Does nothing for one process.

  The first three arguments default to those of the launcher: a TPU pod, SLURM, Open MPI, or Kubernetes if the package
  `kubernetes` is installed.

  Args:
    coordinator_address: "host:port" of the first process.
    num_processes: the number of processes.
    process_id: the index of this process, from 0.
    join_timeout: seconds within which all processes must join.
    heartbeat_timeout: seconds without a heartbeat after which a process is lost and the others end.
    saves: SIGTERM waits for `preempted`, which a command that saves calls; False: it ends the process at once.

  Raises:
    UserError: only some of the three are given; or a process did not join.
  """
  flags = dict(zip(FLAGS, (coordinator_address, num_processes, process_id), strict=True))
  explicit = [name for name, value in flags.items() if value is not None]
  if explicit and len(explicit) < len(FLAGS):
    missing = ", ".join(f"--{name}" for name in FLAGS if name not in explicit)
    raise errors.UserError(f"Got --{explicit[0]} without {missing}; give all three, or none.")
  launcher = None if explicit else _launcher(os.environ)
  if not explicit and launcher is None:
    return
  if num_processes is not None and not (
    num_processes > 0 and 0 <= (process_id or 0) < num_processes
  ):
    raise errors.UserError(
      f"--process_id={process_id} of --num_processes={num_processes}; expected 0 to {num_processes - 1}."
    )
  whose = f"--coordinator_address={coordinator_address}" if explicit else launcher
  late = threading.Timer(join_timeout, _say_late, (whose, num_processes, join_timeout))
  late.daemon = True
  late.start()
  jax.config.update("jax_enable_preemption_service", saves)
  try:
    jax.distributed.initialize(
      coordinator_address,
      num_processes,
      process_id,
      initialization_timeout=join_timeout + 60,  # at its own time-out it aborts, and says less
      heartbeat_timeout_seconds=heartbeat_timeout,
      shutdown_timeout_seconds=heartbeat_timeout,
    )
  except (RuntimeError, ValueError) as e:
    # JAX has no type for it; other ValueErrors may be of a pod, which must not start alone.
    if launcher == _TPU and "coordinator_address should be defined" in str(e):
      return  # a TPU of one host, of no pod that JAX knows
    raise errors.UserError(
      f"The processes of this run ({whose}) could not be joined: {str(e).splitlines()[0]}"
    ) from e
  finally:
    late.cancel()
  _HEARTBEAT[0] = heartbeat_timeout


def _say_late(whose: str, count: int | None, seconds: int) -> None:
  """Ends this process because others did not join."""
  print(
    f"flexivit: error: the {f'{count} ' if count else ''}processes of this run ({whose}) did not all come within"
    f" {seconds} s."
    " Look whether each was started, with the same address and another --process_id, and whether the port is open.",
    file=sys.stderr,
    flush=True,
  )
  os._exit(exit_codes.ERROR)


def heartbeat() -> float:
  """Returns the seconds without a heartbeat after which a process is lost."""
  return _HEARTBEAT[0]


def _launcher(environment: Mapping[str, str]) -> str | None:
  """Returns the launcher that started several processes; None if there is none."""
  for name, (needed, count) in _LAUNCHERS.items():
    if all(key in environment for key in needed) and int(environment.get(count, "1")) > 1:
      return name
  if int(environment.get("OMPI_COMM_WORLD_SIZE", "1")) > 1:
    raise errors.UserError(
      "Open MPI has started several processes but does not say where the first is (its version 5 does not); give "
      + ", ".join(f"--{name}" for name in FLAGS)
      + ", the last from OMPI_COMM_WORLD_RANK."
    )
  accelerators = [*pathlib.Path("/dev").glob("accel*"), *pathlib.Path("/dev").glob("vfio/[0-9]*")]
  wanted = (environment.get("JAX_PLATFORMS") or "tpu").split(",")[0] == "tpu"
  if wanted and accelerators and importlib.util.find_spec("libtpu"):
    return _TPU
  if not {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= environment.keys():
    return None
  if importlib.util.find_spec("kubernetes"):
    return "Kubernetes"
  print(
    "flexivit: this is a pod of an indexed Kubernetes job, and starts alone: to join the others install the package"
    f" kubernetes, or give {', '.join(f'--{name}' for name in FLAGS)}.",
    file=sys.stderr,
    flush=True,
  )
  return None


def is_on() -> bool:
  """Whether the run has several processes."""
  return jax.distributed.is_initialized() and jax.process_count() > 1


def is_first() -> bool:
  """Whether this is the only process, or process 0 of several, which writes what there is one of."""
  return not is_on() or jax.process_index() == 0


def preempted(step: int) -> bool:
  """Whether all processes must save and end after this step, because one got SIGTERM.

  All processes must call it after each step. The runtime catches SIGTERM itself.
  """
  return multihost_utils.reached_preemption_sync_point(step)


def service() -> Any:
  """Returns the client of JAX's coordination service, which keeps text by key in the memory of process 0."""
  return jax_distributed.global_state.client


def on_first(call: Callable[[], T], what: str) -> T:
  """Calls `call` on process 0 while the others wait, however long; returns its result on all processes.

  Args:
    call: what one process alone must do, such as writing files, which the others see afterwards; returns what JSON can
      hold.
    what: names it in the error on the other processes.

  Raises:
    UserError: `call` raised one; on all processes.
  """
  if not is_on():
    return call()
  client, key = service(), f"flexivit/on_first/{next(_CALLS)}"
  if jax.process_index() == 0:
    try:
      text = json.dumps(call())
    except errors.UserError:
      client.key_value_set(key, _FAILED)
      _meet(key)
      raise
    client.key_value_set(key, text)
  else:
    text = client.blocking_key_value_get(key, _LONG_MS)
    if text == _FAILED:
      _meet(key)
      raise errors.UserError(f"Process 0 could not go on ({what}); its own message says why.")
  return json.loads(text)


def _meet(key: str) -> None:
  """Waits a moment for the others: the service ends with process 0, which must not end before they have read."""
  with contextlib.suppress(jax.errors.JaxRuntimeError):
    service().wait_at_barrier(f"{key}/read", timeout_in_ms=10_000)


def agree(step: int, facts: Mapping[str, object]) -> None:
  """Checks that values are equal on all processes, in one exchange.

  Args:
    step: the last step, for the error.
    facts: the values by name.

  Raises:
    UserError: names the processes that differ from process 0, and the value; raised on all processes.
  """
  if not is_on():
    return
  digests = np.array(
    [xxhash.xxh32_intdigest(repr(value).encode()) for value in facts.values()], np.uint32
  )
  table = np.asarray(multihost_utils.process_allgather(digests))
  for name, column in zip(facts, table.T, strict=True):
    others = np.flatnonzero(column != column[0])
    if others.size:
      named = ", ".join(map(str, others[:8]))
      raise errors.UserError(
        f"After step {step} process {named} differs from process 0 in: {name}. On process {jax.process_index()} it is"
        f" {repr(facts[name])[:300]}. All were stopped; start them from the same files, with the same command."
      )


def each(call: Callable[[], T], what: str) -> T:
  """Calls `call` on every process; an error of one of them is raised on all, so that none waits for it.

  Args:
    call: what may fail on some hosts only, such as reading files.
    what: names it in the error on the other processes.

  Raises:
    UserError: `call` failed on another process, which is named.
  """
  if not is_on():
    return call()
  error: Exception | None = None
  result: list[T] = []
  try:
    result.append(call())
  except Exception as e:
    error = e
  said = texts("" if error is None else f"{type(error).__name__}: {error}")
  if error is not None:
    raise error
  if failed := [f"process {i}: {text}" for i, text in enumerate(said) if text]:
    raise errors.UserError(f"Another process could not go on ({what}); {'; '.join(failed[:4])}")
  return result[0]


def hush() -> None:
  """From now on only process 0 prints to standard output, and only what Python prints: libraries' lines go to stderr.

  Gloo writes to standard output whom it is connected to, in between the answers of a command.
  """
  if not is_on():
    return
  sys.stdout.flush()
  answers = os.dup(1) if is_first() else os.open(os.devnull, os.O_WRONLY)
  os.dup2(2, 1)
  old = sys.stdout
  sys.stdout = open(  # noqa: SIM115
    answers, "w", encoding=old.encoding, errors=old.errors, buffering=1 if old.isatty() else -1
  )


def blobs(data: bytes) -> list[bytes]:
  """Returns the bytes of all processes, in their order; all must call it."""
  if not is_on():
    return [data]
  array = np.frombuffer(data, np.uint8)
  lengths = np.asarray(multihost_utils.process_allgather(np.int32(array.size))).reshape(-1)
  padded = np.zeros(max(1, lengths.max()), np.uint8)
  padded[: array.size] = array
  rows = np.asarray(multihost_utils.process_allgather(padded))
  return [row[:n].tobytes() for row, n in zip(rows, lengths, strict=True)]


def texts(text: str) -> list[str]:
  """Returns the texts of all processes, in their order; all must call it."""
  return [data.decode() for data in blobs(text.encode())]


def smallest(value: float) -> float:
  """Returns the smallest value of all processes, as a float32; all must call it."""
  if not is_on():
    return value
  return float(np.min(multihost_utils.process_allgather(np.float32(value))))


def gathered(ids: np.ndarray | None) -> np.ndarray | None:
  """Returns the ids of a batch from all processes, in the order of the batch; all must call it."""
  if ids is None or not is_on():
    return ids
  halves = np.stack([ids >> 32, ids & 0xFFFFFFFF], axis=1).astype(
    np.uint32
  )  # int64 is none of JAX's
  high, low = np.asarray(multihost_utils.process_allgather(halves, tiled=True)).astype(np.int64).T
  return (high << 32) | low


def leave(code: int) -> None:
  """Ends this process; after an error without waiting for the others, which may wait for it for ever.

  Returns if there is only one process.
  """
  if not is_on():
    return
  if code in (exit_codes.DONE, exit_codes.STOPPED):  # all of them end so
    jax.distributed.shutdown()
    return
  os._exit(code)
