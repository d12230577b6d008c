"""A folder of Hugging Face's `transformers`: its config.json, its arrays, the mean and std of its input.

Read with json and safetensors alone. Nothing is unpickled, and no name in a file leads out of the folder.
"""

import json
import pathlib
import re
from typing import Any, NamedTuple

from flexivit_jax import errors
from flexivit_jax.weights import files

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
PREPROCESSOR = "preprocessor_config.json"
_PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_SAVE = "load the model with transformers and save it with `save_pretrained`, which writes it"


class Normalisation(NamedTuple):
  """Of the input, a number for each channel: the model takes `(pixel - mean) / std`, pixels in [0, 1]."""

  mean: list[float]
  std: list[float]


def is_folder(path: pathlib.Path) -> bool:
  """Whether `path` looks like such a folder. A run's has a config.json too, but no weights beside it."""
  config = path / CONFIG
  if not config.is_file() or (path / "checkpoints").is_dir():
    return False
  beside = any((path / name).is_file() for name in (WEIGHTS, INDEX, *_PICKLED))
  return beside or b'"model_type"' in config.read_bytes()


def read_config(path: pathlib.Path) -> dict[str, Any]:
  """What config.json says; a UserError if it cannot be read."""
  return _json(path / CONFIG)


def read_arrays(path: pathlib.Path) -> files.Arrays:
  """The arrays by name; half precision is widened.

  Raises:
    UserError: a file that is missing, broken or pickled, or shards that do not hold each array once.
  """
  single, index = path / WEIGHTS, path / INDEX
  if single.is_file() and index.is_file():
    raise errors.UserError(f"{path} has {WEIGHTS} and {INDEX}; remove the one that is not meant.")
  if single.is_file():
    return files.read_safetensors(single)[0]
  if index.is_file():
    return _shards(index)
  pickled = [name for name in _PICKLED if (path / name).is_file()]
  if pickled:
    raise errors.UserError(
      f"{path} has its weights in {pickled[0]}, which is pickled; expected {WEIGHTS}: {_SAVE}."
    )
  raise errors.UserError(f"{path} has no {WEIGHTS} and no {INDEX}: {_SAVE}.")


def read_normalisation(path: pathlib.Path) -> Normalisation | None:
  """What the image processor does to 8-bit pixels, as mean and std of pixels in [0, 1]; None if no file says it.

  Raises:
    UserError: a file that cannot be read, or a value that is no number.
  """
  processor = _processor(path)
  if not processor.get("do_normalize", True):
    mean, std = [0.0] * 3, [1.0] * 3
  elif "image_mean" in processor and "image_std" in processor:
    mean, std = (_numbers(processor, name) for name in ("image_mean", "image_std"))
  else:
    return None
  factor = processor.get("rescale_factor", 1 / 255) if processor.get("do_rescale", True) else 1.0
  if not isinstance(factor, (int, float)) or not factor > 0:
    raise errors.UserError(f"{PREPROCESSOR} has rescale_factor={factor!r}; expected a number > 0.")
  white = 255 * factor
  if abs(white - 1) < 1e-6:  # 0.00392156862745098 is meant to be 1 / 255
    return Normalisation(mean, std)
  return Normalisation([m / white for m in mean], [s / white for s in std])


def _shards(index: pathlib.Path) -> files.Arrays:
  """The arrays of all files that the index names; each must stand in its own file, and in no other."""
  shard_of = _weight_map(index)
  shards = sorted(set(shard_of.values()))
  missing = [shard for shard in shards if not (index.parent / shard).is_file()]
  if missing:
    raise errors.UserError(f"{index} names files that are not there: {', '.join(missing)}.")
  arrays: files.Arrays = {}
  for shard in shards:
    part, _ = files.read_safetensors(index.parent / shard)
    said = {name for name, place in shard_of.items() if place == shard}
    lines = [f"missing {name}" for name in sorted(said - part.keys())]
    lines += [f"extra {name}" for name in sorted(part.keys() - said)]
    if lines:
      raise errors.UserError(f"{shard} does not hold what {index} says:\n  " + "\n  ".join(lines))
    arrays |= part
  return arrays


def _weight_map(index: pathlib.Path) -> dict[str, str]:
  shard_of = _json(index).get("weight_map")
  if not isinstance(shard_of, dict) or not shard_of:
    raise errors.UserError(f"{index}: expected names of files by array in 'weight_map'.")
  for shard in shard_of.values():
    # A name with a folder in it could lead anywhere.
    if not isinstance(shard, str) or not re.fullmatch(r"[^/\\]+\.safetensors", shard):
      raise errors.UserError(f"{index}: {shard!r} is no name of a file in the folder.")
  return shard_of


def _processor(path: pathlib.Path) -> dict[str, Any]:
  """The image processor's settings; a processor for text and images holds them as a part of its own."""
  if (path / PREPROCESSOR).is_file():
    return _json(path / PREPROCESSOR)
  both = path / "processor_config.json"
  part = _json(both).get("image_processor", {}) if both.is_file() else {}
  return part if isinstance(part, dict) else {}


def _numbers(processor: dict[str, Any], name: str) -> list[float]:
  values = processor[name]
  if not isinstance(values, list) or not all(type(value) in (int, float) for value in values):
    raise errors.UserError(f"{PREPROCESSOR} has {name}={values!r}; expected a list of numbers.")
  return [float(value) for value in values]


def _json(path: pathlib.Path) -> dict[str, Any]:
  try:
    content = json.loads(path.read_bytes())
  except (OSError, ValueError, RecursionError) as e:
    raise errors.UserError(f"{path} cannot be read as JSON: {e}") from e
  if not isinstance(content, dict):
    raise errors.UserError(f"{path}: expected a JSON object, got {type(content).__name__}.")
  return content
