"""What files and folders with weights hold: told by their names and by what is in them."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from flexivit_jax import checkpoint, errors, trees
from flexivit_jax.models import FlexiViT
from flexivit_jax.models.flexivit import UNNAMED
from flexivit_jax.weights import (
  big_vision,
  files,
  folders,
  foreign,
  registry,
  timm_folder,
  timm_names,
  transformers_config,
  transformers_folder,
  transformers_names,
)

POSITIONS = {"learn": "grid; the class token has none", "sincos2d": "sine-cosine"}
CHECKPOINT = "checkpoint of a run"
READERS = files.READERS | dict.fromkeys((".pth", ".pt", ".bin"), foreign.read_torch)


class Source(NamedTuple):
  """What a file holds: parameters (a tree of NumPy arrays), the fields of their FlexiViT, and the record.

  `normalisation` is that of the input, where something beside the arrays says it; it is not yet folded in.
  """

  params: dict
  fields: dict[str, Any]
  record: dict[str, Any]
  normalised: tuple[Sequence[float], Sequence[float]] | None = (
    None  # (mean, std), where it says them
  )


_KNOWN = (
  "expected a run folder, an .npz, .safetensors or .pth file, or a folder of timm or transformers"
)


def read(path: pathlib.Path, fields: Mapping[str, Any]) -> Source:
  """Reads a file or folder in any format; nothing is checked against a model yet.

  Raises:
    UserError: it is not there, or in no known format.
    Damaged: it is, or lies in, a folder that we wrote, whose files are not what was written.
  """
  if not path.exists():
    raise errors.UserError(
      f"{path} does not exist; {_KNOWN}, or a name that `flexivit inspect --list` prints."
      + errors.nearest(str(path), registry.PUBLISHED)
    )
  ours = folders.check(path if path.is_dir() else path.parent)
  if path.is_dir() and (config := timm_folder.find(path)):
    return _read_timm_folder(path, config, fields, ours)
  if path.is_dir() and transformers_folder.is_folder(path):
    return _transformers(path, fields, ours)
  if path.is_dir():
    params, record = checkpoint.load_params(path)
    format_ = CHECKPOINT
  elif path.suffix in READERS:
    arrays, record = READERS[path.suffix](path)
    if not record.keys() - {"notes"}:
      return _recognise(path, arrays, fields, record.get("notes", []))
    params, format_ = _plain(arrays), "npz in big_vision's names, written by flexivit"
  else:
    raise errors.UserError(f"{path}: {_KNOWN}.")
  found = _known_fields(path, record)
  return Source(
    params, found, _describe(path, format_, FlexiViT(**found)) | record | {"format": format_}
  )


def _recognise(
  path: pathlib.Path, arrays: files.Arrays, fields: Mapping[str, Any], notes: Sequence[str] = ()
) -> Source:
  """Tells by their names whose arrays these are."""
  kind, fixed, notes = path.suffix[1:], True, list(notes)
  if timm_names.is_timm(arrays):
    flat, found, more = timm_names.convert(arrays, fields)
    notes += more
    params, format_ = trees.unflatten(flat), f"{kind} in timm's names"
  elif big_vision.ORIGINAL_POSITION in arrays:
    params = trees.unflatten(big_vision.from_original(arrays, fields.get("posemb_size")))
    found, format_ = big_vision.infer_fields(params, fields), f"{kind} in the original ViT's names"
  elif path.suffix == ".safetensors" and transformers_folder.is_folder(path.parent):
    raise errors.UserError(
      f"{path} is one file of a folder of transformers, whose config.json says what model it is;"
      f" give the folder, {path.parent}."
    )
  else:
    params, fixed = _plain(arrays), False
    found, format_ = big_vision.infer_fields(params, fields), f"{kind} in big_vision's names"
  record = _describe(path, format_, FlexiViT(**{**found, **fields})) | {"notes": notes}
  if fixed:
    sides = zip(record["native_patch_size"], record["native_grid"], strict=True)
    record["image_size"] = [patch * cells for patch, cells in sides]
  return Source(params, found, record)


def _transformers(path: pathlib.Path, fields: Mapping[str, Any], ours: bool) -> Source:
  """A folder of Hugging Face's transformers."""
  config = transformers_folder.read_config(path)
  spec = transformers_config.spec(config)  # before the arrays: those of another model may be large
  normalisation = transformers_folder.read_normalisation(path)
  flat, found, notes = transformers_names.convert(spec, transformers_folder.read_arrays(path))
  model = FlexiViT(**{**found, **fields})
  record = _describe(path.resolve(), f"transformers folder, {config['model_type']}", model)
  if normalisation is None:
    notes.append(
      "No preprocessor_config.json says the input's mean and std; unless they are given (mean, std"
      " or --mean, --std), pixels are taken to be in [-1, 1]."
    )
  sides = zip(record["native_patch_size"], record["native_grid"], strict=True)
  notes += [] if ours else [folders.unknown(path)]
  record |= {"notes": notes, "image_size": [patch * cells for patch, cells in sides]}
  if names := transformers_config.class_names(config, model.num_classes):
    record["class_names"] = names
  return Source(trees.unflatten(flat), found, record, normalisation)


def _read_timm_folder(
  folder: pathlib.Path, config: Mapping[str, Any], fields: Mapping[str, Any], ours: bool
) -> Source:
  """The weights with what the config says, and the rest of the fields where `save_timm` wrote them down."""
  path = timm_folder.weights_file(folder)
  arrays, inside = READERS[path.suffix](path)
  told = timm_folder.told(folder, config, arrays)
  source = _recognise(path, arrays, {**told.fields, **fields}, inside.get("notes", []))
  format_ = f"folder with {source.record['format']}"
  record = source.record | {"format": format_, "source": {"file": folder.name, "format": format_}}
  if ours:
    own = timm_folder.read_json(folder / folders.RECORD)
    found = _known_fields(folder, own) | told.fields
    return Source(source.params, found, record | {"notes": []} | own | {"format": format_})
  record["notes"] += [folders.unknown(folder)]
  return Source(source.params, source.fields | told.fields, record, told.normalised)


def _plain(arrays: files.Arrays) -> dict:
  """Tree of arrays named "params/head/bias" or "head/bias"."""
  prefixed = {n.removeprefix("params/"): a for n, a in arrays.items() if n.startswith("params/")}
  return trees.unflatten(prefixed or arrays)


def _describe(path: pathlib.Path, format_: str, model: FlexiViT) -> dict[str, Any]:
  return {
    "format": format_,
    "source": {"file": path.name, "format": format_},
    "position": POSITIONS[model.posemb],
    "image_size": None,
    "native_patch_size": list(model.patch_size),
    "native_grid": list(model.posemb_size),
    "notes": [],
  }


def _known_fields(path: pathlib.Path, record: dict[str, Any]) -> dict[str, Any]:
  """Fields of the model in a record; one from a file may hold anything."""
  given = record.get("model")
  if not isinstance(given, dict):
    raise errors.UserError(f"{path}: its record does not say what model it is of.")
  given = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items() if k != "name"}
  for name, value in given.items():
    if name not in FIELDS:
      raise errors.unknown(f"field of the record in {path}:", name, FIELDS)
    kind = tuple if name == "kernel_moment" else type(getattr(FlexiViT(), name))
    if value is not None and not isinstance(value, (int, float) if kind is float else kind):
      raise errors.UserError(f"{path}: its record has {name}={value!r}; expected {kind.__name__}.")
  return given


FIELDS = [f.name for f in dataclasses.fields(FlexiViT) if f.name not in UNNAMED]
