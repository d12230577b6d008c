"""Checkpoints on test sets at every patch size; each result is kept, so that the same command goes on."""

import json
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from flexivit_jax import (
  compilation,
  errors,
  experiment,
  imagenet_sets,
  results,
  sharding,
  trees,
  weights,
)
from flexivit_jax.reproduce.items import Evaluation, Subject

MADE_OF = ("weights", "dataset", "split", "images", "protocol", "pp", "fields", "seqhw")


class Checkpoint(NamedTuple):
  """What is measured: under which name, where it is, and which published numbers are of it; None: none are known."""

  name: str
  path: str
  subject: Subject | None


class Measured(NamedTuple):
  """One checkpoint on one set: what is written in its file."""

  checkpoint: Checkpoint
  set_name: str
  about: dict[str, Any]
  rows: list[dict[str, Any]]


def checkpoints_of(evaluation: Evaluation, given: Sequence[str]) -> list[Checkpoint]:
  """All of an item, or those that are given, each as NAME, NAME=FILE (what stands for NAME), or FILE."""
  if not given:
    if missing := [name for name in evaluation.subjects if name not in weights.PUBLISHED]:
      raise errors.UserError(
        f"These are not published where they can be fetched; give some of them, as --checkpoint '{missing[0]}=FILE': "
        + ", ".join(missing)
      )
    return [Checkpoint(name, name, s) for name, s in evaluation.subjects.items()]
  found = []
  for text in given:
    name, equals, path = text.partition("=")
    if equals and name not in evaluation.subjects:
      raise errors.unknown("checkpoint of this item", name, evaluation.subjects)
    if equals or name in evaluation.subjects:
      found.append(Checkpoint(name, path or name, evaluation.subjects[name]))
    else:
      found.append(Checkpoint(pathlib.Path(text).stem, text, None))
  names = [c.name for c in found]
  if twice := sorted({n for n in names if names.count(n) > 1}):
    raise errors.UserError(
      f"--checkpoint: {twice[0]!r} stands there twice; rename one of the files."
    )
  return found


def open_sets(
  names: Sequence[str], protocol: str, **given: Any
) -> dict[str, tuple[imagenet_sets.Protocol, Any]]:
  """Opens the data of all sets; a UserError says all that are missing, not the first.

  Args:
    names: of `imagenet_sets.SETS`.
    protocol: of `imagenet_sets.PROTOCOLS`.
    **given: see `imagenet_sets.section`.
  """
  if protocol not in imagenet_sets.PROTOCOLS:
    raise errors.unknown("protocol", protocol, imagenet_sets.PROTOCOLS)
  chosen, opened, missing = imagenet_sets.PROTOCOLS[protocol], {}, {}
  for name in names:
    section = imagenet_sets.section(name, chosen, **given)
    try:
      opened[name] = (chosen, experiment.build_evaluation(section, every=1))
    except errors.UserError as e:
      missing[name] = str(e)
  if missing:
    lines = [f"{name}: {why}" for name, why in missing.items()]
    only = f" `--sets {','.join(opened)}` measures those that are there." if opened else ""
    raise errors.UserError("These sets cannot be read:\n  " + "\n  ".join(lines) + f"\n{only}")
  return opened


def measure(
  checkpoints: Sequence[Checkpoint],
  sets: dict[str, tuple[imagenet_sets.Protocol, Any]],
  out: pathlib.Path,
) -> list[Measured]:
  """Evaluates each checkpoint on each set, or reads what an earlier call wrote to OUT/CHECKPOINT/SET.json.

  Raises:
    UserError: a file there is of something else.
  """
  compilation.keep_programs()
  mesh, found = sharding.make_mesh(), []
  for checkpoint in checkpoints:
    model, params, record = weights.load_with_record(checkpoint.path)
    digest = trees.digest(params)
    for name, (protocol, evaluation) in sets.items():
      file = out / checkpoint.name.replace("/", "-") / f"{name}.json"
      source = evaluation.source
      about = results.about(
        checkpoint.name, source.name, source.split, record.get("step"), params, None
      ) | {
        "weights": digest, "images": len(source), "protocol": protocol.says, "pp": evaluation.pp,
        "fields": dict(protocol.fields), "seqhw": list(evaluation.section["seqhw"]),
      }  # fmt: skip
      if file.is_file():
        about, rows = _kept(file, about)
      else:
        evaluator = evaluation.make(model.clone(**dict(protocol.fields)), mesh)
        rows = results.measure(evaluator, params)
        file.parent.mkdir(parents=True, exist_ok=True)
        results.write(file, about, rows)
      found.append(Measured(checkpoint, name, about, rows))
      print(f"{checkpoint.name} on {name}:\n{results.table(rows)}", flush=True)
  return found


def _kept(file: pathlib.Path, about: dict[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
  kept = json.loads(file.read_text())
  rows = kept.pop("rows")
  for key in MADE_OF:
    if kept.get(key) != about[key]:
      raise errors.UserError(
        f"{file} is of {key} {kept.get(key)}, this is {about[key]}; give another --out."
      )
  return kept, rows
