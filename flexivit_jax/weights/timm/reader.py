"""Weights of timm, with the config.json that says what arrays do not tell."""

import pathlib

from flexivit_jax.models import FlexiViT
from flexivit_jax.trees import Json
from flexivit_jax.weights import bare, folders, layouts, stated
from flexivit_jax.weights.big_vision import Fields
from flexivit_jax.weights.layouts import Weights
from flexivit_jax.weights.timm import folder as timm_folder, images as timm_images


def is_folder(path: pathlib.Path) -> bool:
  """Tells whether a path is a folder that timm wrote for the Hub; raises a UserError for a broken config.json."""
  return path.is_dir() and bool(timm_folder.find(path))


def read_folder(folder: pathlib.Path, fields: Fields, *, ema: bool, ours: bool) -> Weights:
  """Reads a folder that timm or `save_timm` wrote; arguments as in `formats.Format`.

  Raises:
    UserError: no weights, or a config.json of another model or of one that no FlexiViT can be.
  """
  config = timm_folder.find(folder) or {}
  path = timm_folder.weights_file(folder)
  weights = read_file(path, bare.read(path, ema=ema), config, fields, ours=ours, whole=True)
  weights.record["notes"] += [] if ours else [folders.unknown(folder)]
  return weights


def read_file(
  path: pathlib.Path,
  content: bare.Content,
  config: Json,
  fields: Fields,
  *,
  ours: bool,
  whole: bool = False,
) -> Weights:
  """Reads arrays with what timm's config says, and the rest of the fields where `save_timm` wrote them down.

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
  weights = layouts.of_arrays(path, content, {**stated_fields, **fields})
  timm_folder.check_fit(folder, stated_fields, weights.fields)
  record, channels = weights.record, weights.params["embedding"]["kernel"].shape[2]
  if whole:
    format_ = f"folder with {record['format']}"
    record |= {"format": format_, "source": {"file": folder.name, "format": format_}}
  if ours:
    own_record = timm_folder.read_json(folder / folders.RECORD)
    record = record | {"notes": []} | own_record | {"format": record["format"]}
    half = [0.5] * channels
    record["input"] = layouts.input_record(half, half, where)  # as it was written
    return Weights(
      weights.params,
      layouts.fields_of_record(folder, own_record) | stated_fields,
      record,
      takes_normalisation=layouts.has_input(own_record),
    )
  pretrained = timm_folder.pretrained_cfg(folder, config)
  h, w = record["image_size"]
  images = timm_images.read(where, config, pretrained, (h, w), channels)
  all_fields = weights.fields | stated_fields
  classes = FlexiViT(**all_fields).num_classes
  labels, label_notes = timm_images.labels(where, config, pretrained, classes)
  record |= stated.keep(images.stated) | labels
  record["input"] = layouts.input_record(images.mean, images.std, where)
  record["notes"] += [*images.notes, *label_notes]
  plain = {*images.mean, *images.std} == {0.5}
  normalisation = None if plain else (images.mean, images.std)
  return weights._replace(fields=all_fields, record=record, normalisation=normalisation)
