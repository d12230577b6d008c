"""What files and folders with weights hold: told by their names and by what is in them."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from flexivit_jax import errors, trees
from flexivit_jax.models import UNNAMED, FlexiViT
from flexivit_jax.trees import Arrays
from flexivit_jax.weights import (
  bare,
  big_vision,
  folders,
  other_models,
  registry,
  stated,
  torch_layout,
  wrappers,
)
from flexivit_jax.weights.open_clip import images as open_clip_images, names as open_clip_names
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
CHECKPOINT = "checkpoint of a run"


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


_KNOWN = f"expected a run folder, a file ({bare.suffixes()}), or a folder of timm or transformers"


def read(path: pathlib.Path, fields: Mapping[str, Any], *, ema: bool = False) -> Source:
  """Reads a file or folder in any format; nothing is checked against a model yet.

  Args:
    path: the file or folder.
    fields: of the model, as the caller gives them.
    ema: of a file that has raw weights and their EMA, take the EMA.

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
    return _timm_folder(path, config, fields, ours, ema=ema)
  if path.is_dir() and transformers_folder.is_folder(path):
    return _transformers_folder(path, fields, ours, ema=ema)
  if path.is_dir() and ema:
    raise errors.UserError(f"{path} is a run, which has one set of weights; leave --ema out.")
  if path.is_dir():
    from flexivit_jax.running import checkpoint  # Lazy: Orbax, a fifth of a second.

    params, record = checkpoint.load_params(path)
    format_ = CHECKPOINT
  elif path.suffix.lower() in bare.READERS:
    arrays, record = bare.read(path, ema=ema)
    if not record.keys() - {"notes"}:
      return _file(path, arrays, fields, record.get("notes", []), ours)
    params, format_ = _plain(arrays), "npz in big_vision's names, written by flexivit"
  else:
    raise errors.UserError(f"{path}: {_KNOWN}.")
  found = _known_fields(path, record)
  return Source(
    params, found, _describe(path, format_, FlexiViT(**found)) | record | {"format": format_}
  )


def _recognise(
  path: pathlib.Path, arrays: Arrays, fields: Mapping[str, Any], notes: Sequence[str] = ()
) -> Source:
  """Tells by their names whose arrays these are."""
  kind, fixed, notes = path.suffix[1:], True, list(notes)
  if reason := other_models.layout(arrays):
    raise errors.UserError(f"{path}: {reason}")
  if reason := other_models.feature(arrays):
    raise errors.UserError(other_models.refusal(f"The model in {path}", reason))
  if timm_names.is_timm(arrays):
    flat, found, more = _from_timm(path, arrays, fields, notes)
    notes += more
    params, format_ = trees.unflatten(flat), f"{kind} in timm's names"
  elif big_vision.ORIGINAL_POSITION in arrays:
    arrays, more = big_vision.without_pre_logits(arrays)
    notes += more
    params = trees.unflatten(big_vision.from_original(arrays, fields.get("posemb_size")))
    found, format_ = big_vision.infer_fields(params, fields), f"{kind} in the original ViT's names"
  else:
    params, fixed = _plain(arrays), False
    found, format_ = big_vision.infer_fields(params, fields), f"{kind} in big_vision's names"
  if "posemb_size" in found and "posemb_size" not in fields and not timm_names.is_timm(arrays):
    notes += big_vision.assumed_square(found["posemb_size"])
    position = arrays.get(big_vision.ORIGINAL_POSITION)
    if position is not None and "cls" in arrays and position.shape == params["pos_embedding"].shape:
      notes += big_vision.assumed_bare(found["posemb_size"])
  record = _describe(path, format_, FlexiViT(**{**found, **fields})) | {"notes": notes}
  if fixed:
    sides = zip(record["native_patch_size"], record["native_grid"], strict=True)
    record["image_size"] = [patch * cells for patch, cells in sides]
  return Source(params, found, record)


def _from_timm(
  path: pathlib.Path, arrays: Arrays, fields: Mapping[str, Any], notes: Sequence[str]
) -> torch_layout.Converted:
  try:
    return timm_names.convert(arrays, fields)
  except errors.UserError as e:
    if open_clip_names.NOTE not in notes:
      raise
    problem = str(e).partition(" Did you mean")[0].rstrip(".")  # the nearest name would be timm's
    raise errors.UserError(
      f"{path}: OpenCLIP's image tower is incomplete, or no plain ViT, by its names in timm's form: {problem}. Give"
      " timm's folder of the model (vit_*_clip_*) or that of transformers (clip)."
    ) from e


def _file(
  path: pathlib.Path,
  arrays: Arrays,
  fields: Mapping[str, Any],
  notes: Sequence[str],
  ours: bool,
) -> Source:
  """A file alone, or with what the config.json beside it says, where that is of the same model."""
  folder = path.parent
  shard = transformers_folder.is_shard(path)
  try:
    config = timm_folder.find(folder)
    if config and timm_names.is_timm(arrays):
      own = ours and path.name == timm_folder.WEIGHTS[0]
      return _timm_file(path, arrays, config, fields, notes, ours=own)
    others = transformers_folder.is_folder(folder) if not config else False
    if others and _in_words(arrays):
      whole, unwrapping = arrays, list(notes)
      if shard:
        whole, unwrapping = wrappers.unwrap(transformers_folder.read_arrays(folder))
      source = _transformers(folder, whole, fields)
      more = f"{path.name} is read with {folder.resolve().name}/config.json."
      record = source.record | {"notes": [*unwrapping, *source.record["notes"], more]}
      return source._replace(record=record)
    reason = "the arrays of the file have other names." if config or others else ""
  except errors.UserError as e:
    # The file that the config is written for is not read as another model, unless its sizes say that it is one.
    standard = shard or path.name in timm_folder.WEIGHTS
    if standard and not isinstance(e, timm_folder.Misfit):
      raise
    reason = str(e)
  source = _with_open_clip(_recognise(path, arrays, fields, notes), folder)
  if reason:
    unused = f"The config.json beside {path.name} is not used: {reason}"
    source.record["notes"].append(unused)
  return source


