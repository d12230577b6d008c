"""`flexivit train`: see `flexivit_jax.train`."""

import argparse

from flexivit_jax.commands import options

HELP = "train from a config file; the same command resumes"


def add_arguments(p: argparse.ArgumentParser) -> None:
  """The config, the run's folder, how to resume, which process of several this is."""
  options.add_config(p)
  p.add_argument(
    "--workdir",
    required=True,
    type=options.path,
    help="the run's folder, or s3://BUCKET/RUN, gs://BUCKET/RUN; made, or resumed from",
  )
  p.add_argument(
    "--resume",
    default="latest",
    help="latest (the default): the newest checkpoint, which must be whole; latest-valid: the newest whole one",
  )
  p.add_argument(
    "--allow_config_change",
    action="store_true",
    help="resume with another model, data or optimizer than the run started with",
  )
  options.add_processes(p)


def run(args: argparse.Namespace) -> None:
  """Trains, or resumes, args.config in args.workdir."""
  from flexivit_jax import config, train
  from flexivit_jax.devices import compilation
  from flexivit_jax.running.ledger import process_begun

  options.join(args, saves=True)
  compilation.keep_programs()
  train.train(
    config.load(args.config, args.overrides),
    args.workdir,
    resume=args.resume,
    allow_config_change=args.allow_config_change,
    begun=process_begun(),
  )
