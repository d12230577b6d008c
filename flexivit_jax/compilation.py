"""Ahead-of-time compilation: one program for each patch size, all made before step one, and kept on disk."""

import functools
import hashlib
import logging
import os
import pathlib
import stat
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax

from flexivit_jax import errors, folders

_LOG = logging.getLogger(__name__)
_CACHE_BYTES = 4 * 2**30


class Program(NamedTuple):
  """A compiled function for one size."""

  run: Callable[..., Any]
  seconds: float
  temp_bytes: int


def size_key(size: dict[str, Any]) -> tuple:
  """A hashable, ordered form of static arguments."""
  return tuple(sorted(size.items()))


def size_name(size: dict[str, Any]) -> str:
  """E.g. "seqhw=8", or "grid_hw=4x8"."""
  text = lambda v: "x".join(map(str, v)) if isinstance(v, tuple) else str(v)  # noqa: E731
  return " ".join(f"{k}={text(v)}" for k, v in sorted(size.items())) or "default size"


def compile_each(
  fn: Callable[..., Any],
  args: tuple,
  sizes: Iterable[dict[str, Any]],
  *,
  donate: tuple[int, ...] = (),
  report: Callable[[dict, Program], None] = lambda size, program: None,
) -> dict[tuple, Program]:
  """Compiles `fn(*args, **size)` ahead of time, once for each size.

  Args:
    fn: pure; static arguments are keywords.
    args: example arguments, or their `jax.ShapeDtypeStruct`.
    sizes: the static arguments, one dict a program.
    donate: positions of arguments whose memory the result may take.
    report: called after each compilation.

  Raises:
    UserError: if a program does not fit into the device's memory, naming the size.
  """
  programs = {}
  for size in sizes:
    begin = time.perf_counter()
    lowered = jax.jit(functools.partial(fn, **size), donate_argnums=donate).lower(*args)
    try:
      compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as e:
      if "RESOURCE_EXHAUSTED" not in str(e):
        raise
      message = f"Out of device memory while compiling {size_name(size)}: smaller batch, accumulation or remat. {e}"
      raise errors.UserError(message) from e
    memory = compiled.memory_analysis()
    temp = int(memory.temp_size_in_bytes) if memory else 0
    programs[size_key(size)] = Program(compiled, time.perf_counter() - begin, temp)
    report(size, programs[size_key(size)])
  return programs


def keep_programs() -> pathlib.Path | None:
  """Keeps compiled programs on disk from now on, so that the next start compiles nothing.

  In JAX's persistent compilation cache, 4 GiB of the last used programs, below `folders.cache_folder()`; a setting of
  JAX's own (JAX_COMPILATION_CACHE_DIR, JAX_ENABLE_COMPILATION_CACHE) is left alone. Programs are code that a reader of
  the folder runs, so it must be this user's and writable by nobody else; each kind of processor has its own.

  Returns:
    The folder; None with a warning where it is not private or cannot be made: programs are then not kept.
  """
  settings = jax.config.values
  if settings["jax_compilation_cache_dir"] or not settings["jax_enable_compilation_cache"]:
    return None
  folder = folders.cache_folder() / "programs" / _processor()
  try:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    _check_private(folder)
    _check_private(folder.parent)
  except OSError as e:
    _LOG.warning("Compiled programs are not kept: %s", e)
    return None
  wanted = {
    "jax_compilation_cache_dir": str(folder),
    "jax_compilation_cache_max_size": _CACHE_BYTES,
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": 0,
  }
  for name, value in wanted.items():
    jax.config.update(name, value)
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
  found = folder.stat()
  if found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) & (stat.S_IWGRP | stat.S_IWOTH):
    raise PermissionError(
      f"{folder} is another user's, or others may write to it; chmod 700 it, or set FLEXIVIT_CACHE"
    )
