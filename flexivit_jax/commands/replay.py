"""`flexivit replay RUN/bad_step.json`: looks into a step that was not finite; see `analyses.bad_step`."""

import argparse

from flexivit_jax.commands import options

HELP = "look into a step whose loss or gradients were not finite"


def add_arguments(p: argparse.ArgumentParser) -> None:
  """The dump of the step."""
  p.add_argument("dump", type=options.path, help="RUN/bad_step.json")
  p.add_argument(
    "--config",
    metavar="CONFIG[:ARG]",
    help="the run's, where it has a model or objective of its own",
  )


def run(args: argparse.Namespace) -> None:
  """Prints what is found."""
  from flexivit_jax import config
  from flexivit_jax.analyses import bad_step

  if args.config is not None:
    config.load(args.config)  # its file adds to the tables of models, objectives and operations
  print("\n".join(bad_step.look(args.dump)))
