"""`flexivit reproduce`: the paper's figures and tables; see `flexivit_jax.paper.reproduce`."""

import argparse

from flexivit_jax.commands import options

HELP = "the paper's figures: how, at what cost, ours beside theirs"


def add_arguments(p: argparse.ArgumentParser) -> None:
  """An item of the paper; how it is measured, or what it is compared with."""
  p.add_argument("item", nargs="?", help="a figure or table, as `--list` names them")
  p.add_argument("--list", action="store_true", help="all items (the default without one)")
  p.add_argument("--costs", action="store_true", help="all items, and what each training takes")
  p.add_argument(
    "--data_dir",
    type=options.path,
    help="where TFDS prepared the data, or of folders such as DIR/val/CLASS/*.jpg",
  )
  p.add_argument(
    "--out",
    type=options.path,
    help="folder for results; those that are in it are not measured again",
  )
  p.add_argument(
    "--checkpoint",
    action="append",
    help="one of the item's, NAME=FILE that stands for one, or a file; again for more (default: all, fetched)",
  )
  p.add_argument("--sets", help="e.g. val,v2 (default: the item's)")
  p.add_argument("--seqhw", help="e.g. 5,15,30 or 4x6 (default: 'all', the item's)")
  p.add_argument("--protocol", help="paper, timm, ... (default: the item's)")
  p.add_argument("--batch_size", type=int, help="images at a time (default 256)")
  p.add_argument(
    "--results", type=options.path, help="an eval.json, to put beside the published numbers"
  )
  p.add_argument("--model", help="with --results: only published numbers of this model")
  p.add_argument("--setting", help='with --results: only those of this setting, e.g. "90 epochs"')


def run(args: argparse.Namespace) -> None:
  """Lists the items, or shows one, or measures it, or puts results beside what is published of it."""
  from flexivit_jax.paper import reproduce

  reproduce.run(args)
