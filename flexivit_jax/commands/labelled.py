"""Labelled images of a command: an evaluation of a config, of the run itself, or --data. Imports nothing heavy."""

import argparse
import json
import pathlib
from typing import TYPE_CHECKING

from flexivit_jax import errors
from flexivit_jax.commands import options

if TYPE_CHECKING:
  from flexivit_jax.config import Section
  from flexivit_jax.experiment import Evaluation
  from flexivit_jax.inference.predictor import Loaded


def add_arguments(p: argparse.ArgumentParser) -> None:
  """The checkpoint, and where the images are."""
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
  options.add_overrides(p, "--config.evals.test.data.data_dir=photos")


def section(args: argparse.Namespace) -> "tuple[str, Section]":
  """Returns the name and the section of the evaluation; of --data what stands there.

  Raises:
    UserError: two sources, or none; no such evaluation.
  """
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
  if not evals:
    raise errors.UserError(
      f"{args.config or own} has no evaluation; give --config, or e.g. --data name=folder data_dir=photos split=val."
    )
  name = args.eval or results.main_of(evals)
  if name not in evals:
    raise errors.unknown("evaluation of the config", name, evals)
  return f"evals.{name}", dict(evals[name])


def evaluation(
  name: str, written: "Section", loaded: "Loaded", names: tuple[str, ...] = ()
) -> "Evaluation":
  """Opens the images; those of --data are prepared as the model's are. Notes go to stderr.

  Args:
    name, written: as of `section`.
    loaded: the model.
    names: the classes of the labels, in their order, where they are texts.

  Raises:
    UserError: see `experiment.build_evaluation`.
  """
  from flexivit_jax import experiment
  from flexivit_jax.data import class_names, text
  from flexivit_jax.experiment import labelling
  from flexivit_jax.inference import outputs, predictor

  record, classes = loaded.record, loaded.model.num_classes
  if "pp" not in written:
    pp = f"{predictor.of_images(loaded.pp)}|onehot({len(names) or classes})|keep('image', 'labels')"
    kind = {"type": "zero_shot", "names": list(names)} if names else {}
    written = {"batch_size": 32, **written, **kind, "pp": pp, "seqhw": [1]}
  known = class_names.known_of(record, classes, f"the checkpoint {loaded.name}")
  tokens = text.of_record(record["text"]) if record.get("text") else None
  own = labelling.classes_for(written, loaded.model, known)
  opened = experiment.build_evaluation(name, written, every=1, classes=own, tokens=tokens)
  for note in opened.notes:
    outputs.note(note)
  return opened
