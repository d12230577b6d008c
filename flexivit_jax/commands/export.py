"""`flexivit export`: one model at several patch sizes, to run without this project; read back and compared.

How each kind is written is told in `weights/export/stablehlo.py`, `onnx.py` and `saved_model.py`.
"""

import argparse
import functools

from flexivit_jax import errors
from flexivit_jax.commands import options
from flexivit_jax.sizes import size_text

HELP = "one model at several patch sizes, to run elsewhere"


def add_arguments(p: argparse.ArgumentParser) -> None:
  """The checkpoint, what to write, of which kind, for which sizes."""
  p.add_argument("checkpoint", type=options.path, help=options.WEIGHTS)
  p.add_argument(
    "out", type=options.path, metavar="OUT", help="file to write, a .zip; with --to a folder"
  )
  p.add_argument(
    "--to", default="stablehlo", help="stablehlo (the default; runs in jax), onnx or saved_model"
  )
  p.add_argument("--image_size", type=int, help="pixels a side (default: the model's, or 240)")
  p.add_argument(
    "--seqhw",
    help="tokens per side, e.g. 8,15,30 or 4x6; 'all': those that a run was trained at",
  )
  options.add_budget(p)
  p.add_argument(
    "--platforms",
    type=lambda text: tuple(text.split(",")),
    help="where it is to run, of cpu,cuda,rocm,tpu (default: cpu,cuda,tpu); not with --to",
  )
  p.add_argument(
    "--names",
    help="of a detector that compares images with texts: its classes, 'cat,dog' or a file with one a line",
  )
  p.add_argument("--templates", help="sentences for the names, see `flexivit predict`")
  options.add_queries(p)
  options.add_image_only(p)
  options.add_no_verify(p)
  options.add_loading(p)


def run(args: argparse.Namespace) -> None:
  """Writes args.out and its certificate; prints the differences."""
  from flexivit_jax.inference import queries
  from flexivit_jax.weights import certificate
  from flexivit_jax.weights.export import comparison

  seqhw = options.size_text_asked(args, args.checkpoint)
  if seqhw is None:
    raise errors.UserError(
      "Give --seqhw, the sizes to export, e.g. 8,15,30; or --budget, which chooses one."
    )
  names = options.listed_names(args.names)
  asked = queries.Asked(names, args.templates, args.vectors, args.as_typed)
  rows = comparison.export(
    args.checkpoint,
    args.out,
    to=args.to,
    seqhw=seqhw,
    image_size=args.image_size,
    platforms=args.platforms,
    verified=args.verify,
    image_only=args.image_only,
    loading=options.loading(args),
    adapt=functools.partial(queries.adapted, asked, str(args.checkpoint)),
  )
  for row in rows:
    print(f"seqhw {size_text(row.seqhw)!s:>3}: {row.words()}")
  if rows:
    print(f"wrote {args.out} and {certificate.path_of(args.out)}")
  elif args.verify:
    print(f"wrote {args.out}, not compared with its source: that takes the platform cpu")
  else:
    print(f"wrote {args.out}, not compared with its source (--no-verify)")
