"""`flexivit profile`: what each size of a model gives and costs on this device, kept beside the weights."""

import argparse

from flexivit_jax import errors
from flexivit_jax.commands import labelled, options

HELP = "measure accuracy and cost of each size on this device, for --budget"


def add_arguments(p: argparse.ArgumentParser) -> None:
  """The checkpoint, the labelled data, the sizes, the batches, the runtimes."""
  labelled.add_arguments(p)
  p.add_argument("--metric", default="", help="of the evaluation (default: its headline)")
  p.add_argument("--seqhw", default="all", help="e.g. 5,8,15 ('all': those of the training)")
  p.add_argument(
    "--batch_sizes",
    type=options.whole_numbers,
    default=(1, 4),
    metavar="N,N",
    help="images at a time (default 1,4)",
  )
  p.add_argument(
    "--ways",
    default="jax",
    help="how it is run, of jax, jax:bfloat16, onnx, onnx:int8 (default jax)",
  )
  p.add_argument("--image_size", type=int, help="pixels a side, for weights that do not say")
  p.add_argument("--names", help="of a detector that compares images with texts, see predict")
  options.add_queries(p)
  p.add_argument("--out", type=options.path, help="the file (default: beside the weights)")
  options.add_reading(p)


def run(args: argparse.Namespace) -> None:
  """Prints the rows, and writes them."""
  from flexivit_jax import weights
  from flexivit_jax.analyses import profiling, retained
  from flexivit_jax.budget import profile as profiles
  from flexivit_jax.devices import compilation
  from flexivit_jax.experiment import labelling
  from flexivit_jax.inference import outputs, predictor, queries
  from flexivit_jax.tables import aligned

  if any(n < 1 for n in args.batch_sizes):
    raise errors.UserError(f"--batch_sizes={args.batch_sizes}; expected 1 or more each.")
  if args.out is not None and args.out.is_dir():
    raise errors.UserError(f"--out={args.out} is a folder; expected a file to write.")
  ways = profiling.ways(args.ways)
  compilation.keep_programs()
  kept = None if args.data or args.config else retained.beside(args.checkpoint)
  name, section = ("", {}) if kept else labelled.section(args)
  of_texts = section.get("type") in labelling.OF_TEXTS
  loaded = predictor.load(
    args.checkpoint, args.image_size, texts=of_texts, whole=True, **options.loading(args)
  )
  if predictor.gives_boxes(loaded.model):
    if loaded.model.open:  # its queries become its classes, of which the evaluation asks no more
      section = {k: v for k, v in section.items() if k not in labelling.OF_QUERIES}
    asked = queries.Asked(options.listed_names(args.names), None, args.vectors, args.as_typed)
    loaded = queries.closed(loaded, asked)
  weights.print_notes(loaded.record)
  sizes = () if kept and args.seqhw == "all" else predictor.sizes_of(args.seqhw, loaded)
  wanted = profiling.Asked(sizes, args.batch_sizes, ways, args.metric)
  if kept:
    outputs.note(f"{kept} says what each size gives")
    measured = retained.profile(kept, loaded, wanted, tell=outputs.note)
  else:
    evaluation = labelled.evaluation(name, {**section, "seqhw": sizes}, loaded)
    measured = profiling.measure(loaded, evaluation, wanted, outputs.note)
  print("\n".join(aligned(profiling.table(measured))))
  path = args.out or profiles.path_of(
    args.checkpoint, weights.towers.digest(loaded.model, loaded.params)
  )
  profiles.write(path, measured)
  print(f"wrote {path}: {len(measured.rows)} rows of {measured.device}")
