"""How long calls take on a device, in turns; how fast its matrix products are."""

import functools
import time
from collections.abc import Callable, Mapping
from typing import TypeVar

import jax

K = TypeVar("K")


def alternate(runs: Mapping[K, Callable[[], object]], rounds: int) -> dict[K, list[float]]:
  """Calls each function in turn, after two calls to warm up, and returns the seconds of each, `rounds` times.

  Short ones are called often enough for a turn of 50 ms, and one call's share of it is counted.
  """
  calls = {}
  for name, once in runs.items():
    jax.block_until_ready(once())
    calls[name] = max(1, round(0.05 / max(_seconds(once, 1), 1e-6)))
  times: dict[K, list[float]] = {name: [] for name in runs}
  for _ in range(rounds):
    for name, once in runs.items():
      times[name].append(_seconds(once, calls[name]))
  return times


def _seconds(once: Callable[[], object], calls: int) -> float:
  begin = time.perf_counter()
  out = None
  for _ in range(calls):
    out = once()
  jax.block_until_ready(out)
  return (time.perf_counter() - begin) / calls


def matmul_peak(dtype: str) -> float:
  """FLOP/s of a large square matrix product in this dtype: the fastest of five rounds."""
  n = 2048 if jax.default_backend() == "cpu" else 8192
  a, b = (jax.random.normal(jax.random.key(i), (n, n), dtype) for i in range(2))
  product = jax.jit(lambda a, b: a @ b).lower(a, b).compile()
  return 2 * n**3 / min(alternate({"": functools.partial(product, a, b)}, 5)[""])
