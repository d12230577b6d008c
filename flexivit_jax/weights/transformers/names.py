"""The arrays of Hugging Face's `transformers`, turned into big_vision's names: ViT, DeiT, DINOv2, CLIP, SigLIP.

What is folded, exactly up to rounding: the positions of the class token and of DeiT's distillation token into these
tokens; LayerScale (DINOv2) into the projections before it is applied. Biases that a model does not have become zeros.
"""

from collections.abc import Mapping

import numpy as np

from flexivit_jax.weights.timm import names as timm_names
from flexivit_jax.weights.transformers import shapes as transformers_shapes
from flexivit_jax.weights.transformers.config import Spec
from flexivit_jax.weights.transformers.shapes import MAP, MASK, POOLER, REGISTERS

Arrays = Mapping[str, np.ndarray]

_LEFT_OUT = {
  POOLER: "The pooler (a dense layer and tanh) is left out: the output is the class token before it.",
  MASK: "mask_token is left out: only training with masks uses it.",
  MAP: "The pooling head is left out: the classifier takes the mean of the tokens.",
}


def convert(s: Spec, arrays: Arrays) -> timm_names.Converted:
  """Turns the arrays of a folder, float32 and by name, into ours; `s` is what its config.json says.

  Raises:
    UserError: arrays that are not those of config.json, all differences listed.
  """
  own = {name: a for name, a in arrays.items() if not name.startswith(s.family.others)}
  base = s.family.base
  prefix = base if any(name.startswith(base) for name in own) else ""
  transformers_shapes.check(s, own, prefix)
  a = {name.removeprefix(prefix): array for name, array in own.items()}
  return timm_names.Converted(_convert(a, s), s.fields, _notes(a, s, len(arrays) - len(own)))


def _notes(a: Arrays, s: Spec, others: int) -> list[str]:
  """What a user should know."""
  used = s.fields["pool_type"] == "map"  # then what is named as MAP is the model's own
  notes = [
    why
    for part, why in _LEFT_OUT.items()
    if any(name.startswith(part) for name in a) and not (part == MAP and used)
  ]
  if others:
    notes.append(f"{others} arrays of the text tower and of the loss are left out.")
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


def _convert(a: Arrays, s: Spec) -> dict[str, np.ndarray]:
  names, heads = s.family.layout, s.fields["num_heads"]
  flat = {
    "embedding/kernel": np.ascontiguousarray(a[f"{names.patch}.weight"].transpose(2, 3, 1, 0)),
    "embedding/bias": _bias(a, names.patch),
    **_tokens(a, s),
    **_norm(a, names.norm, "Transformer/encoder_norm"),
  }
  if names.pre_norm:
    flat |= _norm(a, names.pre_norm, "pre_norm")
  for i in range(s.fields["depth"]):
    prefix = f"{names.blocks}.{i}."
    block = {n.removeprefix(prefix): array for n, array in a.items() if n.startswith(prefix)}
    converted = _convert_block(block, names.block, heads)
    flat |= {f"Transformer/encoderblock_{i}/{name}": array for name, array in converted.items()}
  if s.fields["pool_type"] == "map":
    flat |= _convert_map(a, heads)
  return flat | (_convert_head(a, s.head.dense) if s.fields["num_classes"] else {})


def _tokens(a: Arrays, s: Spec) -> dict[str, np.ndarray]:
  """The grid's positions, the class token and the registers; tokens that have a position take it in."""
  names, d = s.family.layout, s.fields["width"]
  position, before = a[names.position].reshape(1, -1, d), len(names.tokens)
  flat = {"pos_embedding": position[:, before:]}
  for i, (name, to) in enumerate(zip(names.tokens, ("cls", "registers"), strict=False)):
    flat[to] = a[name].reshape(1, 1, d) + position[:, i : i + 1]
  return flat | ({"registers": a[REGISTERS]} if REGISTERS in a else {})


