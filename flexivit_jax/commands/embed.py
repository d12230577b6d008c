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
  options.add_processes(p)


def run(args: argparse.Namespace) -> None:
  """Writes the features of args.image."""
  from flexivit_jax.devices import compilation
  from flexivit_jax.running import processes

  options.join(args)
  compilation.keep_programs()
  with processes.ending():
    _embed(args)


def _embed(args: argparse.Namespace) -> None:
  from flexivit_jax import weights
  from flexivit_jax.data.inputs import find_images
  from flexivit_jax.inference import budgets, outputs, predictor
  from flexivit_jax.inference.features import WRITERS, features, written
  from flexivit_jax.running import distributed
  from flexivit_jax.sizes import size_text

  distributed.on_first(lambda: outputs.check_new(args.out, WRITERS, args.overwrite), "--out")
  given = options.loading(args)
  loaded = distributed.each(
    lambda: predictor.load(args.checkpoint, args.image_size, **given), "its checkpoint"
  )
  first = distributed.is_first()
  say = outputs.note if first else lambda text: None
  choice = budgets.chosen(loaded, options.size_asked(args), args.batch_size, note=say)
  sizes, batch_size = choice.sizes, choice.batch_size
  if first:
    weights.print_notes(loaded.record)
  inputs = find_images(args.image, say)
  predictor.agree(loaded, inputs, sizes=sizes, batch_size=batch_size, normalize=args.normalize)
  tally = outputs.Tally(len(inputs), first, progress=True)
  fn = functools.partial(features, normalize=args.normalize)
  with written(args.out if first else None, sizes, loaded) as add, contextlib.ExitStack() as stack:
    stream = predictor.outcomes(loaded, fn, inputs, sizes, batch_size=batch_size)
    for outcome in stack.enter_context(contextlib.closing(stream)):
      tally.add(outcome.file, outcome.error)
      if outcome.error is None:
        add(outcome.file, outcome.outputs)
    tally.check_any()
  shown = ", ".join(str(size_text(size)) for size in sizes)
  print(
    f"{args.out}: {tally.done - tally.bad} images, {loaded.model.num_features} features, seqhw={shown}"
  )
  tally.check_all(args.on_error)
