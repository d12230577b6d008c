"""Ahead-of-time compilation: one program for each patch size, all made before step one, and kept on disk."""

import contextlib
import functools
import hashlib
import logging
import os
import pathlib
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent import futures
from typing import Any, NamedTuple

import jax

from flexivit_jax import errors, files, heartbeat, storage
from flexivit_jax.devices import bucket_programs
from flexivit_jax.sizes import SizeArgs, SizeKey, size_key, size_name
from flexivit_jax.trees import Json, Tree

_LOG = logging.getLogger(__name__)
_CACHE_BYTES = 4 * 2**30
# On GPUs XLA may else take operations whose sums have no fixed order, cuDNN's backward pass of attention among them
# (openxla/xla, pull request 14125): a resumed run would not end with the same bits. XLA_FLAGS can say otherwise.
DETERMINISTIC = "xla_gpu_exclude_nondeterministic_ops"
# XLA's CPU compiler drops the barriers that `jax.checkpoint` puts around what is computed again, finds it twice, and
# stores it after all: `remat` without a loop saved nothing. Without this pass it keeps them (docs/performance.md).
DISABLED, BARRIERS = "xla_disable_hlo_passes", "cse_barrier_expander"


class OutOfMemory(errors.UserError):
  """A program does not fit into the device's memory."""


class Program(NamedTuple):
  """A compiled function for one size, and the bytes that it takes on each device while it runs."""

  run: Callable[..., Tree]
  seconds: float
  temp_bytes: int
  arguments_bytes: int = 0  # its arguments and results, less those that share memory
  trace_seconds: float = 0.0  # of `seconds`, until the compiler had it

  @property
  def bytes(self) -> int:
    """Of all that it needs."""
    return self.temp_bytes + self.arguments_bytes


def compile_each(
  fn: Callable[..., Tree],
  args: tuple | Callable[[SizeArgs], tuple],
  sizes: Iterable[SizeArgs],
  *,
  donate: tuple[int, ...] = (),
  out_shardings: Tree = None,
  report: Callable[[SizeArgs, Program], None] = lambda size, program: None,
) -> dict[SizeKey, Program]:
  """Compiles `fn(*args, **size)` ahead of time, once for each size.

  Args:
    fn: pure; static arguments are keywords.
    args: example arguments, or their `jax.ShapeDtypeStruct`; or a function that gives those of a size.
    sizes: the static arguments, one dict a program.
    donate: positions of arguments whose memory the result may take.
    out_shardings: where the results live; None: where the compiler puts them.
    report: called for each program in the order of the sizes.

  Raises:
    UserError: if a program does not fit into the device's memory, naming the size.
  """
  with _compiler() as compiler:  # works on one size while the next is traced
    waiting = []
    for size in sizes:
      arguments = args(size) if callable(args) else args
      lowered = _lower(
        functools.partial(fn, **size), arguments, size_name(size), donate, out_shardings
      )
      waiting.append((size, compiler.submit(lowered.compile)))
    programs = {}
    for size, compiled in waiting:
      programs[size_key(size)] = compiled.result()
      report(size, programs[size_key(size)])
  return programs


def compile_one(
  fn: Callable[..., Tree],
  args: tuple,
  name: str,
  *,
  donate: tuple[int, ...] = (),
  out_shardings: Tree = None,
) -> Program:
  """Compiles `fn(*args)`; see `compile_each`. `name` is for the error."""
  lowered = _lower(fn, args, name, donate, out_shardings)
  with _compiler() as compiler:
    return compiler.submit(lowered.compile).result()


@contextlib.contextmanager
def _compiler() -> Iterator[futures.ThreadPoolExecutor]:
  """A thread for XLA, which nothing can interrupt; who waits for it here can be.

  After an error, a signal's among them, nothing that is queued is compiled, and what is in hand is left behind:
  Python would wait for it at exit, so a command that was stopped ends with `signals.leave`.
  """
  compiler = futures.ThreadPoolExecutor(1, thread_name_prefix="compiler")
  try:
    yield compiler
  except BaseException:
    compiler.shutdown(wait=False, cancel_futures=True)
    raise
  compiler.shutdown()


class _Lowered(NamedTuple):
  """What is left to the compiler."""

  lowered: Any
  name: str
  seconds: float

  def compile(self) -> Program:
    begin = time.perf_counter()
    try:
      compiled = self.lowered.compile(**_options())
    except jax.errors.JaxRuntimeError as e:
      if "RESOURCE_EXHAUSTED" not in str(e):
        raise
      message = f"Out of device memory while compiling {self.name}: smaller batch, accumulate='auto' or remat. {e}"
      raise OutOfMemory(message) from e
    heartbeat.beat()
    memory, seconds = compiled.memory_analysis(), self.seconds + time.perf_counter() - begin
    if not memory:
      return Program(compiled, seconds, 0, 0, self.seconds)
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return Program(compiled, seconds, int(memory.temp_size_in_bytes), int(held), self.seconds)


def _lower(
  fn: Callable[..., Tree], args: tuple, name: str, donate: tuple[int, ...], out_shardings: Tree
) -> _Lowered:
  begin = time.perf_counter()
  placed = {} if out_shardings is None else {"out_shardings": out_shardings}
  lowered = jax.jit(fn, donate_argnums=donate, **placed).lower(*args)
  return _Lowered(lowered, name, time.perf_counter() - begin)


