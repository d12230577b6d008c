"""What the config.json of Hugging Face's `transformers` says: of what FlexiViT the arrays are, and their names."""

from collections.abc import Mapping
from typing import NamedTuple

from flexivit_jax import errors
from flexivit_jax.sizes import Size
from flexivit_jax.trees import Json
from flexivit_jax.weights import class_labels, other_models
from flexivit_jax.weights.big_vision import Fields
from flexivit_jax.weights.transformers.families import FAMILIES, PROJECTION, Family, Head

GELU = {"gelu": "exact", "gelu_pytorch_tanh": "tanh", "gelu_new": "tanh", "quick_gelu": "quick"}


class Spec(NamedTuple):
  """A model: its family and head, the fields of its FlexiViT, and what these do not say.

  `qkv_bias`: whether queries, keys and values have one. `pooler`: width of the pooler. `image_size`: pixels (h, w).
  """

  family: Family
  head: Head
  fields: Fields
  channels: int
  qkv_bias: bool
  pooler: int
  image_size: Size


def spec(config: Json) -> Spec:
  """Returns what config.json says; nothing is compared with the arrays yet.

  Raises:
    UserError: a model type, class, activation or MLP that is not supported, or a value that cannot be.
  """
  family = _family(config)
  head = _head(config, family)
  tower = _tower(config, family)
  _check(tower, head)
  pooler = "hidden_size" if tower.get("pooler_output_size") is None else "pooler_output_size"
  return Spec(
    family,
    head,
    _fields(tower, family)
    | {"pool_type": head.pool_type, "num_classes": _outputs(config, tower, head)},
    channels=whole(tower, "num_channels"),
    qkv_bias=bool(tower.get("qkv_bias", True)),
    pooler=whole(tower, pooler),
    image_size=_pair(tower, "image_size"),
  )


def class_names(config: Json, classes: int) -> tuple[list[str] | None, list[str]]:
  """Returns the names of the classes in order, and notes of names that cannot be used.

  None where config.json has none but LABEL_0, LABEL_1, ..., which transformers makes itself.
  """
  names, notes = class_labels.in_order("id2label of config.json", config.get("id2label"), classes)
  is_default = names == [f"LABEL_{i}" for i in range(classes)]
  return (None if is_default else names), notes


def _family(config: Json) -> Family:
  name = config.get("model_type")
  if name is None:
    raise errors.UserError(
      "config.json has no model_type, so this is no folder of transformers; of a folder of timm's,"
      f" give the model.safetensors in it. Supported model types: {', '.join(sorted(FAMILIES))}."
    )
  if str(name).startswith("siglip2"):
    raise errors.UserError(
      f"model_type={name!r} in config.json (NaFlex: a dense layer on flattened patches) is not"
      " supported; SigLIP 2 of a fixed size, with model_type='siglip', is."
    )
  if isinstance(name, str) and name not in FAMILIES and (reason := other_models.kind(name)):
    raise errors.UserError(other_models.refusal(f"model_type {name!r} in config.json", reason))
  return FAMILIES[known("model_type", name, FAMILIES)]


def _head(config: Json, family: Family) -> Head:
  architectures = config.get("architectures")
  if not isinstance(architectures, list) or len(architectures) != 1:
    expected = ", ".join(family.classes)
    raise errors.UserError(
      f"config.json has architectures={architectures!r}; expected a list with one of {expected}."
    )
  if architectures[0] in _TOWERS_ALONE:
    raise errors.UserError(
      f"config.json has architectures={architectures!r}, which has no heads that make boxes; expected"
      f" {', '.join(family.classes)}."
    )
  return family.classes[known("architecture", architectures[0], family.classes)]


_TOWERS_ALONE = ("OwlViTModel", "Owlv2Model")


def _tower(config: Json, family: Family) -> Json:
  """The settings of the image tower, all of them; a model with two towers has them one level down."""
  settings = config
  if family.nested:
    # Where an old CLIP has both, transformers lets the second win.
    settings = config.get("vision_config_dict") or config.get("vision_config") or {}
    if not isinstance(settings, dict):
      raise errors.UserError(f"config.json has vision_config={settings!r}; expected an object.")
    settings = {k: v for k, v in settings.items() if k != "projection_dim"}
    settings |= {k: config[k] for k in ("projection_dim",) if k in config}
  return {name: settings.get(name, default) for name, default in family.defaults.items()}


