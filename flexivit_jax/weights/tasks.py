"""Any model in: `load` turns what a run, an .npz of ours or a published file holds into that model, whole.

`reading.load_with_record` gives the FlexiViT that each of them has; here come the parts around it. A new model of
`MODELS` that is made of parts needs nothing here.
"""

import os
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from flexivit_jax import errors, trees
from flexivit_jax.models import MODELS, Model, OwlViT, Segmenter, vit_part
from flexivit_jax.trees import Json, Params
from flexivit_jax.weights import (
  bare,
  big_vision,
  contents,
  formats,
  model_records,
  npz,
  reading,
  registry,
  segmenter,
  torch_files,
  towers,
)
from flexivit_jax.weights.transformers import detector, names as transformers_names

SEGMENTER = "segmenter"


class Whole(NamedTuple):
  """A model of parts in a file: its own fields, without those of its FlexiViT, its parameters, its record, notes."""

  model: Any
  params: Params
  record: Json
  notes: Sequence[str] = ()


def name_of(path: str | os.PathLike[str]) -> str:
  """Returns the name in `MODELS` of what a path holds; reads no array where a record or names of arrays say it.

  Raises:
    UserError: a run without a checkpoint, a file that cannot be read, or a record of an unknown model.
  """
  if (name := _stated(registry.find(path)[0])) is not None:
    return name
  return model_records.TWO_TOWERS if towers.text_of(path) is not None else "flexivit"


def is_whole(path: str | os.PathLike[str]) -> bool:
  """Tells whether a path holds a model of parts other than two towers; quicker than `name_of`."""
  name = _stated(registry.find(path)[0])
  if name is None or name == model_records.TWO_TOWERS:
    return False
  return vit_part(MODELS[name]) is not None


def load(path: str | os.PathLike[str], **options: Any) -> tuple[Model, Params, Json]:
  """Returns (model, params, record) of what a path holds, whole: a FlexiViT, two towers, a Segmenter, an OwlViT.

  Args:
    path: as for `reading.load_with_record`.
    **options: as there; fields are those of the FlexiViT, `dtype` is that of the whole.

  Returns:
    The record of `reading.load_with_record`, with the whole model in "model", and the names of its classes.

  Raises:
    UserError: see `reading.load_with_record`; parameters that are not those of the model, all differences listed.
  """
  name = name_of(path)
  if name == model_records.TWO_TOWERS:
    return towers.load(path, **options)
  part = vit_part(MODELS[name])
  vit, vit_params, record = reading.load_with_record(path, **options)
  if part is None:
    return vit, vit_params, record
  whole = _whole(registry.find(path)[0])
  model = whole.model.clone(**{part: model_records.fields_of(vit), "dtype": vit.dtype})
  params = whole.params | {part: vit_params}
  check(model, params, str(path), finite=options.get("finite", True))
  alone = model_records.left_out(name), "Left out: "
  notes = [note for note in record["notes"] if not note.startswith(alone)]
  notes = [note for note in notes if not note.endswith(transformers_names.HEADS_LEFT_OUT)]
  notes += whole.notes
  own = ("class_names", "data_classes", "text")
  kept = {k: whole.record[k] for k in own if k in whole.record}
  record = record | kept | {"model": model_records.record_of(model), "notes": notes}
  return model, jax.tree.map(jnp.asarray, params), record


def check(model: Model, params: Params, what: str, *, finite: bool = True) -> None:
  """Raises a UserError that lists every array that is missing, extra, or of another shape or dtype; or not finite."""
  if finite:
    reading.check_finite(params, what)
  part = vit_part(model)
  channels = (params[part] if part else params)["embedding"]["kernel"].shape[2]
  if lines := trees.diff(params_of(model, channels), params, max_lines=10**6):
    name = model_records.record_of(model)["name"]
    raise errors.UserError(f"{what} does not fit the model {name}:\n  " + "\n  ".join(lines))


def params_of(model: Model, channels: int) -> Params:
  """Returns the shapes and dtypes of a model's parameters, for images of so many channels."""
  # Parameters depend on no length that a spec names, such as how many queries there are.
  shapes = {
    name: tuple(d if isinstance(d, int) else 1 for d in one.shape)
    for name, one in model.inputs.items()
  }
  shapes["image"] = (8, 8, channels)
  inputs, size = jax.eval_shape(lambda: model.example(shapes)[0]), {"seqhw": 1}
  init = lambda **x: model.init(jax.random.key(0), **x, **size)["params"]  # noqa: E731
  return jax.eval_shape(init, **inputs)


def _stated(file: pathlib.Path) -> str | None:
  """Returns the name of the model in a run, an .npz of ours, a Segmenter's or a detector's file; None of others."""
  if npz.has_record(file):
    return model_records.name_of(npz.read_record(file))
  if _is_run(file):
    from flexivit_jax.running import checkpoint  # Lazy: Orbax, a fifth of a second.

    return model_records.name_of(checkpoint.record_of(file))
  if detector.is_one(file):
    return detector.NAME
  # Others have names of arrays alone. A file of another kind than its suffix says has its error later.
  if file.suffix.lower() in bare.READERS and file.suffix.lower() not in npz.READERS:
    is_torch = file.is_file() and contents.kind(file) == contents.TORCH
    if is_torch and segmenter.prefix_of(torch_files.names(file)) is not None:
      return SEGMENTER
  return None


def _is_run(file: pathlib.Path) -> bool:
  recognised = (f for f in formats.FORMATS if f.recognises(file))
  return file.is_dir() and next(recognised, None) == formats.CHECKPOINT


def _whole(file: pathlib.Path) -> Whole:
  if detector.is_one(file):
    found = detector.read(file)
    text = {"text": found.tokenizer} if found.tokenizer else {}
    notes = [*found.notes, *([] if found.tokenizer else [towers.NO_TOKENIZER])]
    return Whole(OwlViT(**found.fields), found.params, text, notes)
  if file.is_dir():
    from flexivit_jax.running import checkpoint

    params, record = checkpoint.load_params(file)
  elif npz.has_record(file):
    arrays, record = npz.read_npz(file)
    params = trees.unflatten(big_vision.plain(arrays))
  else:
    arrays, _ = bare.READERS[file.suffix.lower()](file)
    prefix = segmenter.prefix_of(arrays)
    assert prefix is not None  # `_stated` has seen to it
    fields, params = segmenter.decoder_from_torch(arrays, prefix)
    return Whole(Segmenter(**fields), params, {})
  return Whole(model_records.of_record(file, record), params, record)
