"""`flexivit plan`: prints what a config will cost; see `experiment.costs`."""

import argparse
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from flexivit_jax import errors
from flexivit_jax.commands import options
from flexivit_jax.tables import aligned

HELP = "what a config will cost; needs no data and no device"


def add_arguments(p: argparse.ArgumentParser) -> None:
  """The config, the share of the peak, the form of the answer."""
  p.add_argument("config", metavar="CONFIG[:ARG]", help="e.g. configs/i1k_distill.py:variant=B")
  p.add_argument(
    "--utilisation", type=float, default=0.4, help="share of a machine's peak (default 0.4)"
  )
  p.add_argument(
    "--machine",
    metavar="NAME",
    help="only the setting with which it fits this machine, e.g. v3-32, or all",
  )
  p.add_argument("--csv", metavar="FILE", help="with --machine: a file to add the rows to")
  p.add_argument("--json", action="store_true", help="everything, to be read by a program")
  options.add_overrides(p, "--config.input.batch_size=512")


def run(args: argparse.Namespace) -> None:
  """Prints the plan of args.config."""
  from flexivit_jax import config
  from flexivit_jax.experiment import costs

  if not 0 < args.utilisation <= 1:
    raise errors.UserError(f"--utilisation={args.utilisation}; expected a fraction, as 0.4.")
  if args.csv and not args.machine:
    raise errors.UserError("--csv takes the rows of --machine; give --machine NAME, or all.")
  settings = config.load(args.config, args.overrides)
  if args.machine:
    _fits(args, settings)
    return
  meshes = costs.meshes_of(settings)
  if args.json:
    plan = costs.plan(settings, utilisation=args.utilisation, meshes=meshes)
    print(json.dumps(plan, indent=1))
    return
  plan = costs.costs(settings, utilisation=args.utilisation, meshes=meshes)
  print("\n".join(text(plan)), flush=True)
  print()
  # Lowering for several devices takes longer than all that is printed above.
  for n, line in costs.lowered(settings, costs.several(meshes)).items():
    print(f"{n:>8} devices: {line}")


def _fits(args: argparse.Namespace, settings: Mapping[str, Any]) -> None:
  """Prints with which setting the config fits each machine, or writes it."""
  from flexivit_jax.evaluators import results
  from flexivit_jax.experiment import fitting, machines

  names = list(machines.MACHINES) if args.machine == "all" else [args.machine]
  rows = list(fitting.rows(settings, names, utilisation=args.utilisation))
  if args.csv:
    name = pathlib.Path(args.config.partition(":")[0]).stem
    config = f"{name} {args.config.partition(':')[2]}".strip().replace("variant=", "")
    results.append_csv(pathlib.Path(args.csv), [{"config": config, **row} for row in rows])
  if args.json:
    print(json.dumps(rows, indent=1))
    return
  cells = [[k for k in rows[0] if k != "setting"]]
  cells += [[v or "-" for k, v in row.items() if k != "setting"] for row in rows]
  print("\n".join(aligned(cells, "<")))
  print(
    "\naccumulate: microbatches at the size of the most tokens; accumulate='auto' finds that number at each size. GiB:"
    " estimated\nfor each device, of nine tenths of its memory. extra FLOPs: what remat, and attention that"
    " stores no scores, compute again, and the padding of attention's kernel on TPUs. hours: of"
    f" training at {args.utilisation:.0%} of the peak."
  )


def text(plan: Mapping[str, Any]) -> list[str]:
  """Returns the lines that tell a reader what `costs.costs` computed."""
  lines = [
    f"{plan['name']}: {plan['parameters']:,} parameters; {plan['steps']:,} steps of {plan['batch_size']}"
    f" ({plan['epochs']:.1f} epochs)",
    "",
  ]
  cells = [["size", "tokens", "GMACs", "TFLOPs/step", "of steps", "of FLOPs"]]
  for s in plan["sizes"]:
    numbers = [f"{s['gmacs']:.2f}", f"{s['step_flops'] / 1e12:.4g}"]
    shares = [f"{s['share_of_steps']:.1%}", f"{s['share_of_flops']:.1%}"]
    cells.append([s["size"], str(s["tokens"]), *numbers, *shares])
  lines += aligned(cells, gap=" ", least=(16, 7, 8, 12, 9, 9))
  lines += [
    "",
    f"{plan['training_flops']:.3g} FLOPs to train, {plan['evaluation_flops']:.3g} to evaluate",
  ]
  if plan["tower_cache"]:
    lines.append(
      "The locked image tower's forward pass is counted in each step, also where tower_cache saves it."
    )
  for name, hours in plan["hours"].items():
    lines.append(
      f"{name:>9}: {hours['training']:.3g} h to train, {hours['evaluation']:.3g} h to evaluate,"
      f" at {plan['utilisation']:.0%} of its peak"
    )
  lines += ["", "GiB a device at the costliest size (activations are an estimate):"]
  for n, memory in plan["memory"].items():
    parts = ", ".join(f"{k} {v / 2**30:.3g}" for k, v in memory.items())
    lines.append(f"{n:>8} devices: {sum(memory.values()) / 2**30:.3g} = {parts}")
  if plan["accumulate"] == "auto":
    lines.append(
      "With accumulate='auto' a run takes microbatches where this is more than there is: --machine all says how many."
    )
  divided = {n: found for n, found in plan["divided"].items() if found["pieces"].keys() != {"1"}}
  if divided:
    lines += ["", "MiB of parameters a device, and how they are divided:"]
  for n, found in divided.items():
    shares = [
      f"{size / 2**20:.3g} in {pieces} pieces" if pieces != "1" else f"{size / 2**20:.3g} copied"
      for pieces, size in found["pieces"].items()
    ]
    two = f" ({found['two_axes']} arrays along two axes)" if found["two_axes"] else ""
    lines.append(f"{n:>8} devices: {found['each'] / 2**20:.3g} = {', '.join(shares)}{two}")
  lines += ["", "MiB that each device sends to others in a step:"]
  lines += [f"{n:>8} devices: {sent / 2**20:.4g}" for n, sent in plan["sent"].items()]
  return lines
