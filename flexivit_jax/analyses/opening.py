"""What each analysis of a checkpoint begins with: its command line, the model, the data of a config's evaluation."""

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jax.sharding import Mesh

from flexivit_jax import config, errors, experiment, sizes, weights
from flexivit_jax.data import class_names
from flexivit_jax.devices import sharding
from flexivit_jax.evaluators import results
from flexivit_jax.models.flexivit import FlexiViT
from flexivit_jax.sizes import SeqHw
from flexivit_jax.trees import Json, Params


class Opened(NamedTuple):
  """A model with its parameters, batches as often as wanted, the mesh, and the sizes to look at.

  `section` is the config's section of the evaluation, `training` its section of training data; None: it has none.
  """

  model: FlexiViT
  params: Params
  data: Iterable[Json]
  mesh: Mesh
  seqhw: Sequence[SeqHw]
  section: Json
  training: Json | None


def parser(doc: str | None, **seqhw: Any) -> argparse.ArgumentParser:
  """The arguments that all take; `seqhw` are those of `--seqhw` where it is not "all sizes of the evaluation"."""
  made = argparse.ArgumentParser(
    description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  made.add_argument("checkpoint", type=Path)
  made.add_argument("--config", required=True, help="whose evaluation data are used")
  made.add_argument("--out", type=Path, required=True)
  default = {"default": "all", "help": "e.g. 2,4,8; default: the evaluation's"}
  made.add_argument("--seqhw", **(seqhw or default))
  return made


def main_section(given: Json) -> Json:
  """The section of a config's main evaluation: "test", or the first that classifies.

  Raises:
    UserError: none does.
  """
  evals = given.get("evals", {})
  classify = [n for n, e in evals.items() if e.get("type", "classification") == "classification"]
  if not classify:
    raise errors.UserError(
      f"Analyses take the data of an evaluation that classifies; the config has {sorted(evals) or 'none'}."
    )
  return dict(evals[results.main_of(classify)])


def open_checkpoint(made: argparse.ArgumentParser) -> tuple[argparse.Namespace, Opened]:
  """Parses the command line, `--config.KEY=VALUE` too, and opens what it names."""
  args, rest = made.parse_known_args()
  if unknown := [a for a in rest if not a.startswith("--config.")]:
    made.error(f"unknown argument {unknown[0]}")
  given = config.load(args.config, [a.removeprefix("--config.") for a in rest])
  section = main_section(given)
  seqhw = sizes.parse(args.seqhw, section.get("seqhw", ()), "the evaluation lists none")
  model, params, record = weights.load_with_record(args.checkpoint)
  classes = class_names.known_of(record, model.num_classes, f"the checkpoint {args.checkpoint}")
  mesh = sharding.make_mesh()
  evaluation = experiment.build_evaluation("", section, every=1, classes=classes)
  for note in evaluation.notes:
    print(f"note: {note}", file=sys.stderr)
  data = evaluation.make(model, mesh).batches
  training = given.get("input", {}).get("data")
  return args, Opened(model, params, data, mesh, seqhw, section, training)
