"""OWL-ViT and OWLv2 of `transformers`: what a folder holds beside the image tower, and of what `OwlViT` it is."""

import pathlib
from typing import NamedTuple

from flexivit_jax import errors, trees
from flexivit_jax.models import text as text_model
from flexivit_jax.trees import Arrays, Json, Params
from flexivit_jax.weights import bare, torch_layout, wrappers
from flexivit_jax.weights.big_vision import Fields
from flexivit_jax.weights.transformers import (
  config as transformers_config,
  folder as transformers_folder,
  shapes as transformers_shapes,
  towers as transformers_towers,
)
from flexivit_jax.weights.transformers.families import DETECTOR_HEADS, DETECTORS

NAME = "owl_vit"  # in `MODELS`
# Linear layers of the heads by our names, and the number of outputs where it is not the width.
_DENSE = {
  "class_head.dense0": "class_embedding",
  "class_head.logit_shift": "class_shift",
  "class_head.logit_scale": "class_scale",
}
_BOX = {f"box_head.dense{i}": f"box_{i}" for i in range(3)}
_OBJECTNESS = {f"objectness_head.dense{i}": f"objectness_{i}" for i in range(3)}
_OUTPUTS = {"box_2": 4, "objectness_2": 1, "class_shift": 1, "class_scale": 1}
_NORM = ("layer_norm", "merged_class_token")
_UNUSED = "visual_projection.weight"  # of the towers as they were before they detected


class Detector(NamedTuple):
  """What a folder holds beside its image tower.

  Attributes:
    fields: of the `OwlViT`, without those of the image tower.
    params: likewise.
    tokenizer: entry "text" of the record; None where no file has it.
    notes: what a user should know.
  """

  fields: Fields
  params: Params
  tokenizer: Json | None
  notes: list[str]


def is_one(path: pathlib.Path) -> bool:
  """Tells whether a folder, or a file with its config.json beside it, is such a detector; reads no array."""
  folder = path if path.is_dir() else path.parent
  if not transformers_folder.is_folder(folder) or not (path.is_dir() or bare.has_reader(path)):
    return False
  config = transformers_folder.read_config(folder)
  family = config.get("model_type")
  return family in DETECTORS and config.get("architectures") == [DETECTORS[family]]


def read(path: pathlib.Path) -> Detector:
  """Returns what a folder that `is_one` holds beside the image tower; or a file of it.

  Raises:
    UserError: arrays that are not those of config.json, all differences listed; a value there that cannot be.
  """
  folder = path if path.is_dir() else path.parent
  config = transformers_folder.read_config(folder)
  spec = transformers_config.spec(config)
  arrays = _arrays(path, folder)
  base = f"{config['model_type']}."
  text = transformers_towers.convert(folder, config, torch_layout.under(base, arrays))
  width, length = spec.fields["width"], text.fields["num_classes"]
  if text.fields["width"] != length:
    raise errors.UserError(
      f"config.json has projection_dim={length} and a text tower of hidden_size={text.fields['width']}, which the"
      " class head's embeddings have; expected two equal numbers."
    )
  layers = _DENSE | _BOX | (_OBJECTNESS if config["model_type"] == "owlv2" else {})
  heads = {
    name: a
    for name, a in arrays.items()
    if name.startswith(DETECTOR_HEADS) or name == base + _UNUSED
  }
  outputs = {"class_embedding": length} | _OUTPUTS
  expected: transformers_shapes.Shapes = {base + _UNUSED: (length, width)}
  expected |= transformers_shapes.norm(_NORM[0], width)
  for name, ours in layers.items():
    expected |= transformers_shapes.dense(name, outputs.get(ours, width), width)
  transformers_shapes.compare(expected, heads)
  flat = torch_layout.norm_from_torch(heads, *_NORM)
  for name, ours in layers.items():
    flat |= torch_layout.dense_from_torch(heads, name, ours)
  fields: Fields = dict(
    text={k: v for k, v in text.fields.items() if k in text_model.FIELDS},
    embed_dim=length,
    merge="class_token",
    box_bias="corner",
    objectness=config["model_type"] == "owlv2",
    gelu="exact",  # of the heads, whatever the towers have
  )
  params = trees.unflatten(flat) | {"text": text.params}
  note = (
    f"{base}{_UNUSED} and {base}{transformers_towers.SCALE} are left out: boxes do not need them."
  )
  return Detector(fields, params, text.tokenizer, [*text.notes, note])


def _arrays(path: pathlib.Path, folder: pathlib.Path) -> Arrays:
  """All arrays; of a shard, those of all shards."""
  if path.is_dir() or transformers_folder.is_shard(path):
    return _unwrapped(transformers_folder.read_arrays(folder))
  return _unwrapped(bare.READERS[path.suffix.lower()](path)[0])


def _unwrapped(arrays: Arrays) -> Arrays:
  return wrappers.unwrap(arrays).arrays
