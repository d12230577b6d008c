"""Times every form of attention, forward and with its backward pass, at the lengths of 240 px images.

python tools/bench/time_attention.py --batch_size 8 --dtype float32
"""

# ruff: noqa: E402  (memory is kept only by what is imported later)
import argparse
import functools
import pathlib
import statistics
from typing import Any

from flexivit_jax import cli
from flexivit_jax.devices import allocator

allocator.keep_memory()

import jax
import jax.numpy as jnp

from flexivit_jax.devices import timing
from flexivit_jax.evaluators import results
from flexivit_jax.experiment import loaders
from flexivit_jax.models import attention


def loss(form: str, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
  """Something whose gradient needs every output."""
  return (attention.FORMS[form](q, k, v).astype(jnp.float32) ** 2).sum()


def programs(form: str, arrays: list[jax.Array]) -> dict[str, Any]:
  """The compiled forward pass and gradient, ready to be called; none where the device lacks the form."""
  made = {}
  for name, fn in {
    "forward": attention.FORMS[form],
    "both": jax.grad(functools.partial(loss, form), (0, 1, 2)),
  }.items():
    try:
      made[f"{form} {name}"] = functools.partial(jax.jit(fn).lower(*arrays).compile(), *arrays)
    except (RuntimeError, ValueError, NotImplementedError) as e:
      print(f"  {form} {name}: {str(e).splitlines()[0]}")
  return made


def main() -> None:
  """Parses the command line."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
  parser.add_argument("--lengths", default="26,37,65,101,145,226,257,401,577,901")
  parser.add_argument("--batch_size", type=int, default=8)
  parser.add_argument("--heads", type=int, default=6)
  parser.add_argument("--dtype", default=loaders.default_dtype())
  parser.add_argument("--forms", default=",".join(attention.FORMS))
  parser.add_argument("--rounds", type=int, default=5)
  parser.add_argument(
    "--csv", type=pathlib.Path, help="a file to add the numbers to: results/attention_cpu.csv"
  )
  args = parser.parse_args()
  forms = args.forms.split(",")
  print(
    f"{jax.devices()[0].device_kind}, {args.batch_size} x n x {args.heads} x 64, {args.dtype}; ms: forward, both"
  )
  for n in map(int, args.lengths.split(",")):
    shape = (args.batch_size, n, args.heads, 64)
    arrays = [jax.random.normal(jax.random.key(i), shape, args.dtype) for i in range(3)]
    runs = {name: run for form in forms for name, run in programs(form, arrays).items()}
    times = {
      name: 1e3 * statistics.median(t) for name, t in timing.alternate(runs, args.rounds).items()
    }
    cells = [
      f"{form} {times[f'{form} forward']:.2f}, {times.get(f'{form} both', float('nan')):.2f}"
      for form in forms
      if f"{form} forward" in times
    ]
    print(f"n={n}  " + "  ".join(cells), flush=True)
    if args.csv:
      named = {
        name.removesuffix(" forward").replace("both", "with backward"): ms
        for name, ms in times.items()
      }
      results.append_csv(args.csv, [{"n": n, **{name: f"{ms:.2f}" for name, ms in named.items()}}])


if __name__ == "__main__":
  cli.tool(main)
