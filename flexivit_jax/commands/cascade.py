"""`flexivit cascade`: coarse sizes first, finer ones where they are unsure, with a guarantee from labelled images."""

import argparse
import pathlib

from flexivit_jax import errors
from flexivit_jax.commands import labelled, options

HELP = "calibrate a cascade: coarse sizes first, finer ones where they are unsure"


def add_arguments(p: argparse.ArgumentParser) -> None:
  """The checkpoint, the labelled images, the sizes, the guarantee, the file."""
  labelled.add_arguments(p)
  p.add_argument(
    "--seqhw",
    default="all",
    help="the sizes to choose stages from, the finest always among them ('all': those of the training)",
  )
  p.add_argument(
    "--alpha",
    type=options.numbers,
    required=True,
    metavar="SHARE",
    help="of images that the cascade may get wrong and the finest size right, e.g. 0.01; several make a file each",
  )
  p.add_argument(
    "--risk",
    default="lost",
    help="what --alpha limits: lost, these images (default), or drop, by which the accuracy is below the finest size's",
  )
  p.add_argument(
    "--delta",
    type=float,
    default=0.05,
    help="the probability that it is more, by an unlucky choice of images (default 0.05)",
  )
  p.add_argument(
    "--signal",
    default="confidence",
    help="by which a stage stops: confidence (default), margin, or agreement with the stage before",
  )
  p.add_argument("--cost", default="ms", help="what is kept low: ms as measured here, or gflops")
  p.add_argument("--seed", type=int, default=0, help="of the division of the images (default 0)")
  p.add_argument(
    "--names",
    help="texts as the classes, with a text tower, in the order of the labels: see predict",
  )
  p.add_argument("--templates", help="sentences for the names, see predict")
  p.add_argument("--image_size", type=int, help="pixels a side, for weights that do not say")
  p.add_argument(
    "--batch_size",
    type=int,
    help="images at a time (default: as the evaluation of the config; of --data, as predict)",
  )
  p.add_argument("--out", type=options.path, required=True, help="the file, a .json")
  options.add_reading(p)


def run(args: argparse.Namespace) -> None:
  """Writes the cascade of each alpha, and prints what it gives and costs."""
  from flexivit_jax import trees, weights
  from flexivit_jax.analyses import cascading
  from flexivit_jax.budget import cascade as rules
  from flexivit_jax.devices import compilation
  from flexivit_jax.inference import outputs, predictor, texts
  from flexivit_jax.inference.predictions import check_classes

  if args.templates and not args.names:
    raise errors.UserError("--templates are sentences for --names; give these, or leave it out.")
  compilation.keep_programs()
  name, section = labelled.section(args)
  names = options.listed_names(args.names)
  loaded = predictor.load(
    args.checkpoint, args.image_size, texts=bool(names), whole=True, **options.loading(args)
  )
  if predictor.gives_masks(loaded.model) or predictor.gives_boxes(loaded.model):
    raise errors.UserError(f"{args.checkpoint} gives no classes of whole images; a cascade does.")
  among, templates = None, ""
  if names:
    templates = args.templates or "name"
    among = texts.of_names(loaded, names, templates)
  else:
    check_classes(loaded)
  weights.print_notes(loaded.record)
  given = {}
  if args.data or args.batch_size is not None:
    given = {"batch_size": predictor.checked_batch_size(args.batch_size)}
  evaluation = labelled.evaluation(name, {**section, **given}, loaded, among.names if among else ())
  asked = cascading.Asked(loaded, among)
  wanted = predictor.sizes_of(args.seqhw, loaded)
  found = cascading.scored(asked, evaluation.batches(), wanted, outputs.note)
  source = evaluation.source
  about = {
    "weights": trees.digest(loaded.params),
    "data": {
      "name": source.name,
      "split": source.split,
      "n": len(found.labels),
      "image": list(found.image),
      "batch": found.batch,
    },
    "names": among.names if among else (),
    "templates": templates,
  }
  for alpha in args.alpha:
    made = cascading.fit(
      found,
      unit=args.cost,
      alpha=alpha,
      delta=args.delta,
      signal=args.signal,
      risk=args.risk,
      seed=args.seed,
      **about,
    )
    path = _path(args.out, alpha if len(args.alpha) > 1 else None)
    rules.write(path, made)
    print("\n".join([*cascading.text(made), f"wrote {path}"]))


def _path(out: pathlib.Path, alpha: float | None) -> pathlib.Path:
  return out if alpha is None else out.with_name(f"{out.stem}_{alpha:g}{out.suffix}")
