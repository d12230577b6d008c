"""`flexivit verify PATH`: is everything still what was written? See `weights.verification` and `data.packs`."""

import argparse

from flexivit_jax import errors
from flexivit_jax.commands import options

HELP = "is everything in a run, an export or packed data as it was written?"


def add_arguments(p: argparse.ArgumentParser) -> None:
  """The path."""
  p.add_argument(
    "path", type=options.path, help="a run, a checkpoint, an export, weights, or packed data"
  )


def run(args: argparse.Namespace) -> None:
  """Prints a line for each thing checked; a UserError if anything is damaged, after all were looked at."""
  from flexivit_jax import storage
  from flexivit_jax.data import packs
  from flexivit_jax.running import bucket_run
  from flexivit_jax.weights import folders, verification

  problems = {}
  path = bucket_run.fetched(args.path)
  verify = packs.verify if packs.is_packed(path) else verification.verify
  for name, problem in verify(path):
    # Of what is in a bucket a copy is checked.
    shown = name.replace(str(path), storage.address(args.path) or str(path))
    print(f"{shown}: {problem or 'as it was written'}", flush=True)
    if problem:
      problems[shown] = problem
  if problems:
    unknown = any(isinstance(problem, folders.NoChecksums) for problem in problems.values())
    what = "Nothing to compare with" if unknown else "Damaged"
    raise errors.UserError(f"{what}: {', '.join(problems)}.")
