"""`flexivit embed`: features of images (the pooled tokens before the head) at chosen patch sizes, in a file."""

import argparse
import contextlib
import functools

from flexivit_jax.commands import options

HELP = "features of images at a chosen patch size"


def add_arguments(p: argparse.ArgumentParser) -> None:
  """The images, the model, the file of the features."""
  options.add_images(p)
  p.add_argument(
    "--out", required=True, type=options.path, help="a .npz or .csv file to write the features to"
  )
  p.add_argument("--normalize", action="store_true", help="divide each vector by its length")
  options.add_reading(p)


def run(args: argparse.Namespace) -> None:
  """Writes the features of args.image."""
  from flexivit_jax import files, weights
  from flexivit_jax.data.inputs import find_images
  from flexivit_jax.devices import compilation
  from flexivit_jax.inference import outputs, predictor
  from flexivit_jax.inference.features import WRITERS, features
  from flexivit_jax.sizes import size_text

  compilation.keep_programs()
  outputs.check_new(args.out, WRITERS, args.overwrite)
  loaded = predictor.load(args.checkpoint, args.image_size, **options.loading(args))
  sizes = predictor.sizes_of(args.seqhw, loaded)
  weights.print_notes(loaded.record)
  inputs = find_images(args.image, outputs.note)
  tally = outputs.Tally(len(inputs), progress=True)
  fn = functools.partial(features, normalize=args.normalize)
  with files.replacing(args.out, unique=True) as part, contextlib.ExitStack() as stack:
    with files.write_errors(args.out):
      writer = WRITERS[args.out.suffix.lower()](part, sizes, loaded)
    stack.enter_context(contextlib.closing(writer))
    stream = predictor.outcomes(loaded, fn, inputs, sizes, batch_size=args.batch_size)
    for outcome in stack.enter_context(contextlib.closing(stream)):
      tally.add(outcome.file, outcome.error)
      if outcome.error is None:
        with files.write_errors(args.out):
          writer.add(outcome.file, outcome.outputs)
    tally.check_any()
    with files.write_errors(args.out):
      writer.finish()
  shown = ", ".join(str(size_text(size)) for size in sizes)
  print(
    f"{args.out}: {tally.done - tally.bad} images, {loaded.model.num_features} features, seqhw={shown}"
  )
  tally.check_all(args.on_error)