def _in_words(arrays: Arrays) -> bool:
  """Whether the names may be those of transformers: big_vision's and the original ViT's have slashes."""
  return not timm_names.is_timm(arrays) and not any("/" in name for name in arrays)


def _with_open_clip(source: Source, folder: pathlib.Path) -> Source:
  """Adds what an open_clip_config.json beside a file in timm's names (an OpenCLIP tower gets them) says."""
  record = source.record
  if "timm" not in record["format"] or not (folder / open_clip_images.CONFIG).is_file():
    return source
  h, w = record["image_size"]
  images = open_clip_images.read(folder, (h, w), source.params["embedding"]["kernel"].shape[2])
  record = record | stated.keep(images.stated) | {"notes": [*record["notes"], *images.notes]}
  record["input"] = _input(images.mean, images.std, images.stated.source)
  return Source(source.params, source.fields | images.fields, record, (images.mean, images.std))


def _transformers(path: pathlib.Path, arrays: Arrays, fields: Mapping[str, Any]) -> Source:
  """Arrays with what a folder of Hugging Face's transformers says of them."""
  config = transformers_folder.read_config(path)
  spec = transformers_config.spec(config)
  arrays, notes = wrappers.without_other_base(arrays, spec.family.base)
  flat, found, more = transformers_names.convert(spec, arrays)
  notes += more
  model = FlexiViT(**{**found, **fields})
  record = _describe(path.resolve(), f"transformers folder, {config['model_type']}", model)
  sides = zip(record["native_patch_size"], record["native_grid"], strict=True)
  record["image_size"] = [patch * cells for patch, cells in sides]
  names, more = transformers_config.class_names(config, model.num_classes)
  record |= {} if names is None else {"class_names": names}
  images = transformers_images.read(path, config["model_type"], spec.image_size, spec.channels)
  record["notes"] = [*notes, *more, *images.notes]
  record |= {} if images.stated is None else stated.keep(images.stated)
  if images.normalisation is not None:
    record["input"] = _input(*images.normalisation, images.where)
  return Source(trees.unflatten(flat), found, record, images.normalisation)


def _transformers_folder(
  path: pathlib.Path, fields: Mapping[str, Any], ours: bool, *, ema: bool
) -> Source:
  transformers_config.spec(transformers_folder.read_config(path))  # before what may be large
  arrays, notes = wrappers.unwrap(transformers_folder.read_arrays(path), ema=ema)
  source = _transformers(path, arrays, fields)
  source.record["notes"][:0] = notes
  source.record["notes"] += [] if ours else [folders.unknown(path)]
  return source


def _timm_file(
  path: pathlib.Path,
  arrays: Arrays,
  config: Mapping[str, Any],
  fields: Mapping[str, Any],
  notes: Sequence[str],
  *,
  ours: bool,
  whole: bool = False,
) -> Source:
  """Weights with what timm's config says, and the rest of the fields where `save_timm` wrote them down.

  Args:
    path: the file in the folder.
    arrays, config, fields, notes: what is in it, and in the config.json; what the caller says.
    ours: the folder has a record of ours.
    whole: it was the folder that was named, not the file.
  """
  folder = path.parent
  where = f"{folder.resolve().name}/{timm_folder.CONFIG}"
  told = timm_folder.told(folder, config, arrays)
  source = _recognise(path, arrays, {**told, **fields}, notes)
  timm_folder.check_fit(folder, told, source.fields)
  found = source.fields | told
  if whole:
    format_ = f"folder with {source.record['format']}"
    about = {"format": format_, "source": {"file": folder.name, "format": format_}}
    source = source._replace(record=source.record | about)
  if ours:
    own = timm_folder.read_json(folder / folders.RECORD)
    record = source.record | {"notes": []} | own | {"format": source.record["format"]}
    half = [0.5] * source.params["embedding"]["kernel"].shape[2]
    record["input"] = _input(half, half, where)  # as it was written
    return Source(source.params, _known_fields(folder, own) | told, record)
  pretrained = timm_folder.pretrained_cfg(folder, config)
  h, w = source.record["image_size"]
  channels = source.params["embedding"]["kernel"].shape[2]
  images = timm_images.read(where, config, pretrained, (h, w), channels)
  labels, more = timm_images.labels(where, config, pretrained, FlexiViT(**found).num_classes)
  record = source.record | stated.keep(images.stated) | labels
  record["input"] = _input(images.mean, images.std, where)
  record["notes"] += [*images.notes, *more]
  plain = {*images.mean, *images.std} == {0.5}
  return Source(source.params, found, record, None if plain else (images.mean, images.std))


def _timm_folder(
  folder: pathlib.Path,
  config: Mapping[str, Any],
  fields: Mapping[str, Any],
  ours: bool,
  *,
  ema: bool,
) -> Source:
  path = timm_folder.weights_file(folder)
  arrays, inside = bare.read(path, ema=ema)
  notes = inside.get("notes", [])
  source = _timm_file(path, arrays, config, fields, notes, ours=ours, whole=True)
  source.record["notes"] += [] if ours else [folders.unknown(folder)]
  return source


def _input(mean: Sequence[float], std: Sequence[float], where: str) -> dict[str, Any]:
  """What a record says of the input: with which mean and std, and which file says it."""
  return {"mean": list(mean), "std": list(std), "from": where}


def _plain(arrays: Arrays) -> dict:
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