def _convert_block(a: Arrays, names: Mapping[str, str], heads: int) -> dict[str, np.ndarray]:
  attention, mlp = "MultiHeadDotProductAttention_0", "MlpBlock_0"
  scale1, scale2 = (a.get(names.get(part, "")) for part in ("scale1", "scale2"))
  flat = _norm(a, names["norm1"], "LayerNorm_0") | _norm(a, names["norm2"], "LayerNorm_1")
  for part in ("query", "key", "value"):
    weight, bias = a[f"{names[part]}.weight"], _bias(a, names[part])
    flat |= _split(weight, bias, f"{attention}/{part}", heads)
  flat |= _merge(_dense(a, names["out"], f"{attention}/out", scale1), heads)
  flat |= _dense(a, names["fc1"], f"{mlp}/Dense_0")
  return flat | _dense(a, names["fc2"], f"{mlp}/Dense_1", scale2)


def _convert_map(a: Arrays, heads: int) -> dict[str, np.ndarray]:
  to, attention = "MAPHead_0", "MAPHead_0/MultiHeadDotProductAttention_0"
  flat = {f"{to}/probe": a[f"{MAP}.probe"], **_norm(a, f"{MAP}.layernorm", f"{to}/LayerNorm_0")}
  weights = np.split(a[f"{MAP}.attention.in_proj_weight"], 3)
  biases = np.split(a[f"{MAP}.attention.in_proj_bias"], 3)
  for part, weight, bias in zip(("query", "key", "value"), weights, biases, strict=True):
    flat |= _split(weight, bias, f"{attention}/{part}", heads)
  flat |= _merge(_dense(a, f"{MAP}.attention.out_proj", f"{attention}/out"), heads)
  flat |= _dense(a, f"{MAP}.mlp.fc1", f"{to}/MlpBlock_0/Dense_0")
  return flat | _dense(a, f"{MAP}.mlp.fc2", f"{to}/MlpBlock_0/Dense_1")


def _convert_head(a: Arrays, names: tuple[str, ...]) -> dict[str, np.ndarray]:
  """One dense layer; DeiT's two, the mean of whose logits counts, as one on the concatenated tokens."""
  n = np.float32(len(names))
  kernel = np.concatenate([a[f"{name}.weight"].T / n for name in names])
  bias = np.sum([_bias(a, name) / n for name in names], axis=0)
  return {"head/kernel": np.ascontiguousarray(kernel), "head/bias": bias}


def _split(weight: np.ndarray, bias: np.ndarray, to: str, heads: int) -> dict[str, np.ndarray]:
  """A projection to queries, keys or values, its outputs split into heads."""
  kernel = np.ascontiguousarray(weight.T).reshape(weight.shape[1], heads, -1)
  return {f"{to}/kernel": kernel, f"{to}/bias": bias.reshape(heads, -1)}


def _merge(flat: dict[str, np.ndarray], heads: int) -> dict[str, np.ndarray]:
  """The projection after attention, its inputs split into heads."""
  split = lambda a: a.reshape(heads, -1, a.shape[1])  # noqa: E731
  return {name: split(a) if name.endswith("/kernel") else a for name, a in flat.items()}


def _bias(a: Arrays, name: str) -> np.ndarray:
  """The bias of a layer, zeros where it has none."""
  bias = a.get(f"{name}.bias")
  return np.zeros(len(a[f"{name}.weight"]), np.float32) if bias is None else bias


def _dense(a: Arrays, name: str, to: str, scale: np.ndarray | None = None) -> dict[str, np.ndarray]:
  kernel, bias = a[f"{name}.weight"].T, a[f"{name}.bias"]
  if scale is not None:
    kernel, bias = kernel * scale[None], bias * scale
  return {f"{to}/kernel": np.ascontiguousarray(kernel), f"{to}/bias": bias}


def _norm(a: Arrays, name: str, to: str) -> dict[str, np.ndarray]:
  return {f"{to}/scale": a[f"{name}.weight"], f"{to}/bias": a[f"{name}.bias"]}
