"""Evaluates checkpoints on test sets at every patch size; results are cached, so that the same command resumes."""

import contextlib
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import xxhash

from flexivit_jax import data, errors, experiment, trees, weights
from flexivit_jax.devices import compilation, sharding
from flexivit_jax.evaluators import results
from flexivit_jax.models import FlexiViT
from flexivit_jax.paper import test_sets
from flexivit_jax.paper.items import PaperEvaluation, Subject, fields_of
from flexivit_jax.sizes import SeqHw, size_text
from flexivit_jax.trees import Json

# Keys in which a cached result must agree. The machine, whose milliseconds it holds, may differ.
MADE_OF = (
  "weights", "dataset", "split", "images", "examples", "protocol", "pp", "label_map", "fields", "seqhw"
)  # fmt: skip
LOOKED_AT = 64  # examples whose bytes identify a set


class Checkpoint(NamedTuple):
  """A checkpoint to measure: its name, its path, and the subject of published numbers; None: nothing is published."""

  name: str
  path: str
  subject: Subject | None


class Measured(NamedTuple):
  """The results of one checkpoint on one set, as in its file."""

  checkpoint: Checkpoint
  set_name: str
  about: Json
  rows: list[Json]


def checkpoints_of(evaluation: PaperEvaluation, given: Sequence[str]) -> list[Checkpoint]:
  """Returns all checkpoints of an item, or the given ones: a published name, NAME=FILE (in place of NAME), or a FILE.

  Raises:
    UserError: the item has no such NAME, a name occurs twice, or a checkpoint cannot be fetched.
  """
  subjects = evaluation.subjects
  if not given:
    if missing := [name for name in subjects if name not in weights.PUBLISHED]:
      raise errors.UserError(
        f"These are not published where they can be fetched; give some of them, as --checkpoint '{missing[0]}=FILE': "
        + ", ".join(missing)
      )
    return [Checkpoint(name, name, s) for name, s in subjects.items()]
  checkpoints = [_checkpoint(subjects, text) for text in given]
  names = [c.name for c in checkpoints]
  if twice := sorted({n for n in names if names.count(n) > 1}):
    raise errors.UserError(
      f"--checkpoint: {twice[0]!r} stands there twice; give a copy of one of the files another name."
    )
  return checkpoints


def _checkpoint(subjects: Mapping[str, Subject], text: str) -> Checkpoint:
  name, equals, path = text.partition("=")
  if equals and name in subjects:
    return Checkpoint(name, path, subjects[name])
  if equals and not pathlib.Path(text).exists():
    raise errors.unknown("checkpoint of this item", name, subjects)
  published = weights.PUBLISHED.get(text)
  name = published.name if published else text
  if name in subjects:
    return Checkpoint(name, text, subjects[name])
  file = pathlib.Path(text)
  is_file = file.suffix in (".npz", ".safetensors", ".pth", ".pt", ".bin")
  return Checkpoint(file.stem if is_file else file.name, text, None)


def load(checkpoint: Checkpoint) -> tuple[FlexiViT, dict, Json]:
  """Loads a checkpoint with `weights.load_with_record`.

  Raises:
    UserError: the model differs from the one whose published numbers it would be compared with.
  """
  model, params, record = weights.load_with_record(checkpoint.path)
  name, path, subject = checkpoint
  expected = fields_of(name, subject, model.posemb_size) if subject else {}
  if lines := weights.differences(model, expected):
    raise errors.UserError(
      f"{path} is no {name!r}, so that its published numbers are not of it:\n  "
      + "\n  ".join(lines)
      + "\nA file without 'NAME=' is measured too, beside nothing published."
    )
  return model, params, record


def open_sets(
  names: Sequence[str],
  protocol: str,
  *,
  data_dir: pathlib.Path | None,
  seqhw: Sequence[SeqHw],
  batch_size: int = 256,
) -> dict[str, tuple[test_sets.Protocol, Any]]:
  """Opens the data of all sets; a UserError names all that are missing.

  Args:
    names: keys of `test_sets.SETS`.
    protocol: a key of `test_sets.PROTOCOLS`.
    data_dir: the folder of TFDS, or of DATA_DIR/SET/CLASS/*.jpg; None: TFDS's own default.
    seqhw: the grids.
    batch_size: images at a time.
  """
  if protocol not in test_sets.PROTOCOLS:
    raise errors.unknown("protocol", protocol, test_sets.PROTOCOLS)
  for name in names:
    if name not in test_sets.SETS:
      raise errors.unknown("test set", name, test_sets.SETS)
  chosen, opened, missing = test_sets.PROTOCOLS[protocol], {}, {}
  for name in names:
    try:
      source, classes = source_of(name, data_dir)
      keys = section(name, chosen.pp, source, classes)
      keys |= {"seqhw": tuple(seqhw), "batch_size": batch_size}
      opened[name] = (chosen, experiment.build_evaluation("", keys, every=1))
    except errors.UserError as e:
      missing[name] = str(e)
  if missing:
    lines = [f"{name}: {why}" for name, why in missing.items()]
    only = f" `--sets {','.join(opened)}` measures those that are there." if opened else ""
    raise errors.UserError("These sets cannot be read:\n  " + "\n  ".join(lines) + f"\n{only}")
  return opened


