"""`flexivit verify PATH`: is everything still what was written? See `weights.verification`."""

import argparse

from flexivit_jax import errors
from flexivit_jax.commands import options

HELP = "is everything in a run or an export as it was written?"


def add_arguments(p: argparse.ArgumentParser) -> None:
  """The path."""
  p.add_argument("path", type=options.path, help="a run, a checkpoint, an export, or weights")


def run(args: argparse.Namespace) -> None:
  """Prints a line for each thing checked; a UserError if anything is damaged, after all were looked at."""
  from flexivit_jax.weights import folders, verification

  problems = {}
  for name, problem in verification.verify(args.path):
    print(f"{name}: {problem or 'as it was written'}", flush=True)
    if problem:
      problems[name] = problem
  if problems:
    unknown = any(isinstance(problem, folders.NoChecksums) for problem in problems.values())
    what = "Nothing to compare with" if unknown else "Damaged"
    raise errors.UserError(f"{what}: {', '.join(problems)}.")
