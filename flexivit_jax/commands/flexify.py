"""`flexivit flexify`: see `flexivit_jax.flexify`."""

import argparse

from flexivit_jax import sizes
from flexivit_jax.commands import options

HELP = "make a fixed model work at every patch size, unlabelled"


def add_arguments(p: argparse.ArgumentParser) -> None:
  """The model, the images, the folder to write to; the training and the sizes."""
  p.add_argument("--init", required=True, type=options.path, help="the model: what --checkpoint is")
  p.add_argument(
    "--data",
    required=True,
    type=options.path,
    help="folder of images, or one with train/ and val/, with folders of classes or without",
  )
  p.add_argument(
    "--out", required=True, type=options.path, help="folder to write to, or to resume in"
  )
  p.add_argument("--epochs", type=float, help="passes over the images (default 10; 0: only resize)")
  p.add_argument(
    "--image_size", type=int, help="pixels a side (default 240; of a detector its own)"
  )
  p.add_argument("--seqhw", help="tokens per side, e.g. 5,8,4x6; 'all': patches of 8 to 48 pixels")
  p.add_argument("--batch_size", type=int, help="default 16")
  p.add_argument("--lr", type=float, help="default 3e-5; 1e-5 for a model without classes")
  p.add_argument("--seed", type=int, help="default 0")
  p.add_argument(
    "--buffers",
    type=options.whole_numbers,
    metavar="PATCH,GRID",
    help="sides of the stored kernel and grid (default: the model's own)",
  )
  p.add_argument(
    "--on_error",
    choices=("raise", "skip"),
    help="what a damaged image does: raise (default) ends it, skip leaves the image out",
  )
  p.add_argument(
    "--moment", action="store_true", help="resize the kernel for patches like those of the images"
  )
  p.add_argument(
    "--names",
    help="of two towers: measure how often images have the same nearest of these texts, 'cat,dog,a red car'; of a"
    " detector that compares images with texts: what it looks for",
  )
  p.add_argument("--vectors", type=options.path, help=options.VECTORS)
  options.add_reading(p)
  options.add_processes(p)


def run(args: argparse.Namespace) -> None:
  """Flexifies args.init and prints what is left of it at each size."""
  from flexivit_jax.devices import compilation
  from flexivit_jax.flexify import detector, flexify, retention
  from flexivit_jax.models.grid import paper_sizes
  from flexivit_jax.running import processes

  options.join(args, saves=args.epochs != 0)
  compilation.keep_programs()
  values = options.chosen(
    args, "epochs", "image_size", "batch_size", "lr", "seed", "buffers", "on_error", "vectors"
  )
  if args.names is not None:
    values["names"] = tuple(options.listed_names(args.names) or ())
  # "all" is what a detector, whose images have a size of their own, gets where no sizes are given.
  if args.seqhw is not None and not (args.seqhw == "all" and detector.is_one(args.init)):
    side = args.image_size or 240
    lacking = f"no patch of 8 to 48 pixels divides {side} pixels"
    values["seqhw"] = sizes.parse(args.seqhw, paper_sizes(side), lacking)
  with processes.ending():
    scores = flexify(
      args.init,
      args.data,
      args.out,
      moment=args.moment,
      loading=options.loading(args),
      **values,
    )
  print(retention.table(scores))
  print(f"wrote {args.out / 'model.npz'}, retention.json and README.md, the model card")
