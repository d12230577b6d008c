"""What files and folders with weights hold: told by their suffix, by what lies in a folder, by the names of arrays.

`FORMATS` lists what a path can be, `LAYOUTS` whose names arrays have; of each the first that recognises it reads.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

from flexivit_jax import errors, trees
from flexivit_jax.models import UNNAMED, FlexiViT
from flexivit_jax.trees import Arrays, Json, Params
from flexivit_jax.weights import (
  bare,
  big_vision,
  folders,
  npz,
  other_models,
  registry,
  stated,
  wrappers,
)
from flexivit_jax.weights.big_vision import Converted, Fields
from flexivit_jax.weights.open_clip import images as open_clip_images
from flexivit_jax.weights.timm import (
  folder as timm_folder,
  images as timm_images,
  names as timm_names,
)
from flexivit_jax.weights.transformers import (
  config as transformers_config,
  folder as transformers_folder,
  images as transformers_images,
  names as transformers_names,
)

POSITIONS = {"learn": "grid; the class token has none", "sincos2d": "sine-cosine"}
FIELDS = [f.name for f in dataclasses.fields(FlexiViT) if f.name not in UNNAMED]


class Weights(NamedTuple):
  """What a file or folder holds.

  Attributes:
    params: a tree of NumPy arrays by big_vision's names.
    fields: those of the FlexiViT that the arrays and the files beside them tell.
    record: see `reading.load_with_record`.
    normalisation: (mean, std) of the input, where a file beside the arrays states it; it is not folded in yet.
    takes_normalisation: the caller may give mean and std: the model was trained on pixels normalised with its own.
  """

  params: Params
  fields: Fields
  record: Json
  normalisation: tuple[Sequence[float], Sequence[float]] | None = None
  takes_normalisation: bool = False


class Format(NamedTuple):
  """What a path can be: `recognises(path)`; `read(path, fields, ema=..., ours=...)`.

  `read` gets the fields that the caller gives, whether it takes the EMA of the weights, and whether the folder that
  the path is, or lies in, has a manifest of ours.
  """

  name: str
  recognises: Callable[[pathlib.Path], bool]
  read: Callable[..., Weights]


class Layout(NamedTuple):
  """Whose names arrays have.

  `convert(arrays, fields)` gives big_vision's names and the fields of the FlexiViT. `one_size`: the model was trained
  on images of one size. `takes_normalisation`: see `Weights`.
  """

  name: str
  recognises: Callable[[Arrays], bool]
  convert: Callable[[Arrays, Fields], Converted]
  one_size: bool
  takes_normalisation: bool


LAYOUTS = (
  Layout("timm's names", timm_names.is_timm, timm_names.convert, True, True),
  Layout(
    "the original ViT's names",
    big_vision.is_original,
    big_vision.convert_original,
    True,
    False,
  ),
  Layout("big_vision's names", lambda arrays: True, big_vision.convert, False, False),
)


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


# --- what we wrote ---


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
  return _recorded(path, OWN_NPZ.name, trees.unflatten(big_vision.plain(arrays)), record)


def _recorded(path: pathlib.Path, format_: str, params: Params, record: Json) -> Weights:
  """Returns weights whose record says what model they are of."""
  fields = _fields_of_record(path, record)
  about = _describe(path, format_, FlexiViT(**fields))
  return Weights(
    params,
    fields,
    about | record | {"format": format_},
    takes_normalisation=_has_input(record),
  )


def _has_input(record: Json) -> bool:
  """Whether a record of ours is of weights whose project trains on pixels with a mean and std of their own."""
  return "input" in record or "folded_input" in record


def _fields_of_record(path: pathlib.Path, record: Json) -> Fields:
  """Returns the fields of the model in a record; one that lies in a file may hold anything.

  Raises:
    UserError: no fields, an unknown one, or a value of another type.
  """
  values = record.get("model")
  if not isinstance(values, dict):
    raise errors.UserError(f"{path}: its record does not say what model it is of.")
  values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if k != "name"}
  for name, value in values.items():
    if name not in FIELDS:
      raise errors.unknown(f"field of the record in {path}:", name, FIELDS)
    kind = tuple if name == "kernel_moment" else type(getattr(FlexiViT(), name))
    if value is not None and not isinstance(value, (int, float) if kind is float else kind):
      raise errors.UserError(f"{path}: its record has {name}={value!r}; expected {kind.__name__}.")
  return values


# --- files of others ---


def _read_file(path: pathlib.Path, fields: Fields, *, ema: bool, ours: bool) -> Weights:
  """Reads a file alone, or with what the config.json beside it says, where that is of the same model."""
  content, folder = bare.read(path, ema=ema), path.parent
  is_shard = transformers_folder.is_shard(path)
  try:
    config = timm_folder.find(folder)
    if config and timm_names.is_timm(content.arrays):
      is_own = ours and path.name == timm_folder.WEIGHTS[0]
      return _timm_file(path, content, config, fields, ours=is_own)
    of_transformers = not config and transformers_folder.is_folder(folder)
    if of_transformers and _in_words(content.arrays):
      return _transformers_file(path, content, fields, is_shard)
    reason = "the arrays of the file have other names." if config or of_transformers else ""
  except errors.UserError as e:
    # The file that the config is written for is not read as another model, unless its sizes say that it is one.
    standard = is_shard or path.name in timm_folder.WEIGHTS
    if standard and not isinstance(e, timm_folder.Misfit):
      raise
    reason = str(e)
  weights = _with_open_clip(_of_arrays(path, content, fields), folder)
  if reason:
    unused = f"The config.json beside {path.name} is not used: {reason}"
    weights.record["notes"].append(unused)
  return weights


def _of_arrays(path: pathlib.Path, content: bare.Content, fields: Fields) -> Weights:
  """Tells by their names whose arrays these are."""
  arrays = content.arrays
  if reason := other_models.layout(arrays):
    raise errors.UserError(f"{path}: {reason}")
  if reason := other_models.feature(arrays):
    raise errors.UserError(other_models.refusal(f"The model in {path}", reason))
  layout = next(layout for layout in LAYOUTS if layout.recognises(arrays))
  try:
    converted = layout.convert(arrays, fields)
  except errors.UserError as e:
    if not content.is_open_clip:
      raise
    problem = str(e).partition(" Did you mean")[0].rstrip(".")  # the nearest name would be timm's
    raise errors.UserError(
      f"{path}: OpenCLIP's image tower is incomplete, or no plain ViT, by its names in timm's form: {problem}. Give"
      " timm's folder of the model (vit_*_clip_*) or that of transformers (clip)."
    ) from e
  model = FlexiViT(**converted.fields | fields)
  record = _describe(path, f"{path.suffix[1:]} in {layout.name}", model, one_size=layout.one_size)
  record["notes"] = [*content.notes, *converted.notes]
  params = trees.unflatten(converted.flat)
  return Weights(params, converted.fields, record, takes_normalisation=layout.takes_normalisation)


def _with_open_clip(weights: Weights, folder: pathlib.Path) -> Weights:
  """Adds what an open_clip_config.json beside a file in timm's names (an OpenCLIP tower gets them) says."""
  if not weights.takes_normalisation or not (folder / open_clip_images.CONFIG).is_file():
    return weights
  record = weights.record
  h, w = record["image_size"]
  images = open_clip_images.read(folder, (h, w), _channels(weights))
  record = record | stated.keep(images.stated) | {"notes": [*record["notes"], *images.notes]}
  record["input"] = input_record(images.mean, images.std, images.stated.source)
  return weights._replace(
    fields=weights.fields | images.fields, record=record, normalisation=(images.mean, images.std)
  )


