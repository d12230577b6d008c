"""`flexivit inspect`: what a file with weights holds, and what its arrays do not say; see `weights.description`."""

import argparse

from flexivit_jax import errors
from flexivit_jax.commands import options

HELP = "what a file with weights holds"


def add_arguments(p: argparse.ArgumentParser) -> None:
  """The file, or the list of those that are published."""
  p.add_argument("file", nargs="?", type=options.path, help=options.WEIGHTS)
  p.add_argument("--list", action="store_true", help="the published checkpoints by name")
  options.add_loading(p)


def run(args: argparse.Namespace) -> None:
  """Prints what is in args.file, or the published checkpoints."""
  from flexivit_jax.inference import predictor
  from flexivit_jax.weights import description, tasks

  if args.list == (args.file is not None):
    raise errors.UserError("Give a file or a published name to inspect, or --list alone.")
  if args.list:
    print("\n".join(description.listing()))
    return
  loading = options.loading(args)
  model, params, record = tasks.load(args.file, finite=False, **loading)
  said = record.get("pp") or "images" in record
  assumed = None if said else predictor.preparation(model, record)[0]
  print("\n".join(description.describe_whole(model, params, record, assumed)))
