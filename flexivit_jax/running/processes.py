"""What the processes of one run agree on before they wait for each other, and how each ends when one fails."""

import contextlib
import json
import os
import pathlib
import re
import socket
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import NoReturn

import jax

from flexivit_jax import errors
from flexivit_jax.running import distributed, exit_codes, peers, run_folder, signs

# Words in the errors of JAX, Gloo and NCCL about a broken connection, whatever their type.
_CONNECTION = re.compile(
  "gloo|nccl|connection|peer|socket|heartbeat|coordination|UNAVAILABLE", re.IGNORECASE
)


def agree_on_config(settings: Mapping[str, object]) -> None:
  """Compares the configs of all processes; first, because different configs compile to different programs.

  Raises:
    UserError: names the keys that differ, with their values; raised on all processes.
  """
  agree_on(settings, "config")


def agree_on(settings: Mapping[str, object], what: str = "arguments") -> None:
  """As `agree_on_config`, of settings that are called `what`."""
  lines = differences(settings)
  if lines:
    raise errors.UserError(
      f"Not all processes have the {what} of process 0 (its value -> theirs): {'; '.join(lines)}. All were"
      " stopped; start them from the same files, with the same command."
    )


def differences(settings: Mapping[str, object]) -> list[str]:
  """Returns a line for each process whose settings are not those of process 0, at most eight; all must call it."""
  if not distributed.is_on():
    return []
  configs = [json.loads(text) for text in distributed.texts(json.dumps(settings, default=str))]
  lines = {
    f"process {i}: {', '.join(list(differing.values())[:5])}"
    for i, other in enumerate(configs)
    if (differing := run_folder.diff(configs[0], other))
  }
  return sorted(lines)[:8]


def take(workdir: pathlib.Path, stack: contextlib.ExitStack, *, shared: bool = True) -> None:
  """Locks the folder for this run until the stack closes, and checks that all processes see it.

  Args:
    workdir: the folder.
    stack: releases the lock.
    shared: False: only process 0 has the folder.

  Raises:
    UserError: another run holds it; or some processes see a different folder (they are named).
  """
  heartbeats = workdir / peers.FOLDER

  def first() -> int | None:
    stack.enter_context(run_folder.locked(workdir))
    peers.clear(heartbeats)
    return peers.mark(heartbeats) if distributed.is_on() and shared else None

  number = distributed.on_first(first, f"the folder {workdir}")
  if number is None:
    return
  blind = distributed.texts("" if peers.sees(heartbeats, number) else socket.gethostname())
  if named := [f"process {i} on {host}" for i, host in enumerate(blind) if host]:
    raise errors.UserError(
      f"{', '.join(named[:8])} ({len(named)} of {len(blind)}) do not see {workdir} as process 0 has it; the folder of a"
      " run has to be on a file system that all its processes see."
    )


def heartbeats(where: signs.Signs | pathlib.Path) -> peers.Peers | None:
  """Returns the heartbeats of all processes, which report a silent one before the runtime ends this process.

  None for a single process.

  Args:
    where: they are, or the run folder.
  """
  if not distributed.is_on():
    return None
  limit = 0.3 * distributed.heartbeat()
  place = where / peers.FOLDER if isinstance(where, pathlib.Path) else where
  own = peers.Peers(place, jax.process_index(), jax.process_count(), limit)
  own.tick()
  return own


def abandon(
  error: Exception,
  where: signs.Signs | pathlib.Path,
  finish: Callable[[], None] = lambda: None,
) -> NoReturn:
  """Ends one of several processes at once: the others would wait for it, and it for them.

  Records its error for the others. If the error only says that a connection broke, names the process that is gone.

  Args:
    error: why it ends.
    where: see `heartbeats`.
    finish: called before the end.
  """
  place = signs.InFolder(where / peers.FOLDER) if isinstance(where, pathlib.Path) else where
  index = jax.process_index()
  message, code = f"{type(error).__name__}: {error}", exit_codes.HUNG
  if isinstance(error, errors.UserError):
    message, code = str(error), exit_codes.ERROR
  elif isinstance(error, jax.errors.JaxRuntimeError) or _CONNECTION.search(str(error)):
    lost = peers.Peers(place, index, jax.process_count()).blame_lost()
    message = f"{lost}. {message.splitlines()[0]:.300}"
    if word := place.word(index):
      code = word.code
  else:
    traceback.print_exception(error)
  print(f"flexivit: error: process {index}: {message}", file=sys.stderr, flush=True)
  place.leave_word(signs.Word(index, code, message))
  finish()
  if code == exit_codes.ERROR:
    place.wait_until_read()
  os._exit(code)


@contextlib.contextmanager
def ending() -> Iterator[None]:
  """Around what several processes compute without a run folder: where the connection to another one breaks, because
  it has ended, this one says so and ends with `exit_codes.HUNG`, without a traceback.
  """
  try:
    yield
  except Exception as error:
    broken = isinstance(error, jax.errors.JaxRuntimeError) or _CONNECTION.search(str(error))
    if not distributed.is_on() or isinstance(error, errors.UserError) or not broken:
      raise
    print(
      f"flexivit: error: process {jax.process_index()}: another process has ended, and its message says why."
      f" {str(error).splitlines()[0]:.300}",
      file=sys.stderr,
      flush=True,
    )
    os._exit(exit_codes.HUNG)