def _check(tower: Json, head: Head) -> None:
  if tower.get("use_swiglu_ffn"):
    raise errors.UserError(
      "use_swiglu_ffn=true in config.json (DINOv2 giant) is not supported: the MLP of a FlexiViT"
      " has a GELU."
    )
  if head.pool_type == "map" and not tower["vision_use_head"]:
    raise errors.UserError(
      "vision_use_head=false in config.json is not supported: such a model has no pooled output,"
      " and a FlexiViT has one."
    )


def _fields(tower: Json, family: Family) -> Json:
  """The fields of the FlexiViT, but for its head."""
  width, heads = whole(tower, "hidden_size"), whole(tower, "num_attention_heads")
  if width % heads:
    raise errors.UserError(
      f"config.json has hidden_size={width}, no multiple of num_attention_heads={heads}."
    )
  return {
    "patch_size": _pair(tower, "patch_size"),
    "posemb_size": _grid(_pair(tower, "image_size"), _pair(tower, "patch_size")),
    "width": width,
    "depth": whole(tower, "num_hidden_layers"),
    "mlp_dim": _mlp_dim(tower, width),
    "num_heads": heads,
    "registers": _registers(tower, family),
    "pre_norm": bool(family.layout.pre_norm),
    "layer_norm_eps": positive(tower, "layer_norm_eps"),
    "gelu": GELU[known("hidden_act", tower["hidden_act"], GELU)],
    "kernel_operator": "cubic_antialias",
    "grid_operator": "cubic_antialias",
  }


def _grid(image_size: Size, patch_size: Size) -> Size:
  """Whole patches (down, across)."""
  grid = image_size[0] // patch_size[0], image_size[1] // patch_size[1]
  if min(grid) < 1:
    raise errors.UserError(
      f"config.json has image_size={image_size} and patch_size={patch_size}: no whole patch fits."
    )
  return grid


def _outputs(config: Json, tower: Json, head: Head) -> int:
  if not head.dense:
    return 0
  if head.dense == PROJECTION:
    return whole(tower, "projection_dim")
  if "id2label" not in config:
    return whole({"num_labels": 2, **config}, "num_labels")  # two is transformers' default
  if not isinstance(config["id2label"], dict):
    raise errors.UserError(
      f"config.json has id2label={config['id2label']!r}; expected names by number."
    )
  if not config["id2label"] and len(head.dense) > 1:
    raise errors.UserError("config.json has id2label={}; a model with two heads needs classes.")
  return len(config["id2label"])


def _mlp_dim(tower: Json, width: int) -> int:
  if "mlp_ratio" in tower:
    return int(width * positive(tower, "mlp_ratio"))
  return whole(tower, "intermediate_size")


def _registers(tower: Json, family: Family) -> int:
  """Registers, or DeiT's distillation token, which is one once its position is folded in."""
  if "num_register_tokens" in tower:
    return whole(tower, "num_register_tokens")
  return max(0, len(family.layout.tokens) - 1)


def known(kind: str, name: object, choices: Mapping[str, object]) -> str:
  """Returns a name that is one of the choices; a UserError for another one."""
  if not isinstance(name, str) or name not in choices:
    raise errors.unknown(f"{kind} in config.json:", name, choices)
  return name


def whole(config: Json, name: str) -> int:
  """Returns a whole number from 1; a UserError for another value."""
  value = config[name]
  if type(value) is not int or value < 1:
    raise errors.UserError(f"config.json has {name}={value!r}; expected a whole number from 1.")
  return value


def positive(config: Json, name: str) -> float:
  """Returns a number above 0; a UserError for another value."""
  value = config[name]
  if type(value) not in (int, float) or not value > 0:
    raise errors.UserError(f"config.json has {name}={value!r}; expected a number > 0.")
  return float(value)


def _pair(config: Json, name: str) -> Size:
  value = config[name]
  sides = value if isinstance(value, list) else [value, value]
  if len(sides) != 2 or any(type(side) is not int or side < 1 for side in sides):
    raise errors.UserError(
      f"config.json has {name}={value!r}; expected pixels, one whole number or two (h, w)."
    )
  return sides[0], sides[1]
