"""`flexivit predict`: the most likely classes of images, at chosen patch sizes."""

import argparse
import contextlib
import sys

from flexivit_jax import errors
from flexivit_jax.commands import options

HELP = "classify images at a chosen patch size"


def add_arguments(p: argparse.ArgumentParser) -> None:
  """The images, the model, the form of the answers."""
  options.add_images(p)
  p.add_argument(
    "--out", type=options.path, help="a .csv or .jsonl file to write the answers to, not to stdout"
  )
  p.add_argument("--json", action="store_true", help="print a line of JSON for each answer")
  p.add_argument("--top_k", type=int, default=5, help="most likely classes (default 5)")
  p.add_argument("--time", action="store_true", help="measure milliseconds an image")
  options.add_reading(p)


def run(args: argparse.Namespace) -> None:
  """Prints or writes the predictions for args.image."""
  from flexivit_jax import weights
  from flexivit_jax.data.inputs import find_images
  from flexivit_jax.devices import compilation
  from flexivit_jax.inference import outputs, predictor
  from flexivit_jax.inference.predictions import WRITERS, check_classes, predictions, sinks_of

  compilation.keep_programs()
  if args.top_k < 1:
    raise errors.UserError(f"--top_k={args.top_k}; expected 1 or more.")
  if args.out:
    outputs.check_new(args.out, WRITERS, args.overwrite)
  loaded = predictor.load(args.checkpoint, args.image_size, **options.loading(args))
  check_classes(loaded)
  sizes = predictor.sizes_of(args.seqhw, loaded)
  weights.print_notes(loaded.record)
  inputs = find_images(args.image, outputs.note)
  printed = args.json or not args.out
  tally = outputs.Tally(len(inputs), progress=not (printed and sys.stdout.isatty()))
  with (
    sinks_of(loaded, args.out, json_lines=args.json, k=args.top_k, timed=args.time) as sinks,
    contextlib.closing(
      predictions(loaded, inputs, sizes, args.top_k, args.batch_size, args.time)
    ) as stream,
  ):
    for file, rows in stream:
      tally.add(file, rows[0].error)
      for row in rows:
        for sink in sinks:
          sink(row)
    tally.check_any()
  if args.out and not args.json:
    print(f"{args.out}: {tally.done - tally.bad} images")
  tally.check_all(args.on_error)
