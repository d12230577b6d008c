"""OpenAI's and OpenCLIP's names for CLIP's image tower, turned into timm's; the numbers stay as they are."""

import re

import numpy as np

from flexivit_jax.trees import Arrays

_NAMES = {
  "conv1.weight": "patch_embed.proj.weight",
  "class_embedding": "cls_token",
  "positional_embedding": "pos_embed",
  "ln_pre": "norm_pre",
  "ln_post": "norm",
  "transformer.resblocks": "blocks",
  "ln_1": "norm1",
  "ln_2": "norm2",
  "attn.in_proj_": "attn.qkv.",
  "attn.out_proj": "attn.proj",
  "mlp.c_fc": "mlp.fc1",
  "mlp.c_proj": "mlp.fc2",
}
_PATTERN = re.compile("|".join(re.escape(name) for name in _NAMES))
NOTE = (
  "An image tower of OpenAI's CLIP or OpenCLIP; its projection to the space of texts is the head. OpenAI's weights want"
  " --gelu=quick (in Python gelu='quick'), which the arrays do not say."
)


def is_open_clip(arrays: Arrays) -> bool:
  """Tells whether the names, without prefixes, are those of the image tower."""
  return "conv1.weight" in arrays and "class_embedding" in arrays


def to_timm(arrays: Arrays) -> Arrays:
  """Returns the arrays by timm's names; tokens and positions get timm's axes, the projection becomes a head."""
  flat = {_PATTERN.sub(lambda m: _NAMES[m[0]], name): array for name, array in arrays.items()}
  axes = {"cls_token": 1, "pos_embed": 2}
  for name, ndim in axes.items():
    if name in flat and flat[name].ndim == ndim:
      flat[name] = flat[name].reshape(*(1,) * (3 - ndim), *flat[name].shape)
  projection = flat.pop("proj", None)
  if projection is not None and projection.ndim == 2:
    flat["head.weight"] = np.ascontiguousarray(projection.T)
    flat["head.bias"] = np.zeros(projection.shape[1], projection.dtype)
  return flat
