"""What the checksums of a checkpoint cost: seconds until a save returns, until it is done, and of the checksums.

python tools/bench/time_checkpoint.py --mib 243
python tools/bench/time_checkpoint.py --mib 3433 --rounds 3
"""

import argparse
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from flexivit_jax import cli
from flexivit_jax.evaluators import results
from flexivit_jax.running import manifest
from flexivit_jax.running.checkpoint import Checkpoints


def main() -> None:
  """Prints medians, with checksums and without, in turns."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--mib", type=int, default=243, help="of parameters and optimizer state")
  parser.add_argument("--rounds", type=int, default=5)
  parser.add_argument(
    "--csv", type=pathlib.Path, help="a file to add the numbers to: results/checkpoint_cost.csv"
  )
  args = parser.parse_args()
  leaves = 48
  size = args.mib * 2**20 // 4 // leaves
  state = {f"a{i}": jax.random.normal(jax.random.key(i), (size,)) for i in range(leaves)}
  jax.block_until_ready(state)
  params = {"small": jnp.zeros(3)}
  spent: list[float] = []

  def timed(checksums: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
      begin = time.thread_time()
      result = checksums(*args, **kwargs)
      spent.append(time.thread_time() - begin)
      return result

    return call

  with_them = {name: timed(getattr(manifest, name)) for name in ("array_sums", "file_sums")}
  without: dict[str, Callable[..., Any]] = {name: lambda *_, **__: {} for name in with_them}
  found: dict[str, list[tuple[float, ...]]] = {"with": [], "without": []}
  for _ in range(args.rounds):
    for name, times in found.items():
      for function, value in (with_them if name == "with" else without).items():
        setattr(manifest, function, value)
      with tempfile.TemporaryDirectory() as folder:
        checkpoints = Checkpoints(pathlib.Path(folder) / "c", keep=1)
        begin, cpu = time.perf_counter(), time.process_time()
        checkpoints.save(1, params, state, {})
        blocked = time.perf_counter() - begin
        checkpoints.wait()
        times.append((blocked, time.perf_counter() - begin, time.process_time() - cpu))
        checkpoints.close()
  for name, times in found.items():
    blocked, whole, cpu = (statistics.median(t) for t in zip(*times, strict=True))
    print(f"{name} checksums: {blocked:.3f} s blocked, {whole:.2f} s in all, {cpu:.2f} s of CPU")
    if args.csv:
      row = {"MiB": args.mib, "checksums": "yes" if name == "with" else "no"}
      row |= {
        "blocks the run": f"{blocked:.3f}",
        "until all is written": f"{whole:.2f}",
        "CPU": f"{cpu:.2f}",
      }
      results.append_csv(args.csv, [row])
  own, without_s = (
    sum(spent) / args.rounds,
    statistics.median(whole for _, whole, _ in found["without"]),
  )
  print(
    f"{args.mib} MiB: the checksums themselves took {own:.2f} s of CPU, {own / without_s:.1%} of a save without"
  )


if __name__ == "__main__":
  cli.tool(main)
