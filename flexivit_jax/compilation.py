"""Ahead-of-time compilation: one program for each patch size, all made before step one."""

import functools
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax

from flexivit_jax import errors


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
