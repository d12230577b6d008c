"""Weights of Hugging Face's `transformers`, with the config.json that says what model they are of."""

import pathlib

from flexivit_jax import trees
from flexivit_jax.models import FlexiViT
from flexivit_jax.trees import Arrays
from flexivit_jax.weights import bare, folders, layouts, stated, wrappers
from flexivit_jax.weights.big_vision import Fields
from flexivit_jax.weights.layouts import Weights
from flexivit_jax.weights.transformers import (
  config as transformers_config,
  folder as transformers_folder,
  images as transformers_images,
  names as transformers_names,
)
from flexivit_jax.weights.transformers.families import PROJECTION


def read_folder(path: pathlib.Path, fields: Fields, *, ema: bool, ours: bool) -> Weights:
  """Reads a folder that `save_pretrained` wrote; arguments as in `formats.Format`.

  Raises:
    UserError: files that are missing or broken, a model that no FlexiViT can be, arrays that do not fit config.json.
  """
  transformers_config.spec(transformers_folder.read_config(path))  # before what may be large
  arrays, notes = wrappers.unwrap(transformers_folder.read_arrays(path), ema=ema)
  weights = _read(path, arrays, fields)
  weights.record["notes"][:0] = notes
  weights.record["notes"] += [] if ours else [folders.unknown(path)]
  return weights


def read_file(path: pathlib.Path, content: bare.Content, fields: Fields, is_shard: bool) -> Weights:
  """Reads a file with the config.json of transformers beside it; of a shard, all shards."""
  arrays, notes = content.arrays, content.notes
  if is_shard:
    arrays, notes = wrappers.unwrap(transformers_folder.read_arrays(path.parent))
  weights = _read(path.parent, arrays, fields)
  note = f"{path.name} is read with {path.parent.resolve().name}/config.json."
  record = weights.record | {"notes": [*notes, *weights.record["notes"], note]}
  return weights._replace(record=record)


def _read(path: pathlib.Path, arrays: Arrays, fields: Fields) -> Weights:
  """Returns arrays as weights, with what the config.json and the image processor of a folder say of them."""
  config = transformers_folder.read_config(path)
  spec = transformers_config.spec(config)
  arrays, notes = wrappers.without_other_base(arrays, spec.family.base)
  converted = transformers_names.convert(spec, arrays)
  model = FlexiViT(**converted.fields | fields)
  format_ = f"transformers folder, {config['model_type']}"
  record = layouts.describe(path.resolve(), format_, model, one_size=True)
  names, name_notes = transformers_config.class_names(config, model.num_classes)
  record |= {} if names is None else {"class_names": names}
  record |= {"projection": True} if spec.head.dense == PROJECTION else {}
  images = transformers_images.read(path, config["model_type"], spec.image_size, spec.channels)
  record["notes"] = [*notes, *converted.notes, *name_notes, *images.notes]
  record |= {} if images.stated is None else stated.keep(images.stated)
  if images.normalisation is not None:
    record["input"] = layouts.input_record(*images.normalisation, images.where)
  params = trees.unflatten(converted.flat)
  return Weights(params, converted.fields, record, images.normalisation, takes_normalisation=True)
