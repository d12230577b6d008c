"""Keeps the C library's memory between steps, instead of giving it back and faulting it in again."""

import ctypes
import importlib.util
import os
import sys
from typing import Any

# From <malloc.h>.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8
_INT_MAX = 2**31 - 1
_FEW_CORES = 4


def keep_memory() -> bool:
  """Tells glibc to keep freed memory, where JAX will run on a few CPU cores; call it before JAX is imported.

  XLA's CPU backend allocates all temporary memory of a program at each call and frees it afterwards. glibc returns
  blocks this large to the system at once, so every step pays for zeroing hundreds of MiB again: 35-40 % of the CPU
  time of small training steps was system time, 1 % with this (docs/log.md, 2026-11-23).

  Threads then share one heap and its lock. On two cores that costs nothing; on a host of 16, with a GPU, compiling took
  7.5 times as long (docs/log.md, 2026-11-26). So it is for few cores, and not for accelerators, whose memory is not the
  C library's.

  Returns:
    Whether glibc has the settings.
  """
  if not sys.platform.startswith("linux") or _cores() > _FEW_CORES or _accelerated():
    return False
  mallopt = _mallopt()
  if mallopt is None:
    return False
  # One arena, grown and never trimmed: other arenas cannot hold large blocks.
  settings = (
    (_M_ARENA_MAX, 1),
    (_M_MMAP_MAX, 0),
    (_M_TRIM_THRESHOLD, _INT_MAX),
    (_M_TOP_PAD, 2**26),
  )
  return all([mallopt(parameter, value) == 1 for parameter, value in settings])


def _mallopt() -> Any:
  """The function of glibc; None in another C library."""
  return getattr(ctypes.CDLL(None), "mallopt", None)


def _cores() -> int:
  return len(os.sched_getaffinity(0))


def _accelerated() -> bool:
  """Whether JAX will look for an accelerator: the package of one is installed and JAX not told to leave it alone."""
  if platforms := os.environ.get("JAX_PLATFORMS"):
    return platforms != "cpu"
  return any(importlib.util.find_spec(name) for name in ("jax_plugins", "libtpu"))