# --- timm ---


def _is_timm_folder(path: pathlib.Path) -> bool:
  return path.is_dir() and bool(timm_folder.find(path))


def _read_timm_folder(folder: pathlib.Path, fields: Fields, *, ema: bool, ours: bool) -> Weights:
  config = timm_folder.find(folder) or {}
  path = timm_folder.weights_file(folder)
  weights = _timm_file(path, bare.read(path, ema=ema), config, fields, ours=ours, whole=True)
  weights.record["notes"] += [] if ours else [folders.unknown(folder)]
  return weights


def _timm_file(
  path: pathlib.Path,
  content: bare.Content,
  config: Json,
  fields: Fields,
  *,
  ours: bool,
  whole: bool = False,
) -> Weights:
  """Weights with what timm's config says, and the rest of the fields where `save_timm` wrote them down.

  Args:
    path: the file in the folder.
    content: of the file.
    config: of the config.json.
    fields: those that the caller gives.
    ours: the folder has a record of ours.
    whole: the caller named the folder, not the file.
  """
  folder = path.parent
  where = f"{folder.resolve().name}/{timm_folder.CONFIG}"
  stated_fields = timm_folder.told(folder, config, content.arrays)
  weights = _of_arrays(path, content, {**stated_fields, **fields})
  timm_folder.check_fit(folder, stated_fields, weights.fields)
  record, channels = weights.record, _channels(weights)
  if whole:
    format_ = f"folder with {record['format']}"
    record |= {"format": format_, "source": {"file": folder.name, "format": format_}}
  if ours:
    own_record = timm_folder.read_json(folder / folders.RECORD)
    record = record | {"notes": []} | own_record | {"format": record["format"]}
    half = [0.5] * channels
    record["input"] = input_record(half, half, where)  # as it was written
    return Weights(
      weights.params,
      _fields_of_record(folder, own_record) | stated_fields,
      record,
      takes_normalisation=_has_input(own_record),
    )
  pretrained = timm_folder.pretrained_cfg(folder, config)
  h, w = record["image_size"]
  images = timm_images.read(where, config, pretrained, (h, w), channels)
  all_fields = weights.fields | stated_fields
  classes = FlexiViT(**all_fields).num_classes
  labels, label_notes = timm_images.labels(where, config, pretrained, classes)
  record |= stated.keep(images.stated) | labels
  record["input"] = input_record(images.mean, images.std, where)
  record["notes"] += [*images.notes, *label_notes]
  plain = {*images.mean, *images.std} == {0.5}
  normalisation = None if plain else (images.mean, images.std)
  return weights._replace(fields=all_fields, record=record, normalisation=normalisation)


