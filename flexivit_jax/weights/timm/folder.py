"""A folder as timm writes it for the Hugging Face Hub: the weights, and a config.json that says what arrays do not.

timm builds the model that `architecture` names with `model_args`; what these leave out is the architecture's own. Of
that, arrays do not tell the activation, the heads and the LayerNorms' epsilon, so they are listed here where they are
not the usual ones; a test compares the list with timm.
"""

import json
import math
import pathlib
import re

from flexivit_jax import errors
from flexivit_jax.trees import Arrays, Json
from flexivit_jax.weights import other_models
from flexivit_jax.weights.big_vision import Fields
from flexivit_jax.weights.timm import shapes as timm_shapes

CONFIG = "config.json"
WEIGHTS = ("model.safetensors", "pytorch_model.bin", "pytorch_model.pth", "model.pth")
ACTIVATIONS = {"gelu": "exact", "gelu_tanh": "tanh", "quick_gelu": "quick"}

# What arrays do not tell and is not the usual: fields by a part of the architecture's name.
_UNUSUAL: dict[str, Fields] = {
  "quickgelu": {"gelu": "quick"},
  "_clip_": {"layer_norm_eps": 1e-5},
  "giantopt_patch16_siglip|so400m_patch16_siglip": {"gelu": "tanh"},
  "base_patch32_siglip|large_patch16_siglip_(gap_)?512": {"gelu": "tanh"},
  "giantopt_patch16_siglip|^vit_base_patch16_gap_224": {"num_heads": 16},
  "^test_vit$": {"num_heads": 2},
}
# Rotary positions leave no trace in the arrays; all else that is no plain ViT has other names or shapes.
_KNOWN = re.compile(r"(vit|deit3?|flexivit)_(?!.*rope)\w+|test_vit")

# Arguments that say nothing which arrays do not say too, or that only training reads.
_TOLD_BY_ARRAYS = {
  *("img_size", "patch_size", "in_chans", "mlp_ratio", "class_token", "reg_tokens", "no_embed_class", "pos_embed"),
  *("qkv_bias", "qk_norm", "scale_attn_norm", "scale_mlp_norm", "proj_bias", "init_values", "pre_norm", "final_norm"),
  *("fc_norm", "dynamic_img_size", "dynamic_img_pad", "strict_img_size", "weight_init", "fix_init", "drop_rate"),
  *("pos_drop_rate", "patch_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate"),
}  # fmt: skip
_NAMES = {
  "embed_dim": "width",
  "depth": "depth",
  "num_heads": "num_heads",
  "num_classes": "num_classes",
}
_READ = {*_NAMES, "act_layer", "norm_layer", "global_pool", "pool_include_prefix"}


def find(folder: pathlib.Path) -> Json | None:
  """Returns the config of a folder that timm wrote, None for another folder (a run's has checkpoints/).

  Raises:
    UserError: the config is no JSON object.
  """
  if not (folder / CONFIG).is_file() or (folder / "checkpoints").exists():
    return None
  config = read_json(folder / CONFIG)
  return config if "architecture" in config else None


def read_json(path: pathlib.Path) -> Json:
  """Returns the JSON object in a file; a UserError if there is none."""
  try:
    content = json.loads(path.read_bytes())
  except (OSError, ValueError, RecursionError) as e:
    raise errors.UserError(f"{path} cannot be read as JSON: {e}") from e
  if not isinstance(content, dict):
    raise errors.UserError(f"{path}: expected a JSON object, got {type(content).__name__}.")
  return content


def weights_file(folder: pathlib.Path) -> pathlib.Path:
  """Returns the file with the weights, as timm chooses it; raises a UserError if there is none."""
  for name in WEIGHTS:
    if (folder / name).is_file():
      return folder / name
  raise errors.UserError(
    f"{folder} has a {CONFIG} and no weights; expected {' or '.join(WEIGHTS)}."
  )


def told(where: pathlib.Path, config: Json, arrays: Arrays) -> Fields:
  """Returns the fields of the FlexiViT that the arrays are of, as the config says them.

  Raises:
    Misfit: the arrays have another number of blocks.
    UserError: an architecture, a pooling, an activation or an argument that no FlexiViT has.
  """
  path, args = where / CONFIG, _mapping(where, config, "model_args")
  pretrained = pretrained_cfg(where, config)
  args = {key: value for key, value in args.items() if value is not None}
  unknown = next((key for key in args if key not in _READ | _TOLD_BY_ARRAYS), None)
  if unknown:
    raise errors.unknown(f"argument in model_args of {path}:", unknown, _READ | _TOLD_BY_ARRAYS)
  fields = _by_architecture(path, config["architecture"])
  classes = config.get("num_classes", pretrained.get("num_classes"))
  fields |= {} if classes is None else {"num_classes": classes}
  fields |= {field: args[key] for key, field in _NAMES.items() if key in args}
  fields |= _activation(path, args) | _norm(path, args) | _pool(path, args, config, arrays)
  fields |= _grid(args.get("img_size") or pretrained.get("input_size"), arrays)
  _check_numbers(path, fields, arrays)
  return fields


