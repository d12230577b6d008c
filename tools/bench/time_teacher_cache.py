"""CPU time of training steps with a teacher that is asked, and with what it said read from a cache.

python tools/bench/time_teacher_cache.py --config configs/miniature.py:teacher=runs/miniature/fixed6 --steps 40
"""

import argparse
import contextlib
import pathlib
import tempfile
import time

import jax

from flexivit_jax import cli, config, errors, experiment
from flexivit_jax.devices import sharding
from flexivit_jax.experiment import preparation
from flexivit_jax.training import patch_schedule


def main() -> None:
  """Parses the command line; prints CPU ms a step of both, without compilation and without the data's threads."""
  parser = argparse.ArgumentParser()
  parser.add_argument("--config", required=True)
  parser.add_argument("--steps", type=int, default=40)
  args, rest = parser.parse_known_args()
  settings = config.load(args.config, [a.removeprefix("--config.") for a in rest])
  with tempfile.TemporaryDirectory() as folder:
    settings |= {"teacher_cache": str(pathlib.Path(folder) / "cache"), "total_steps": args.steps}
    settings |= {"total_epochs": None, "evals": None}
    settings["input"]["threads"] = 0
    for name in ("live, and written", "read"):
      print(f"{name}: {1e3 * seconds(settings):.0f} CPU ms a step")


def seconds(settings: dict) -> float:
  """Returns the CPU seconds a step, over all steps."""
  exp = experiment.from_config({"name": "timed", **settings})
  if exp.objective.teaching is None:
    raise errors.UserError("The config has no teachers.")
  mesh = sharding.make_mesh()
  with contextlib.ExitStack() as stack:
    state, targets = (
      preparation.first_state(exp, mesh),
      preparation.teacher_logits(exp, 0, mesh, stack.enter_context),
    )
    programs = preparation.programs(exp, state, targets, mesh)
    constants = preparation.constants(exp, mesh)
    batches = stack.enter_context(exp.batches(0))
    spent = 0.0
    for step in range(exp.total_steps):
      batch = next(batches)
      size = patch_schedule.draw(exp.flexi, seed=exp.seed, step=step)
      begin = time.process_time()
      on_device = sharding.put_batch({k: batch[k] for k in exp.objective.inputs}, mesh)
      on_device["targets"] = targets(step, batch, state.step)
      state, _ = jax.block_until_ready(programs(size, state, on_device, constants))
      spent += time.process_time() - begin
  return spent / exp.total_steps


if __name__ == "__main__":
  cli.tool(main)
