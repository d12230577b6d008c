"""Times training steps of a FlexiViT at several sizes, with CPU time split into user and system time.

python tools/bench/time_steps.py --width 128 --depth 6 --image_size 48 --batch_size 128 --seqhw 4,8 --keep_memory
"""

import argparse
import functools
import resource
import statistics
import time
from typing import Any

from flexivit_jax import cli
from flexivit_jax.devices import allocator


def build(args: argparse.Namespace) -> tuple[Any, Any, dict]:
  """Returns a random state, a random batch and the compiled step of each size."""
  import jax
  import jax.numpy as jnp
  import numpy as np

  from flexivit_jax.devices import compilation
  from flexivit_jax.models import FlexiViT
  from flexivit_jax.objectives import OBJECTIVES
  from flexivit_jax.training import optim, steps

  model = FlexiViT(
    num_classes=10, width=args.width, depth=args.depth, mlp_dim=4 * args.width, num_heads=args.heads,
    patch_size=(8, 8), posemb_size=(8, 8),
  )  # fmt: skip
  params = steps.init_params(model, {"image": (args.image_size, args.image_size, 3)}, seed=0)
  tx = optim.make(params, total_steps=1000, lr=1e-3, wd=1e-4, clip=1.0).tx
  state = jax.jit(lambda: steps.TrainState(jnp.int32(0), params, tx.init(params)))()
  rng, n = np.random.default_rng(0), args.batch_size
  image = rng.standard_normal((n, args.image_size, args.image_size, 3), np.float32)
  batch = {"image": image, "labels": np.eye(10, dtype=np.float32)[rng.integers(0, 10, n)]}
  objective = OBJECTIVES["supervised"]()
  fn = functools.partial(steps.step, model=model, objective=objective, tx=tx, seed=0)
  sizes = [{"seqhw": int(s)} for s in args.seqhw.split(",")]
  return state, batch, compilation.compile_each(fn, (state, batch), sizes, donate=(0,))


def measure(program: Any, state: Any, batch: Any, seconds: float) -> tuple[Any, str]:
  """Runs steps for some seconds; returns the state and a line of figures."""
  import jax

  state, _ = jax.block_until_ready(program.run(state, batch))
  times: list[float] = []
  before = resource.getrusage(resource.RUSAGE_SELF)
  while sum(times) < seconds:
    begin = time.perf_counter()
    state, _ = jax.block_until_ready(program.run(state, batch))
    times.append(time.perf_counter() - begin)
  used = resource.getrusage(resource.RUSAGE_SELF)
  user = (used.ru_utime - before.ru_utime) / len(times)
  system = (used.ru_stime - before.ru_stime) / len(times)
  wall = statistics.median(times)
  return state, f"{user * 1e3:8.0f} user ms {system * 1e3:6.0f} system ms {wall * 1e3:8.1f} wall ms"


def main() -> None:
  """Prints a line for each size."""
  parser = argparse.ArgumentParser(description=__doc__)
  for name, default in dict(width=128, depth=6, heads=4, image_size=48, batch_size=128).items():
    parser.add_argument(f"--{name}", type=int, default=default)
  parser.add_argument("--seqhw", default="4,8")
  parser.add_argument("--seconds", type=float, default=4.0)
  parser.add_argument(
    "--keep_memory", action="store_true", help="with the settings of allocator.py"
  )
  args = parser.parse_args()
  if args.keep_memory:
    allocator.keep_memory()
  state, batch, programs = build(args)
  for (_, program), seqhw in zip(programs.items(), args.seqhw.split(","), strict=True):
    state, line = measure(program, state, batch, args.seconds)
    print(f"seqhw={seqhw:>3} {line} {program.seconds:6.1f} s to compile")


if __name__ == "__main__":
  cli.tool(main)
