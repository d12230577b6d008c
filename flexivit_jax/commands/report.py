"""`flexivit report RUN [RUN ...]`: the runs' eval.json files as a page, figures and JSON; see `flexivit_jax.report`."""

import argparse

from flexivit_jax import errors
from flexivit_jax.commands import options

HELP = "accuracy, or another metric, against patch size and cost, as HTML and PNG"


def add_arguments(p: argparse.ArgumentParser) -> None:
  """The runs, the metric, the folder of the page."""
  p.add_argument(
    "runs", nargs="+", type=options.path, metavar="RUN", help="run folders, or their eval.json"
  )
  p.add_argument(
    "--metric", metavar="NAME", help="metric to draw, e.g. loss (default: the first of the runs)"
  )
  p.add_argument("--out", type=options.path, help="folder to write to (default: the first run's)")
  p.add_argument(
    "--card",
    type=options.path,
    metavar="FILE",
    help="also a model card of the one run, as Hugging Face's hub reads it, e.g. vit/README.md",
  )


def run(args: argparse.Namespace) -> None:
  """Writes the page, prints the table."""
  from flexivit_jax import report, storage
  from flexivit_jax.running import bucket_run

  if args.out is None and storage.address(args.runs[0]):
    raise errors.UserError(
      f"A report on {storage.address(args.runs[0])} needs a folder of this machine to be written to: give --out."
    )
  runs = [bucket_run.fetched(run, bucket_run.without_checkpoints) for run in args.runs]
  print(report.table(runs, args.metric))
  if args.card is not None:
    report.model_card(runs, args.card, args.metric)
  print(report.report(runs, args.out or runs[0], metric=args.metric))
