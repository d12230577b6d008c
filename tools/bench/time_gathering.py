"""What it costs that process 0 writes for all: seconds of a save of two processes into a common folder, and gathered.

python tools/bench/time_gathering.py --mib 243
python tools/bench/time_gathering.py --mib 3 --rounds 9

Each process has four CPU devices; the arrays are divided over all eight. Both processes are on this machine.
"""

import argparse
import os
import pathlib
import socket
import statistics
import subprocess
import sys
import tempfile
import time

from flexivit_jax import cli
from flexivit_jax.evaluators import results

LEAVES = 48
FORMS = ("a common folder", "gathered")


def main() -> None:
  """Starts two processes; the first prints medians, in turns."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--mib", type=int, default=243, help="of parameters and optimizer state")
  parser.add_argument("--rounds", type=int, default=5)
  parser.add_argument(
    "--csv", type=pathlib.Path, help="a file to add the numbers to: results/gathering.csv"
  )
  parser.add_argument("--process", type=int, help=argparse.SUPPRESS)
  parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
  parser.add_argument("--folder", type=pathlib.Path, help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.process is not None:
    measure(args)
    return
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
  env = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
  with tempfile.TemporaryDirectory() as folder:
    line = [sys.executable, *sys.argv, f"--port={port}", f"--folder={folder}"]
    both = [subprocess.Popen([*line, f"--process={i}"], env=env) for i in range(2)]
    if any([process.wait() for process in both]):
      sys.exit(1)


def measure(args: argparse.Namespace) -> None:
  """Saves in both forms, in turns; process 0 prints."""
  import jax
  import jax.numpy as jnp
  from jax.sharding import Mesh, NamedSharding, PartitionSpec

  from flexivit_jax.running import distributed
  from flexivit_jax.running.checkpoint import Checkpoints
  from flexivit_jax.running.gathered import Gathered

  distributed.start(f"127.0.0.1:{args.port}", 2, args.process)
  distributed.hush()
  divided = NamedSharding(Mesh(jax.devices(), ("all",)), PartitionSpec("all"))
  size = args.mib * 2**20 // 4 // LEAVES // 8 * 8
  make = jax.jit(lambda key: jax.random.normal(key, (size,)), out_shardings=divided)
  state = {f"a{i}": make(jax.random.key(i)) for i in range(LEAVES)}
  params = {"small": jax.jit(lambda: jnp.zeros(8), out_shardings=divided)()}
  times: dict[str, list[tuple[float, float]]] = {form: [] for form in FORMS}
  for number in range(args.rounds + 1):
    for form in FORMS:
      folder = args.folder / f"{form} {number}"
      distributed.on_first(folder.mkdir, str(folder))
      checkpoints = (Checkpoints if form == FORMS[0] else Gathered)(folder, keep=1)
      distributed.texts("")  # all begin at once
      begin = time.perf_counter()
      checkpoints.save(1, params, state, {})
      blocked = time.perf_counter() - begin
      checkpoints.wait()
      distributed.texts("")
      if number:  # the first one compiles
        times[form].append((blocked, time.perf_counter() - begin))
      checkpoints.close()
  if args.process == 0:
    for form, found in times.items():
      blocked, whole = (statistics.median(t) for t in zip(*found, strict=True))
      print(f"{args.mib} MiB, {form}: {blocked:.3f} s blocked, {whole:.2f} s in all", flush=True)
      if args.csv:
        row = {"MiB": args.mib, "save": form, "blocks the run": f"{blocked:.3f}"}
        results.append_csv(args.csv, [row | {"until all is written": f"{whole:.2f}"}])
  distributed.leave(0)


if __name__ == "__main__":
  cli.tool(main)
