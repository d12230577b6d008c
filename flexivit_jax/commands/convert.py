"""`flexivit convert`: weights in any format that `load` reads, for big_vision, timm, transformers or Segmenter.

What is written and compared is told in `weights.conversion`.
"""

import argparse

from flexivit_jax import errors, sizes
from flexivit_jax.commands import options

HELP = "weights of other projects as big_vision's .npz, verified"


def add_arguments(p: argparse.ArgumentParser) -> None:
  """The file, what to write, and for which framework and size."""
  p.add_argument("file", type=options.path, help=options.WEIGHTS)
  p.add_argument("out", type=options.path, help="an .npz to write; a folder with --to")
  p.add_argument(
    "--to", default="big_vision", help="big_vision (the default), timm, transformers or segmenter"
  )
  p.add_argument(
    "--seqhw",
    help="one size, tokens per side, with --to: 8 or 4x6 (default: buffers as they are stored)",
  )
  options.add_budget(p)
  p.add_argument("--image_size", type=int, help="pixels a side (default: the model's, or 240)")
  options.add_image_only(p)
  options.add_no_verify(p)
  options.add_loading(p)


def run(args: argparse.Namespace) -> None:
  """Writes args.out and its certificate; prints the differences."""
  from flexivit_jax.weights import certificate, conversion

  if args.to not in conversion.FORMATS:
    raise errors.unknown("--to", args.to, conversion.FORMATS)
  values = dict(image_size=args.image_size, verify=args.verify, image_only=args.image_only)
  values |= options.loading(args)
  if args.to == "big_vision":
    if (args.seqhw or args.budget) is not None:
      raise errors.UserError(
        "--seqhw: an .npz holds the model for all sizes; give --to=timm, or leave it out."
      )
    compared = "flexivit_jax"
    rows = conversion.convert(args.file, args.out, exact=not args.flexify, **values)
  else:
    why = f"a folder for {args.to} holds one size"
    text = options.size_text_asked(args, args.file)
    seqhw = None if text is None else sizes.parse_one(text, why)
    rows, compared = conversion.convert_to(args.to, args.file, args.out, seqhw=seqhw, **values)
  for row in rows:
    print(f"seqhw {sizes.size_text(row.seqhw)!s:>3}: {row.words()}, in {compared}")
  if args.verify:
    print(f"wrote {args.out} and {certificate.path_of(args.out)}")
  else:
    print(f"wrote {args.out}, not compared with its source (--no-verify)")
