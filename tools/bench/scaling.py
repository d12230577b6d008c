"""What the i1k recipes send and hold on many devices, and the scaling that this allows: python tools/bench/scaling.py

From shapes on meshes that do not exist; nothing is compiled or run. How much is sent is what `communication.expected`
says, which a test compares with compiled programs of eight devices. Assumed:

- TPU v5e: 197 TFLOP/s in bfloat16, 400 GB/s of links a chip in both directions together (Google's page "TPU v5e"), so
  200 GB/s outwards; collectives go around rings that fill all links.
- Computing reaches 40 % of the peak; gradients and parameters are sent as float32, as they are kept.
- "none hidden": nothing is sent while something is computed. "all hidden": all of it, as far as it takes less time.
"""

import argparse
from typing import Any

from flexivit_jax import cli, config, experiment
from flexivit_jax.devices import collectives, sharding
from flexivit_jax.experiment import costs
from flexivit_jax.training import patch_schedule

PEAK, LINKS, REACHED = 197e12, 200e9, 0.4


def row(exp: experiment.Experiment, state: Any, devices: int, fsdp: int) -> str:
  """A line of the table."""
  mesh = sharding.abstract_mesh(devices, fsdp=fsdp)
  held = collectives.state_bytes(state, mesh)
  sent = collectives.expected(state.params, mesh).on_the_wire(*sharding.lengths(mesh))
  step = patch_schedule.mean_cost(exp.flexi, exp.step_flops)
  computing, sending = step / (devices * PEAK * REACHED), sent / LINKS
  none, hidden = computing / (computing + sending), computing / max(computing, sending)
  return (
    f"| {devices // fsdp} x {fsdp} | {held / 2**20:.1f} | {sent / 2**20:.0f} | {computing * 1e3:.1f} |"
    f" {sending * 1e3:.1f} | {none:.0%} | {hidden:.0%} |"
  )


def main() -> None:
  """Prints a table in Markdown for each variant."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--config", default="configs/i1k_sup.py")
  parser.add_argument("--variants", default="S,B,L")
  parser.add_argument("--devices", default="8,32,256")
  args = parser.parse_args()
  for variant in args.variants.split(","):
    settings = config.load(f"{args.config}:variant={variant}", [])
    exp = experiment.from_config(costs.on_accelerator(settings), opening=costs.PLANNED)
    state = costs.state_of(exp)
    print(f"\n{variant}, batch {exp.batch_size}, {args.config}:\n")
    print("| data x fsdp | state, MiB a device | sent, MiB a device and step | computing, ms | sending, ms | "
          "efficiency, none hidden | all hidden |\n|---|---|---|---|---|---|---|")  # fmt: skip
    for devices in map(int, args.devices.split(",")):
      for fsdp in (1, 8, devices) if devices > 8 else (1, 8):
        print(row(exp, state, devices, fsdp))


if __name__ == "__main__":
  cli.tool(main)
