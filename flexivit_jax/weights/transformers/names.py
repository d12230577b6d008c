"""The arrays of Hugging Face's `transformers`, turned into big_vision's names: ViT, DeiT, DINOv2, CLIP, SigLIP.

What is folded, exactly up to rounding: the positions of the class token and of DeiT's distillation token into these
tokens; LayerScale (DINOv2) into the projections before it is applied. Biases that a model does not have become zeros.
"""

import numpy as np

from flexivit_jax.trees import Arrays
from flexivit_jax.weights import torch_layout
from flexivit_jax.weights.big_vision import Converted
from flexivit_jax.weights.transformers import shapes as transformers_shapes
from flexivit_jax.weights.transformers.config import Spec
from flexivit_jax.weights.transformers.families import DETECTORS
from flexivit_jax.weights.transformers.shapes import MAP, MASK, POOLER, REGISTERS

# SigLIP's names of the parts of its attention pooling.
POOL = {
  "probe": "probe",
  "norm": "layernorm",
  "qkv": "attention.in_proj",
  "out": "attention.out_proj",
  "fc1": "mlp.fc1",
  "fc2": "mlp.fc2",
}
HEADS_LEFT_OUT = "of the text tower and of the heads are left out."
_LEFT_OUT = {
  POOLER: "The pooler (a dense layer and tanh) is left out: the output is the class token before it.",
  MASK: "mask_token is left out: only training with masks uses it.",
  MAP: "The pooling head is left out: the classifier takes the mean of the tokens.",
}


def convert(s: Spec, arrays: Arrays) -> Converted:
  """Turns the arrays of a folder, float32 and by name, into ours; `s` is what its config.json says.

  Raises:
    UserError: arrays that are not those of config.json, all differences listed.
  """
  tower = {name: a for name, a in arrays.items() if not name.startswith(s.family.others)}
  base = s.family.base
  prefix = base if any(name.startswith(base) for name in tower) else ""
  transformers_shapes.check(s, tower, prefix)
  a = {name.removeprefix(prefix): array for name, array in tower.items()}
  return Converted(_convert(a, s), s.fields, _notes(a, s, len(arrays) - len(tower)))


def _notes(a: Arrays, s: Spec, others: int) -> list[str]:
  """What a user should know."""
  used = s.fields["pool_type"] == "map"  # then what is named as MAP is the model's own
  notes = [
    why
    for part, why in _LEFT_OUT.items()
    if any(name.startswith(part) for name in a) and not (part == MAP and used)
  ]
  if others:
    is_detector = s.family.base.startswith(tuple(DETECTORS))
    what = HEADS_LEFT_OUT if is_detector else "of the text tower and of the loss are left out."
    notes.append(f"{others} arrays {what}")
  if "scale1" in s.family.layout.block:
    notes.append("LayerScale is folded into the projections.")
  sides = zip(s.fields["patch_size"], s.fields["posemb_size"], strict=True)
  covered = tuple(patch * cells for patch, cells in sides)
  if covered != s.image_size:
    notes.append(
      f"The image of {s.image_size} pixels is no whole number of patches: only the {covered} at its"
      " top left have an effect. Give images of these."
    )
  return notes


def _convert(a: Arrays, s: Spec) -> Arrays:
  names, heads = s.family.layout, s.fields["num_heads"]
  flat = {
    "embedding/kernel": torch_layout.patches_from_torch(a[f"{names.patch}.weight"]),
    "embedding/bias": torch_layout.bias_of(a, names.patch),
    **_tokens(a, s),
    **torch_layout.norm_from_torch(a, names.norm, "Transformer/encoder_norm"),
  }
  if names.pre_norm:
    flat |= torch_layout.norm_from_torch(a, names.pre_norm, "pre_norm")
  for i in range(s.fields["depth"]):
    theirs = torch_layout.under(f"{names.blocks}.{i}.", a)
    block = torch_layout.block_from_torch(theirs, names.block, heads)
    flat |= {f"Transformer/encoderblock_{i}/{name}": array for name, array in block.items()}
  if s.fields["pool_type"] == "map":
    # One array holds all three projections, without the dot that other layers have: in_proj_weight.
    theirs = torch_layout.under(f"{MAP}.", a)
    theirs = {name.replace("in_proj_", "in_proj."): array for name, array in theirs.items()}
    pool = torch_layout.pool_from_torch(theirs, POOL, heads)
    flat |= {f"MAPHead_0/{name}": array for name, array in pool.items()}
  return flat | (_convert_head(a, s.head.dense) if s.fields["num_classes"] else {})


def _tokens(a: Arrays, s: Spec) -> Arrays:
  """The grid's positions, the class token and the registers; tokens that have a position take it in."""
  names, d = s.family.layout, s.fields["width"]
  position, before = a[names.position].reshape(1, -1, d), len(names.tokens)
  flat = {"pos_embedding": position[:, before:]}
  for i, (name, to) in enumerate(zip(names.tokens, ("cls", "registers"), strict=False)):
    flat[to] = a[name].reshape(1, 1, d) + position[:, i : i + 1]
  return flat | ({"registers": a[REGISTERS]} if REGISTERS in a else {})


def _convert_head(a: Arrays, names: tuple[str, ...]) -> Arrays:
  """One dense layer; DeiT's two, the mean of whose logits counts, as one on the concatenated tokens."""
  n = np.float32(len(names))
  kernel = np.concatenate([a[f"{name}.weight"].T / n for name in names])
  bias = np.sum([torch_layout.bias_of(a, name) / n for name in names], axis=0)
  return {"head/kernel": np.ascontiguousarray(kernel), "head/bias": bias}