def in_folders(name: str, data_dir: pathlib.Path | None) -> bool:
  """Whether a set is in DATA_DIR/SET/CLASS rather than prepared by TFDS."""
  if data_dir is None or not (data_dir / name).is_dir():
    return False
  return not (data_dir / test_sets.SETS[name].data["name"].partition("/")[0]).is_dir()


def source_of(name: str, data_dir: pathlib.Path | None) -> tuple[Json, int]:
  """Returns the data section of a set and the number of classes of its labels.

  Raises:
    UserError: the images of the set have several labels, which folders cannot express.
  """
  chosen = test_sets.SETS[name]
  where = {} if data_dir is None else {"data_dir": str(data_dir)}
  if not in_folders(name, data_dir):
    return chosen.data | where, chosen.num_classes
  if chosen.several:
    raise errors.UserError(
      f"images of {name!r} have several labels, which no folders tell; use TFDS."
    )
  # The published numbers are of images as they are stored.
  source: Json = {"name": "folder", "split": name, "upright": False, **where}
  return source, data.make_source(**source).num_classes


def section(name: str, pp: str, source: Json, classes: int) -> Json:
  """Returns the section of `evals` for a set, without sizes and batch size."""
  chosen = test_sets.SETS[name]
  labels = f"{'multihot' if chosen.several else 'onehot'}({classes})"
  keys = {
    "data": source, "pp": f"decode|{pp}|value_range(-1, 1)|{labels}|keep('image', 'labels')"
  }  # fmt: skip
  keys |= {"label_map": chosen.label_map} if chosen.label_map else {}
  return keys | ({"skip_unlabelled": True} if chosen.several else {})


def fingerprint(source: data.Source) -> str:
  """Returns a hash that identifies a set: of ids, labels and bytes of evenly spaced examples."""
  digest = xxhash.xxh3_64()
  indices = np.unique(np.linspace(0, len(source) - 1, LOOKED_AT).astype(int)).tolist()
  for record in source.read(indices):
    digest.update(f"{record['id']!r} {record['label']!r} ".encode() + record["image"])
  return digest.hexdigest()


def measure(
  checkpoints: Sequence[Checkpoint],
  sets: dict[str, tuple[test_sets.Protocol, Any]],
  out: pathlib.Path,
) -> list[Measured]:
  """Evaluates each checkpoint on each set, or reads the cached OUT/CHECKPOINT/SET.json of an earlier call.

  Raises:
    UserError: a cached file belongs to something else; a checkpoint is not the named one (see `load`).
  """
  compilation.keep_programs()
  for checkpoint in checkpoints:  # so that a wrong file is an error before anything is measured
    if pathlib.Path(checkpoint.path).exists():
      load(checkpoint)
  mesh, all_measured = sharding.make_mesh(), []
  for checkpoint in checkpoints:
    model, params, record = load(checkpoint)
    digest = trees.digest(params)
    for name, (protocol, evaluation) in sets.items():
      file = out / checkpoint.name.replace("/", "-") / f"{name}.json"
      source = evaluation.source
      about = results.about(
        checkpoint.name, source.name, source.split, record.get("step"), params, None,
        metrics=evaluation.metrics,
      ) | {
        "checkpoint": checkpoint.path, "weights": digest,
        "images": len(source), "examples": fingerprint(source), "protocol": protocol.says,
        "pp": evaluation.pp, "label_map": evaluation.section.get("label_map"), "fields": dict(protocol.fields),
        "seqhw": [size_text(size) for size in evaluation.section["seqhw"]],
      }  # fmt: skip
      if file.is_file():
        about, rows = _cached(file, about)
      else:
        evaluator = evaluation.make(model.clone(**dict(protocol.fields)), mesh)
        with _whole_sets():
          rows = results.measure(evaluator, params)
        file.parent.mkdir(parents=True, exist_ok=True)
        results.write(file, about, rows)
      all_measured.append(Measured(checkpoint, name, about, rows))
      print(f"{checkpoint.name} on {name}:\n{results.table(rows, evaluation.metrics)}", flush=True)
  return all_measured


@contextlib.contextmanager
def _whole_sets() -> Iterator[None]:
  """Adds to the error of a damaged image that it cannot be skipped: published numbers are of all images."""
  try:
    yield
  except data.BadExampleError as e:
    raise errors.UserError(f"{e.fact}. Repair it: the published numbers are of all images.") from e


def _cached(file: pathlib.Path, about: Json) -> tuple[Json, list[Json]]:
  stored = json.loads(file.read_text())
  rows = stored.pop("rows")
  for key in MADE_OF:
    if stored.get(key) != about[key]:
      raise errors.UserError(
        f"{file} is of {key} {stored.get(key)}, this is {about[key]}; give another --out."
      )
  return stored, rows
