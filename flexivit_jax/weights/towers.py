"""Image and text towers in: `load` turns a file or folder that holds both into a `TwoTowers` and its parameters.

The image tower is what `reading.load_with_record` makes of the same file, so that all it knows of files holds here too;
here come the text tower, the scale and the bias of the products, and the tokenizer.
"""

import os
import pathlib
import re
import zipfile
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flexivit_jax import errors, trees
from flexivit_jax.models import TextTower, TwoTowers, text as text_model
from flexivit_jax.sizes import Size
from flexivit_jax.trees import Json, Params
from flexivit_jax.weights import bare, layouts, model_records, npz, reading, registry, tower_names
from flexivit_jax.weights.big_vision import Fields
from flexivit_jax.weights.open_clip import text as open_clip_text
from flexivit_jax.weights.tower_names import Text
from flexivit_jax.weights.transformers import (
  folder as transformers_folder,
  towers as transformers_towers,
)


def load(
  path: str | os.PathLike[str],
  *,
  mean: Sequence[float] | None = None,
  std: Sequence[float] | None = None,
  flexify: tuple[Size, Size] | None = None,
  ema: bool = False,
  finite: bool = True,
  text: Fields | None = None,
  **fields: Any,
) -> tuple[TwoTowers, Params, Json]:
  """Returns (model, params, record) of a file or folder with two towers.

  These are: a run of the model `two_towers` and the `.npz` made of it; big_vision's `.npz` (LiT, SigLIP); folders of
  transformers: CLIP, SigLIP, SigLIP 2 of a fixed size; files of OpenAI's CLIP and OpenCLIP.

  Args:
    path, mean, std, flexify, ema, finite: as in `reading.load_with_record`.
    text: fields of the `TextTower` that arrays cannot tell, or that are to differ.
    **fields: likewise of the `FlexiViT`; `dtype` is that of both.

  Returns:
    A record as of `reading.load_with_record`; its "model" is that of both towers, and "text" describes the tokenizer,
    where there is one: without it texts cannot be encoded, and a note says so.

  Raises:
    UserError: see `reading.load_with_record`; no text tower, or one that a `TextTower` cannot be.
  """
  options: Json = dict(mean=mean, std=std, flexify=flexify, ema=ema, finite=finite)
  image, image_params, record = reading.load_with_record(path, **options, **fields)
  given = {name: fields[name] for name in ("gelu",) if name in fields}
  found = text_of(path, given | (text or {}))
  if found is None:
    raise errors.UserError(
      f"{path} has an image tower and no text tower; expected two towers: a run or .npz of the model two_towers,"
      " big_vision's .npz of two towers, a folder of transformers (CLIPModel, SiglipModel), or OpenCLIP's file."
    )
  tower = TextTower(**found.fields | (text or {}))
  _check(tower, found.params, path, finite)
  model = TwoTowers(
    image=_fields(image, layouts.FIELDS),
    text=_fields(tower, text_model.FIELDS),
    temperature=float(np.exp(-found.scalars["t"][0])),
    bias=float(found.scalars["b"][0]) if "b" in found.scalars else None,
    dtype=image.dtype,
  )
  params = {"image": image_params, "text": found.params, **found.scalars}
  tokenizer = found.tokenizer or record.get("text")
  notes = [note for note in record["notes"] if not _TEXT_LEFT_OUT.search(note)] + [*found.notes]
  notes += [] if tokenizer else [NO_TOKENIZER]
  record = record | {"model": model_records.record_of(model), "notes": notes}
  record |= {"text": tokenizer} if tokenizer else {}
  return model, jax.tree.map(jnp.asarray, params), record


NO_TOKENIZER = (
  "No tokenizer is with these weights: names, captions and queries cannot be encoded; tokens can. Give the tokenizer"
  " that the text tower was trained with."
)
# Notes that are about the image tower alone.
_TEXT_LEFT_OUT = re.compile(
  f"^{re.escape(model_records.IMAGE_ALONE)}$|^Left out: |of the text tower and of the loss"
)


def digest(model: Any, params: Params) -> str:
  """The digest of what images go through; of two towers that of images, which is loaded with its texts and without."""
  return trees.digest(params["image"] if isinstance(model, TwoTowers) else params)


def text_of(path: str | os.PathLike[str], fields: Fields | None = None) -> Text | None:
  """Returns what a file holds beside its image tower; None where it holds no text tower.

  Args:
    path: as in `load`.
    fields: those of the text tower that the caller gives; files that say nothing of them are read with these.

  Raises:
    UserError: a text tower that a `TextTower` cannot be.
  """
  file, _ = registry.find(path)
  if not file.exists():
    return None
  reader = next((read for recognises, read in _READERS if recognises(file)), None)
  return None if reader is None else reader(file, fields or {})


def _read_run(path: pathlib.Path, given: Fields) -> Text | None:
  from flexivit_jax.running import checkpoint  # Lazy: Orbax, a fifth of a second.

  params, record = checkpoint.load_params(path)
  return _recorded(path, params, record) if model_records.is_two_towers(record) else None


def _read_npz(path: pathlib.Path, given: Fields) -> Text | None:
  arrays, record = npz.read_npz(path)
  if not tower_names.has_text(arrays):
    return None
  params = tower_names.of_big_vision(arrays)
  if model_records.is_two_towers(record):
    return _recorded(path, params, record)
  fields = tower_names.text_fields(params["text"])
  scalars = {name: params[name] for name in tower_names.SCALARS if name in params}
  if "t" not in scalars:
    raise errors.UserError(f"{path} has no array t, the log of the scale of the products.")
  note = "The text is taken to be pooled at its last position, which the arrays do not say."
  return Text(params["text"], fields, scalars, notes=[note])


def _recorded(path: pathlib.Path, params: Params, record: Json) -> Text:
  tower = model_records.of_record(path, record).parts["text"]
  scalars = {name: np.asarray(params[name]) for name in tower_names.SCALARS if name in params}
  fields = _fields(tower, text_model.FIELDS)
  return Text(params["text"], fields, scalars, record.get("text"))


def _is_npz(path: pathlib.Path) -> bool:
  return path.suffix.lower() == ".npz" and zipfile.is_zipfile(path)


# The first that recognises a path reads it.
_Reader = Callable[[pathlib.Path, Fields], Text | None]
_READERS: tuple[tuple[Callable[[pathlib.Path], bool], _Reader], ...] = (
  (transformers_folder.is_folder, lambda path, given: transformers_towers.read(path)),
  (pathlib.Path.is_dir, _read_run),
  (_is_npz, _read_npz),
  (bare.has_reader, open_clip_text.read),
)


def _fields(module: Any, names: Sequence[str]) -> Fields:
  """All fields but the dtype, which is that of both towers."""
  return {name: getattr(module, name) for name in names if name != "dtype"}


def _check(tower: TextTower, params: Params, path: str | os.PathLike[str], finite: bool) -> None:
  """Raises a UserError that lists every array of a text tower that is missing, extra, or of another shape."""
  what = f"The text tower of {path}"
  if finite:
    reading.check_finite(params, what)
  tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
  expected = jax.eval_shape(tower.init, jax.random.key(0), tokens)["params"]
  if lines := trees.diff(expected, params, max_lines=10**6):
    raise errors.UserError(f"{what} does not fit its fields:\n  " + "\n  ".join(lines))
