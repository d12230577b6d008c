"""What a path with weights is: a table of formats, told by suffix and by what lies in a folder.

`FORMATS` lists them; the first that recognises a path reads it.
"""

import pathlib
from collections.abc import Callable
from typing import NamedTuple

from flexivit_jax import errors, trees
from flexivit_jax.models import MODELS, FlexiViT, vit_part
from flexivit_jax.trees import Arrays, Json, Params
from flexivit_jax.weights import (
  bare,
  big_vision,
  folders,
  layouts,
  model_records,
  npz,
  registry,
  stated,
  tower_names,
)
from flexivit_jax.weights.big_vision import Fields
from flexivit_jax.weights.layouts import Weights
from flexivit_jax.weights.open_clip import images as open_clip_images
from flexivit_jax.weights.timm import (
  folder as timm_folder,
  names as timm_names,
  reader as timm_reader,
)
from flexivit_jax.weights.transformers import (
  folder as transformers_folder,
  reader as transformers_reader,
)


class Format(NamedTuple):
  """What a path can be: `recognises(path)`; `read(path, fields, ema=..., ours=...)`.

  `read` gets the fields that the caller gives, whether it takes the EMA of the weights, and whether the folder that
  the path is, or lies in, has a manifest of ours.
  """

  name: str
  recognises: Callable[[pathlib.Path], bool]
  read: Callable[..., Weights]


def read(path: pathlib.Path, fields: Fields, *, ema: bool = False) -> Weights:
  """Reads a file or folder in any format; compares nothing with a model yet.

  Args:
    path: the file or folder.
    fields: those of the model that the caller gives.
    ema: of a file that has raw weights and their EMA, take the EMA.

  Raises:
    UserError: the path does not exist, or is in no known format.
    Damaged: the path is, or lies in, a folder that we wrote, and its files are not what we wrote.
  """
  expected = (
    f"expected a run folder, a file ({bare.suffixes()}), or a folder of timm or transformers"
  )
  if not path.exists():
    raise errors.UserError(
      f"{path} does not exist; {expected}, or a name that `flexivit inspect --list` prints."
      + errors.nearest(str(path), registry.PUBLISHED)
    )
  ours = folders.check(path if path.is_dir() else path.parent)
  for format_ in FORMATS:
    if format_.recognises(path):
      return format_.read(path, fields, ema=ema, ours=ours)
  raise errors.UserError(f"{path}: {expected}.")


def _read_checkpoint(path: pathlib.Path, fields: Fields, *, ema: bool, ours: bool) -> Weights:
  from flexivit_jax.running import checkpoint  # Lazy: Orbax, a fifth of a second.

  if ema:
    raise errors.UserError(f"{path} is a run, which has one set of weights; leave --ema out.")
  params, record = checkpoint.load_params(path)
  return _recorded(path, CHECKPOINT.name, params, record)


def _read_own_npz(path: pathlib.Path, fields: Fields, *, ema: bool, ours: bool) -> Weights:
  if ema:
    raise errors.UserError(
      f"{path} was written by flexivit and has one set of weights; leave --ema out."
    )
  arrays, record = npz.read_npz(path)
  both = model_records.is_two_towers(record)
  params = tower_names.of_big_vision(arrays) if both else trees.unflatten(big_vision.plain(arrays))
  return _recorded(path, OWN_NPZ.name, params, record)


def _recorded(path: pathlib.Path, format_: str, params: Params, record: Json) -> Weights:
  """Returns weights whose record says what model they are of; of a model of parts, its FlexiViT."""
  name = model_records.name_of(record)
  if (part := vit_part(MODELS[name])) is not None:
    vit = model_records.of_record(path, record).parts[part]
    fields = {name: getattr(vit, name) for name in layouts.FIELDS}
    params = params[part]
    record = record | ({"projection": True} if vit.num_classes else {})
    # Its output is an embedding: classes, if the data have any, are not the head's.
    record = {k: v for k, v in record.items() if k not in ("class_names", "data_classes")}
    record["notes"] = [*record.get("notes", []), model_records.left_out(name)]
  else:
    fields = layouts.fields_of_record(path, record)
  about = layouts.describe(path, format_, FlexiViT(**fields))
  return Weights(
    params,
    fields,
    about | record | {"format": format_},
    takes_normalisation=layouts.has_input(record),
  )


def _read_file(path: pathlib.Path, fields: Fields, *, ema: bool, ours: bool) -> Weights:
  """Reads a file alone, or with what the config.json beside it says, where that is of the same model."""
  content, folder = bare.read(path, ema=ema), path.parent
  is_shard = transformers_folder.is_shard(path)
  try:
    config = timm_folder.find(folder)
    if config and timm_names.is_timm(content.arrays):
      is_own = ours and path.name == timm_folder.WEIGHTS[0]
      return timm_reader.read_file(path, content, config, fields, ours=is_own)
    of_transformers = not config and transformers_folder.is_folder(folder)
    if of_transformers and _in_words(content.arrays):
      return transformers_reader.read_file(path, content, fields, is_shard)
    reason = "the arrays of the file have other names." if config or of_transformers else ""
  except errors.UserError as e:
    # The file that the config is written for is not read as another model, unless its sizes say that it is one.
    standard = is_shard or path.name in timm_folder.WEIGHTS
    if standard and not isinstance(e, timm_folder.Misfit):
      raise
    reason = str(e)
  weights = _with_open_clip(layouts.of_arrays(path, content, fields), folder)
  if reason:
    unused = f"The config.json beside {path.name} is not used: {reason}"
    weights.record["notes"].append(unused)
  return weights


def _with_open_clip(weights: Weights, folder: pathlib.Path) -> Weights:
  """Adds what an open_clip_config.json beside a file in timm's names (an OpenCLIP tower gets them) says."""
  if not weights.takes_normalisation or not (folder / open_clip_images.CONFIG).is_file():
    return weights
  record = weights.record
  (h, w), channels = record["image_size"], weights.params["embedding"]["kernel"].shape[2]
  images = open_clip_images.read(folder, (h, w), channels)
  record = record | stated.keep(images.stated) | {"notes": [*record["notes"], *images.notes]}
  record["input"] = layouts.input_record(images.mean, images.std, images.stated.source)
  return weights._replace(
    fields=weights.fields | images.fields, record=record, normalisation=(images.mean, images.std)
  )


def _in_words(arrays: Arrays) -> bool:
  """Whether the names may be those of transformers: big_vision's and the original ViT's have slashes."""
  return not timm_names.is_timm(arrays) and not any("/" in name for name in arrays)


CHECKPOINT = Format("checkpoint of a run", pathlib.Path.is_dir, _read_checkpoint)
OWN_NPZ = Format("npz in big_vision's names, written by flexivit", npz.has_record, _read_own_npz)
# A run has a config.json too, so the folders of others come first; they have no checkpoints/.
FORMATS = (
  Format("folder of timm", timm_reader.is_folder, timm_reader.read_folder),
  Format("folder of transformers", transformers_folder.is_folder, transformers_reader.read_folder),
  CHECKPOINT,
  OWN_NPZ,
  Format("file with arrays", bare.has_reader, _read_file),
)
