"""`flexivit profile`: what each size of a model gives and costs on this device, kept beside the weights."""

import argparse
import json
import pathlib
from typing import TYPE_CHECKING

from flexivit_jax import errors
from flexivit_jax.commands import options

if TYPE_CHECKING:
  from flexivit_jax.config import Section
  from flexivit_jax.data import text
  from flexivit_jax.inference.predictor import Loaded

HELP = "measure accuracy and cost of each size on this device, for --budget"


def add_arguments(p: argparse.ArgumentParser) -> None:
  """The checkpoint, the labelled data, the sizes, the batches, the runtimes."""
  p.add_argument("checkpoint", type=options.path, help=options.WEIGHTS)
  p.add_argument(
    "--config",
    metavar="FILE[:ARG]",
    help="with the evaluation (default: the run's own, of a run folder)",
  )
  p.add_argument("--eval", metavar="NAME", help="which evaluation of the config (default: test)")
  p.add_argument(
    "--data",
    nargs="+",
    metavar="KEY=VALUE",
    help="labelled images in the place of a config, e.g. name=folder data_dir=photos split=val",
  )
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
  options.add_overrides(p, "--config.evals.test.data.data_dir=photos")


def run(args: argparse.Namespace) -> None:
  """Prints the rows, and writes them."""
  from flexivit_jax import experiment, weights
  from flexivit_jax.analyses import profiling
  from flexivit_jax.budget import profile as profiles
  from flexivit_jax.data import class_names
  from flexivit_jax.devices import compilation
  from flexivit_jax.experiment import labelling
  from flexivit_jax.inference import outputs, predictor, queries
  from flexivit_jax.tables import aligned

  if any(n < 1 for n in args.batch_sizes):
    raise errors.UserError(f"--batch_sizes={args.batch_sizes}; expected 1 or more each.")
  ways = profiling.ways(args.ways)
  compilation.keep_programs()
  name, section = _section(args)
  of_texts = section.get("type") in labelling.OF_TEXTS
  loaded = predictor.load(
    args.checkpoint, args.image_size, texts=of_texts, whole=True, **options.loading(args)
  )
  if predictor.gives_boxes(loaded.model):
    asked = queries.Asked(options.listed_names(args.names), None, args.vectors, args.as_typed)
    loaded = queries.closed(loaded, asked)
  if args.data:
    section = _of_data(section, loaded)
  weights.print_notes(loaded.record)
  classes = class_names.known_of(loaded.record, loaded.model.num_classes, "the checkpoint")
  tokens = _tokens(loaded)
  own = labelling.classes_for(section, loaded.model, classes)
  evaluation = experiment.build_evaluation(name, section, every=1, classes=own, tokens=tokens)
  for note in evaluation.notes:
    outputs.note(note)
  wanted = profiling.Asked(
    predictor.sizes_of(args.seqhw, loaded), args.batch_sizes, ways, args.metric
  )
  measured = profiling.measure(loaded, evaluation, wanted, outputs.note)
  print("\n".join(aligned(profiling.table(measured))))
  path = args.out or profiles.path_of(
    args.checkpoint, weights.towers.digest(loaded.model, loaded.params)
  )
  profiles.write(path, measured)
  print(f"wrote {path}: {len(measured.rows)} rows of {measured.device}")


def _section(args: argparse.Namespace) -> tuple[str, "Section"]:
  """Returns the name and the section of the evaluation; of --data what stands there."""
  from flexivit_jax import config
  from flexivit_jax.evaluators import results

  if args.data and (args.config or args.eval):
    raise errors.UserError("Give --data, or --config with --eval; not both.")
  if args.data:
    values = options.data_values(args.data)
    if "split" not in values:
      raise errors.UserError("--data lacks split=, e.g. split=val.")
    return "--data", {"data": values}
  if args.config:
    evals = config.load(args.config, args.overrides).get("evals", {})
  elif (own := pathlib.Path(args.checkpoint, "config.json")).is_file():
    if args.overrides:
      raise errors.UserError("--config.KEY=VALUE changes a config; give --config, too.")
    evals = json.loads(own.read_text()).get("evals", {})
  else:
    raise errors.UserError(
      f"{args.checkpoint} says no data to measure on; give --config, or e.g. --data name=folder data_dir=photos"
      " split=val."
    )
  name = args.eval or results.main_of(evals)
  if name not in evals:
    raise errors.unknown("evaluation of the config", name, evals)
  return f"evals.{name}", dict(evals[name])


def _of_data(section: "Section", loaded: "Loaded") -> "Section":
  """The section of an evaluation of labelled images, prepared as the model's are."""
  pp = f"{loaded.pp}|onehot({loaded.model.num_classes})|keep('image', 'labels')"
  return {**section, "pp": pp, "batch_size": 32, "seqhw": [1]}


def _tokens(loaded: "Loaded") -> "text.Tokens | None":
  from flexivit_jax.data import text

  return text.of_record(loaded.record["text"]) if loaded.record.get("text") else None
