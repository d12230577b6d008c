"""Keeps the C library's memory between steps, instead of giving it back and faulting it in again."""

import ctypes
import sys

# From <malloc.h>.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8
_INT_MAX = 2**31 - 1


def keep_memory() -> bool:
  """Tells glibc to keep freed memory; call it before JAX is imported. Does nothing without glibc.

  XLA's CPU backend allocates all temporary memory of a program at each call and frees it afterwards. glibc returns
  blocks this large to the system at once, so every step pays for zeroing hundreds of MiB again: 35-40 % of the CPU
  time of small training steps was system time, 1 % with this (docs/log.md, 2026-11-23).

  Returns:
    Whether glibc took the settings.
  """
  if not sys.platform.startswith("linux"):
    return False
  mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
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
