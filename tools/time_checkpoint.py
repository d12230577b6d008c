"""What the checksums of a checkpoint cost: seconds until a save returns, until it is done, and of a restore.

python tools/time_checkpoint.py --mib 243
python tools/time_checkpoint.py --mib 3433 --rounds 2
"""

import argparse
import pathlib
import statistics
import tempfile
import time

import jax
import jax.numpy as jnp

from flexivit_jax import manifest
from flexivit_jax.checkpoint import Checkpoints


def main() -> None:
  """Prints medians, with checksums and without, in turns."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--mib", type=int, default=243, help="of parameters and optimizer state")
  parser.add_argument("--rounds", type=int, default=5)
  args = parser.parse_args()
  leaves = 48
  size = args.mib * 2**20 // 4 // leaves
  state = {f"a{i}": jax.random.normal(jax.random.key(i), (size,)) for i in range(leaves)}
  jax.block_until_ready(state)
  params = {"small": jnp.zeros(3)}
  arrays, files = manifest.array_sums, manifest.file_sums
  found: dict[str, list[tuple[float, ...]]] = {"with": [], "without": []}
  begin = time.perf_counter()
  arrays(state)
  alone = time.perf_counter() - begin
  for _ in range(args.rounds):
    for name, times in found.items():
      setattr(manifest, "array_sums", arrays if name == "with" else lambda _: {})  # noqa: B010
      setattr(manifest, "file_sums", files if name == "with" else lambda *_, **__: {})  # noqa: B010
      with tempfile.TemporaryDirectory() as folder:
        checkpoints = Checkpoints(pathlib.Path(folder) / "c", keep=1)
        begin, cpu = time.perf_counter(), time.process_time()
        checkpoints.save(1, params, state, {})
        blocked = time.perf_counter() - begin
        checkpoints.wait()
        times.append((blocked, time.perf_counter() - begin, time.process_time() - cpu))
        checkpoints.close()
  print(f"{args.mib} MiB in {leaves} arrays; CRC-32 of the arrays alone {alone:.2f} s")
  for name, times in found.items():
    blocked, whole, cpu = (statistics.median(t) for t in zip(*times, strict=True))
    print(f"{name} checksums: {blocked:.3f} s blocked, {whole:.2f} s in all, {cpu:.2f} s of CPU")


if __name__ == "__main__":
  main()