def _options() -> Json:
  """Arguments of every compilation."""
  wanted: Json = {"gpu": {DETERMINISTIC: True}, "cpu": {DISABLED: BARRIERS}}
  flags = os.environ.get("XLA_FLAGS", "")
  options = {k: v for k, v in wanted.get(jax.default_backend(), {}).items() if k not in flags}
  return {"compiler_options": options} if options else {}


def fewest_microbatches(
  make: Callable[[int], Program],
  microbatches: Sequence[int],
  room: float,
  name: str,
  guess: float = 1,
) -> tuple[int, Program]:
  """Compiles a function with the smallest number of microbatches that fits into memory.

  Args:
    make: compiles it with this number of microbatches.
    microbatches: candidate numbers, from small to large.
    room: bytes of each device.
    name: of the program, in the error.
    guess: a lower bound, to begin with.

  Returns:
    The number of microbatches and the program.

  Raises:
    OutOfMemory: not even the largest number fits.
  """
  tried = min((n for n in microbatches if n >= guess), default=microbatches[-1])
  while True:
    try:
      program = make(tried)
      if program.bytes <= room:
        return tried, program
      need = f"{program.bytes / 2**30:.3g} GiB"
      # Arguments do not shrink, so this is too low rather than too high.
      wanted = tried * program.temp_bytes / max(room - program.arguments_bytes, 1.0)
    except OutOfMemory as error:
      need, wanted = str(error), 2.0 * tried
    if tried == microbatches[-1]:
      raise OutOfMemory(
        f"{name} needs {need} even in {tried} parts, and there are {room / 2**30:.3g} GiB for it: smaller batch, model"
        " or memory_gib, or model.scan and model.remat."
      )
    tried = min((n for n in microbatches if n > tried and n >= wanted), default=microbatches[-1])


def device_memory() -> float:
  """Bytes that programs may fill on each device: nine tenths of the device's, or of the host's that are free."""
  device = jax.local_devices()[0]
  stats = device.memory_stats() or {}
  if "bytes_limit" in stats:
    return 0.9 * stats["bytes_limit"]
  free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
  return 0.9 * free / jax.local_device_count()


def keep_programs() -> pathlib.Path | None:
  """Keeps compiled programs on disk from now on, so that the next start compiles nothing.

  In JAX's persistent compilation cache, 4 GiB of the last used programs, below `folders.cache_folder()`; a setting of
  JAX's own (JAX_COMPILATION_CACHE_DIR, JAX_ENABLE_COMPILATION_CACHE) is left alone, but that an address in a bucket,
  s3:// or gs://, is read and written by `storage`, and not bounded. Programs are code that a reader of the folder
  runs, so it must be this user's and writable by nobody else; each kind of processor has its own.

  Returns:
    The folder; None where there is none: it is a bucket's or JAX's, or, with a warning, it is not private or cannot be
    made, and programs are not kept.
  """
  settings = jax.config.values
  given = settings["jax_compilation_cache_dir"]
  url = storage.address(given or "")
  if (given and not url) or not settings["jax_enable_compilation_cache"]:
    return None
  try:
    if url:
      directory = bucket_programs.cache_dir(f"{url}/{_processor()}")
      folder = None
    else:
      folder = programs_folder()
      directory = str(folder)
  except (OSError, errors.UserError) as e:
    _LOG.warning("Compiled programs are not kept: %s", e)
    jax.config.update("jax_compilation_cache_dir", None)
    return None
  wanted = {
    "jax_compilation_cache_dir": directory,
    "jax_compilation_cache_max_size": -1 if url else _CACHE_BYTES,
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": 0,
  }
  if url:
    # XLA's own caches of a GPU's kernels need a folder, whose path is part of every program's key (jax 0.10.2): another
    # machine would find nothing.
    wanted["jax_persistent_cache_enable_xla_caches"] = "none"
  for name, value in wanted.items():
    jax.config.update(name, value)
  return folder


def programs_folder() -> pathlib.Path:
  """Makes and returns the folder of compiled programs.

  Raises:
    OSError: it is not private, or cannot be made.
    UserError: no home folder is known.
  """
  folder = files.cache_folder() / "programs" / _processor()
  folder.mkdir(mode=0o700, parents=True, exist_ok=True)
  _check_private(folder)
  _check_private(folder.parent)
  return folder


def _processor() -> str:
  """A name for what this processor can do; programs of another one may stop at an instruction it lacks."""
  lines = pathlib.Path("/proc/cpuinfo")
  flags = (
    next((k for k in lines.read_text().splitlines() if k.startswith(("flags", "Features"))), "")
    if lines.exists()
    else ""
  )
  return hashlib.sha256(flags.encode()).hexdigest()[:12]


def _check_private(folder: pathlib.Path) -> None:
  status = folder.stat()
  if status.st_uid != os.getuid() or stat.S_IMODE(status.st_mode) & (stat.S_IWGRP | stat.S_IWOTH):
    raise PermissionError(
      f"{folder} is another user's, or others may write to it; chmod 700 it, or set FLEXIVIT_CACHE"
    )
