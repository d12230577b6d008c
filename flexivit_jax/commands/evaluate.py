"""`flexivit eval`: accuracy and cost of a checkpoint at every patch size."""

import argparse
import pathlib
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from flexivit_jax import errors, sizes
from flexivit_jax.commands import options

if TYPE_CHECKING:
  from flexivit_jax import experiment
  from flexivit_jax.inference.predictor import Loaded
  from flexivit_jax.models import Model
  from flexivit_jax.trees import Json, Params

HELP = "accuracy and cost of a checkpoint at every patch size"


def add_arguments(p: argparse.ArgumentParser) -> None:
  """The config with the evaluations, the checkpoint, the sizes, the file of the results."""
  options.add_config(p)
  options.add_checkpoint(p)
  p.add_argument(
    "--seqhw", help="'all' (the default: those of the config) or e.g. 5,8,4x6: tokens per side"
  )
  options.add_budget(p)
  p.add_argument(
    "--cascade",
    nargs="+",
    type=options.path,
    metavar="FILE",
    help="of `flexivit cascade`: also measures these, side by side with their finest size",
  )
  p.add_argument(
    "--out",
    type=options.path,
    help="file for the results (default: eval.json in the run folder)",
  )
  options.add_reading(p)
  options.add_processes(p)


def run(args: argparse.Namespace) -> None:
  """Evaluates args.checkpoint on each of the config's evaluators, prints a table, writes the results."""
  from flexivit_jax.devices import compilation
  from flexivit_jax.running import processes

  options.join(args)
  compilation.keep_programs()
  with processes.ending():
    _evaluate(args)


def _evaluate(args: argparse.Namespace) -> None:
  from flexivit_jax import config, experiment, trees, weights
  from flexivit_jax.data import class_names, text
  from flexivit_jax.devices import sharding
  from flexivit_jax.evaluators import results
  from flexivit_jax.experiment import labelling
  from flexivit_jax.inference import outputs, predictor
  from flexivit_jax.running import distributed, processes

  evals = config.load(args.config, args.overrides).get("evals", {})
  if not evals:
    raise errors.UserError(
      f"{args.config} has no evals; add evals=dict(test=dict(data=..., pp=..., seqhw=...))."
    )
  if args.out is not None:
    distributed.on_first(lambda: outputs.check_writable(args.out), "--out")
  given = options.loading(args)
  of_texts = any(section.get("type") in labelling.OF_TEXTS for section in evals.values())
  tasks = weights.tasks
  load: Callable[..., tuple[Model, Params, Json]] = weights.towers.load if of_texts else tasks.load
  # Of two towers, evaluators of images take the image tower, as any FlexiViT.
  if (
    not of_texts
    and distributed.each(lambda: tasks.name_of(args.checkpoint), "its checkpoint") == "two_towers"
  ):
    load = weights.load_with_record
  model, params, record = distributed.each(lambda: load(args.checkpoint, **given), "its checkpoint")
  if distributed.is_on():
    digest = trees.digest(params)
    processes.agree_on(
      {"evals": evals, "seqhw": args.seqhw, "budget": args.budget, "checkpoint": digest}
    )
  first = distributed.is_first()
  if first:
    weights.print_notes(record)
  of = f"the checkpoint {args.checkpoint}"
  classes = class_names.known_of(record, model.num_classes, of)
  tokens = text.of_record(record["text"]) if record.get("text") else None
  trained = [sizes.size_text(size) for size in sizes.trained(record)] or None
  override = _sizes(args, model, params, say=first)
  mesh = sharding.make_mesh()

  def build() -> dict[str, experiment.Evaluation]:
    evaluations = {}
    for name, written in evals.items():
      section = {**written, **override} if "seqhw" in written else {**written}
      own = labelling.classes_for(section, model, classes)
      evaluations[name] = experiment.build_evaluation(
        f"evals.{name}", section, every=1, classes=own, tokens=tokens
      )
    return evaluations

  placed = sharding.replicate(params, mesh)
  loaded = predictor.Loaded(model, params, record, str(args.checkpoint), predictor.no_files)
  for name, evaluation in distributed.each(build, "its data").items():
    for note in evaluation.notes if first else ():
      print(f"note: evals.{name}: {note}", file=sys.stderr)
    evaluator = evaluation.make(model, mesh)
    rows = results.measure(evaluator, placed)
    print(
      f"{name}: {evaluation.source.name} {evaluation.source.split}\n{results.table(rows, evaluation.metrics)}"
    )
    title = record.get("name") or args.checkpoint.stem
    about = results.about(
      title,
      evaluation.source.name,
      evaluation.source.split,
      record.get("step"),
      params,
      trained,
      experiment.classes_of_tables(evaluation, rows),
      evaluation.metrics,
    )
    if measured := _cascades(args, loaded, evaluation):
      about["cascades"] = measured
    if out := _out(args):
      results.write(results.file_of(out, name, evals), about, rows, evaluator)


def _sizes(
  args: argparse.Namespace, model: "Model", params: "Params", *, say: bool
) -> "dict[str, object]":
  """What --seqhw or --budget sets in the sections of the config; nothing for all of its sizes."""
  from flexivit_jax import weights
  from flexivit_jax.inference import budgets, outputs

  asked = options.size_asked(args)
  if asked.budget:
    note = outputs.note if say else lambda text: None
    digest = weights.towers.digest(model, params)
    return {"seqhw": [budgets.row_for(args.checkpoint, digest, asked, note=note).size]}
  return {} if asked.seqhw in (None, "all") else {"seqhw": sizes.parse(asked.seqhw)}


def _cascades(
  args: argparse.Namespace, loaded: "Loaded", evaluation: "experiment.Evaluation"
) -> "list[Json]":
  """Measures the files of --cascade on an evaluation of classes, prints a table, and returns their rows."""
  from flexivit_jax.analyses import cascading
  from flexivit_jax.inference import outputs
  from flexivit_jax.running import distributed

  kind = evaluation.section.get("type", "classification")
  if not args.cascade or kind not in ("classification", "zero_shot"):
    return []
  if distributed.is_on():
    raise errors.UserError("--cascade runs in one process; start the command once.")
  rows = cascading.measured(loaded, evaluation, args.cascade, outputs.note)
  print(cascading.table(rows))
  return rows


def _out(args: argparse.Namespace) -> pathlib.Path | None:
  if args.out is None and (args.checkpoint / "config.json").is_file():
    return args.checkpoint / "eval.json"
  return args.out
