"""The beginning of each analysis of a checkpoint: command line, model, and data of a config's evaluation."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jax.sharding import Mesh

from flexivit_jax import config, errors, experiment, sizes, weights
from flexivit_jax.data import class_names
from flexivit_jax.devices import sharding
from flexivit_jax.evaluators import results
from flexivit_jax.evaluators.base import Batches
from flexivit_jax.evaluators.per_size import PerSize
from flexivit_jax.models.flexivit import FlexiViT
from flexivit_jax.sizes import SeqHw
from flexivit_jax.trees import Json, Params


class Opened(NamedTuple):
  """A model with its parameters, re-iterable batches, the mesh, and the sizes to analyse.

  `section` is the evaluation section of the config, `training` its training data section; None: it has none.
  """

  model: FlexiViT
  params: Params
  data: Batches
  mesh: Mesh
  seqhw: Sequence[SeqHw]
  section: Json
  training: Json | None


def parser(doc: str | None, **seqhw: Any) -> argparse.ArgumentParser:
  """Returns the parser of the shared arguments; `seqhw` replaces the settings of `--seqhw`, by default "all"."""
  arguments = argparse.ArgumentParser(
    description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  arguments.add_argument("checkpoint", type=Path)
  arguments.add_argument("--config", required=True, help="whose evaluation data are used")
  arguments.add_argument("--out", type=Path, required=True)
  default = {"default": "all", "help": "e.g. 2,4,8; default: the evaluation's"}
  arguments.add_argument("--seqhw", **(seqhw or default))
  return arguments


def main_section(settings: Json) -> Json:
  """Returns the section of a config's main evaluation: "test", or the first that classifies.

  Raises:
    UserError: no evaluation classifies.
  """
  evals = settings.get("evals", {})
  classify = [n for n, e in evals.items() if e.get("type", "classification") == "classification"]
  if not classify:
    raise errors.UserError(
      f"Analyses take the data of an evaluation that classifies; the config has {sorted(evals) or 'none'}."
    )
  return dict(evals[results.main_of(classify)])


def open_checkpoint(arguments: argparse.ArgumentParser) -> tuple[argparse.Namespace, Opened]:
  """Parses the command line, including `--config.KEY=VALUE`, and opens the checkpoint and the data."""
  args, rest = arguments.parse_known_args()
  if unknown := [a for a in rest if not a.startswith("--config.")]:
    arguments.error(f"unknown argument {unknown[0]}")
  settings = config.load(args.config, [a.removeprefix("--config.") for a in rest])
  section = main_section(settings)
  seqhw = sizes.parse(args.seqhw, section.get("seqhw", ()), "the evaluation lists none")
  model, params, record = weights.load_with_record(args.checkpoint)
  classes = class_names.known_of(record, model.num_classes, f"the checkpoint {args.checkpoint}")
  mesh = sharding.make_mesh()
  evaluation = experiment.build_evaluation("", section, every=1, classes=classes)
  for note in evaluation.notes:
    print(f"note: {note}", file=sys.stderr)
  evaluator = evaluation.make(model, mesh)
  assert isinstance(evaluator, PerSize)  # the section classifies
  training = settings.get("input", {}).get("data")
  return args, Opened(model, params, evaluator.batches, mesh, seqhw, section, training)
