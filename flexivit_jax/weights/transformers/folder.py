"""A folder of Hugging Face's `transformers`: its config.json and its arrays.

Read with json and safetensors alone. Nothing is unpickled, and no name in a file leads out of the folder.
"""

import pathlib
import re

from flexivit_jax import errors
from flexivit_jax.trees import Arrays, Json
from flexivit_jax.weights import npz
from flexivit_jax.weights.timm import folder as timm_folder

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_SAVE = "load the model with transformers and save it with `save_pretrained`, which writes it"


def is_folder(path: pathlib.Path) -> bool:
  """Tells whether `path` looks like such a folder. A run's has a config.json too, but no weights beside it."""
  config = path / CONFIG
  if not config.is_file() or (path / "checkpoints").is_dir():
    return False
  beside = any((path / name).is_file() for name in (WEIGHTS, INDEX, *_PICKLED))
  return beside or b'"model_type"' in config.read_bytes()


def is_shard(path: pathlib.Path) -> bool:
  """Tells whether the index beside a file names it."""
  index = path.parent / INDEX
  return index.is_file() and path.name in _weight_map(index).values()


def read_config(path: pathlib.Path) -> Json:
  """Reads config.json; raises a UserError if it cannot be read."""
  return timm_folder.read_json(path / CONFIG)


def read_arrays(path: pathlib.Path) -> Arrays:
  """Returns the arrays by name; widens half precision.

  Raises:
    UserError: a file that is missing, broken or pickled, or shards that do not hold each array once.
  """
  single, index = path / WEIGHTS, path / INDEX
  if single.is_file() and index.is_file():
    raise errors.UserError(f"{path} has {WEIGHTS} and {INDEX}; remove the one that is not meant.")
  if single.is_file():
    return npz.read_safetensors(single)[0]
  if index.is_file():
    return _shards(index)
  pickled = [name for name in _PICKLED if (path / name).is_file()]
  if pickled:
    raise errors.UserError(
      f"{path} has its weights in {pickled[0]}, which is pickled; expected {WEIGHTS}: {_SAVE}."
      + (f" Or give {path / pickled[0]} itself, which takes PyTorch." if len(pickled) == 1 else "")
    )
  raise errors.UserError(f"{path} has no {WEIGHTS} and no {INDEX}: {_SAVE}.")


def _shards(index: pathlib.Path) -> Arrays:
  """The arrays of all files that the index names; each must stand in its own file, and in no other."""
  shard_of = _weight_map(index)
  shards = sorted(set(shard_of.values()))
  missing = [shard for shard in shards if not (index.parent / shard).is_file()]
  if missing:
    raise errors.UserError(f"{index} names files that are not there: {', '.join(missing)}.")
  arrays: Arrays = {}
  for shard in shards:
    part, _ = npz.read_safetensors(index.parent / shard)
    expected = {name for name, place in shard_of.items() if place == shard}
    lines = [f"missing {name}" for name in sorted(expected - part.keys())]
    lines += [f"extra {name}" for name in sorted(part.keys() - expected)]
    if lines:
      raise errors.UserError(f"{shard} does not hold what {index} says:\n  " + "\n  ".join(lines))
    arrays |= part
  return arrays


def _weight_map(index: pathlib.Path) -> dict[str, str]:
  shard_of = timm_folder.read_json(index).get("weight_map")
  if not isinstance(shard_of, dict) or not shard_of:
    raise errors.UserError(f"{index}: expected names of files by array in 'weight_map'.")
  for shard in shard_of.values():
    # A name with a folder in it could lead anywhere.
    if not isinstance(shard, str) or not re.fullmatch(r"[^/\\]+\.safetensors", shard):
      raise errors.UserError(f"{index}: {shard!r} is no name of a file in the folder.")
  return shard_of
