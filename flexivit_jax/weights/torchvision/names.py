"""torchvision's names for a Vision Transformer, turned into timm's; the numbers stay as they are."""

import re

from flexivit_jax.trees import Arrays

_NAMES = {
  r"^conv_proj\.": "patch_embed.proj.",
  r"^class_token$": "cls_token",
  r"^encoder\.pos_embedding$": "pos_embed",
  r"^encoder\.layers\.encoder_layer_(\d+)\.": r"blocks.\1.",
  r"^encoder\.ln\.": "norm.",
  r"^heads\.head\.": "head.",
  r"\.ln_([12])\.": r".norm\1.",
  r"\.self_attention\.in_proj_": ".attn.qkv.",
  r"\.self_attention\.out_proj\.": ".attn.proj.",
  r"\.mlp\.(0|linear_1)\.": ".mlp.fc1.",  # linear_1 before torchvision 0.13
  r"\.mlp\.(3|linear_2)\.": ".mlp.fc2.",
}
NOTE = "A Vision Transformer of torchvision, which is timm's under other names."


def is_torchvision(arrays: Arrays) -> bool:
  """Tells whether the names, without prefixes, are torchvision's."""
  return "conv_proj.weight" in arrays and "encoder.pos_embedding" in arrays


def to_timm(arrays: Arrays) -> Arrays:
  """Returns the arrays by timm's names."""
  flat = {}
  for name, array in arrays.items():
    new = name
    for pattern, to in _NAMES.items():
      new = re.sub(pattern, to, new)
    flat[new] = array
  return flat