# --- transformers ---


def _read_transformers_folder(
  path: pathlib.Path, fields: Fields, *, ema: bool, ours: bool
) -> Weights:
  transformers_config.spec(transformers_folder.read_config(path))  # before what may be large
  arrays, notes = wrappers.unwrap(transformers_folder.read_arrays(path), ema=ema)
  weights = _transformers(path, arrays, fields)
  weights.record["notes"][:0] = notes
  weights.record["notes"] += [] if ours else [folders.unknown(path)]
  return weights


def _transformers_file(
  path: pathlib.Path, content: bare.Content, fields: Fields, is_shard: bool
) -> Weights:
  """Reads a file with the config.json of transformers beside it; of a shard, all shards."""
  arrays, notes = content.arrays, content.notes
  if is_shard:
    arrays, notes = wrappers.unwrap(transformers_folder.read_arrays(path.parent))
  weights = _transformers(path.parent, arrays, fields)
  note = f"{path.name} is read with {path.parent.resolve().name}/config.json."
  record = weights.record | {"notes": [*notes, *weights.record["notes"], note]}
  return weights._replace(record=record)


def _transformers(path: pathlib.Path, arrays: Arrays, fields: Fields) -> Weights:
  """Arrays with what a folder of Hugging Face's transformers says of them."""
  config = transformers_folder.read_config(path)
  spec = transformers_config.spec(config)
  arrays, notes = wrappers.without_other_base(arrays, spec.family.base)
  converted = transformers_names.convert(spec, arrays)
  model = FlexiViT(**converted.fields | fields)
  format_ = f"transformers folder, {config['model_type']}"
  record = _describe(path.resolve(), format_, model, one_size=True)
  names, name_notes = transformers_config.class_names(config, model.num_classes)
  record |= {} if names is None else {"class_names": names}
  images = transformers_images.read(path, config["model_type"], spec.image_size, spec.channels)
  record["notes"] = [*notes, *converted.notes, *name_notes, *images.notes]
  record |= {} if images.stated is None else stated.keep(images.stated)
  if images.normalisation is not None:
    record["input"] = input_record(*images.normalisation, images.where)
  params = trees.unflatten(converted.flat)
  return Weights(params, converted.fields, record, images.normalisation, takes_normalisation=True)


def _in_words(arrays: Arrays) -> bool:
  """Whether the names may be those of transformers: big_vision's and the original ViT's have slashes."""
  return not timm_names.is_timm(arrays) and not any("/" in name for name in arrays)


# --- records ---


def input_record(mean: Sequence[float], std: Sequence[float], where: str) -> Json:
  """Returns what a record says of the input: with which mean and std, and what says so."""
  return {"mean": list(mean), "std": list(std), "from": where}


def _channels(weights: Weights) -> int:
  return weights.params["embedding"]["kernel"].shape[2]


def _describe(path: pathlib.Path, format_: str, model: FlexiViT, *, one_size: bool = False) -> Json:
  sides = zip(model.patch_size, model.posemb_size, strict=True)
  return {
    "format": format_,
    "source": {"file": path.name, "format": format_},
    "position": POSITIONS[model.posemb],
    "image_size": [patch * cells for patch, cells in sides] if one_size else None,
    "native_patch_size": list(model.patch_size),
    "native_grid": list(model.posemb_size),
    "notes": [],
  }


CHECKPOINT = Format("checkpoint of a run", pathlib.Path.is_dir, _read_checkpoint)
OWN_NPZ = Format("npz in big_vision's names, written by flexivit", npz.has_record, _read_own_npz)
# A run has a config.json too, so the folders of others come first; they have no checkpoints/.
FORMATS = (
  Format("folder of timm", _is_timm_folder, _read_timm_folder),
  Format("folder of transformers", transformers_folder.is_folder, _read_transformers_folder),
  CHECKPOINT,
  OWN_NPZ,
  Format("file with arrays", bare.has_reader, _read_file),
)