def pretrained_cfg(where: pathlib.Path, config: Json) -> Json:
  """Returns the section about images and classes: the whole config where it has one level, as timm's oldest have."""
  return _mapping(where, config, "pretrained_cfg") or config


def check_fit(where: pathlib.Path, fields: Fields, inferred: Fields) -> None:
  """Raises a Misfit if the config says other sizes than the arrays have."""
  lines = [
    f"{name} is {fields[name]}, and the weights have {inferred[name]}"
    for name in ("width", "depth", "num_classes")
    if fields.get(name, inferred[name]) != inferred[name]
  ]
  if lines:
    raise Misfit(f"{where / CONFIG}: {'; '.join(lines)}.")


class Misfit(errors.UserError):
  """The config is of another model than the weights."""


def _check_numbers(path: pathlib.Path, fields: Fields, arrays: Arrays) -> None:
  """The depth is compared here: before a model of any number of blocks that a file may claim is built."""
  for name in _NAMES.values():
    if not isinstance(fields.get(name, 0), int):
      raise errors.UserError(f"{path}: {name} is {fields[name]!r}; expected a whole number.")
  blocks = len({name.split(".")[1] for name in arrays if name.startswith("blocks.")})
  if fields.get("depth", blocks) != blocks:
    raise Misfit(f"{path}: depth is {fields['depth']}, and the weights have {blocks} blocks.")


def _by_architecture(path: pathlib.Path, name: object) -> Fields:
  if not isinstance(name, str) or not _KNOWN.fullmatch(name):
    if reason := other_models.kind(name):
      raise errors.UserError(other_models.refusal(f"{path}: architecture {name!r}", reason))
    raise errors.UserError(
      f"{path}: architecture {name!r} is no plain ViT; expected vit_*, deit_*, deit3_* or flexivit_*, without rope."
    )
  fields: Fields = {"gelu": "exact", "layer_norm_eps": 1e-6}
  for part, values in _UNUSUAL.items():
    fields |= values if re.search(part, name) else {}
  return fields


def _mapping(where: pathlib.Path, config: Json, key: str) -> Json:
  value = config.get(key) or {}
  if not isinstance(value, dict):
    raise errors.UserError(f"{where / CONFIG}: {key} is {value!r}; expected a JSON object.")
  return value


def _activation(path: pathlib.Path, args: Json) -> Fields:
  name = args.get("act_layer")
  if name is not None and name not in list(ACTIVATIONS):
    raise errors.unknown(f"act_layer in {path}:", name, ACTIVATIONS)
  return {} if name is None else {"gelu": ACTIVATIONS[name]}


def _norm(path: pathlib.Path, args: Json) -> Fields:
  """A norm_layer given by name comes with timm's own epsilon, whatever the architecture's is."""
  name = args.get("norm_layer")
  if name is not None and str(name).replace("_", "").lower() not in ("layernorm", "layernormfp32"):
    raise errors.UserError(f"{path}: norm_layer is {name!r}; a FlexiViT has 'layernorm' only.")
  return {} if name is None else {"layer_norm_eps": 1e-6}


def _pool(path: pathlib.Path, args: Json, config: Json, arrays: Arrays) -> Fields:
  """The pool type, unless arrays tell it, as they do of two heads, or it leaves out tokens that a FlexiViT does not."""
  pool, whole = args.get("global_pool", config.get("global_pool")), args.get("pool_include_prefix")
  prefix = any(name in arrays for name in timm_shapes.TOKENS)
  names = {"token": "tok", "avg": "gap", "map": "map", None: None}
  if pool not in list(names) or (pool == "avg" and whole and prefix):
    shown = f"global_pool {pool!r}" + " with pool_include_prefix" * bool(whole)
    raise errors.UserError(f"{path}: {shown}; a FlexiViT has 'token', 'avg' and 'map'.")
  if pool is None or "dist_token" in arrays or (pool == "map" and prefix and not whole):
    return {}
  return {"pool_type": names[pool]}


def _grid(size: object, arrays: Arrays) -> Fields:
  """The position grid, if it accounts for all positions: sizes on the Hub are not always those of the weights."""
  kernel, position = arrays.get(timm_shapes.KERNEL), arrays.get("pos_embed")
  hw = [size, size] if isinstance(size, int) else size[-2:] if isinstance(size, list) else []
  if (
    kernel is None or kernel.ndim != 4 or not kernel.size or position is None or position.ndim != 3
  ):
    return {}
  if len(hw) != 2 or not all(isinstance(side, int) for side in hw):
    return {}
  grid = tuple(side // patch for side, patch in zip(hw, kernel.shape[2:], strict=True))
  fits = position.shape[1] - math.prod(grid) in (0, timm_shapes.prefix_length(arrays))
  return {"posemb_size": grid} if fits else {}
