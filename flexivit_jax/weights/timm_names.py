"""timm's names for a Vision Transformer, turned into big_vision's.

What is folded, exactly up to rounding: the class token's position into the class token; LayerScale (DeiT-III,
DINOv2) into the projections before it is applied, `gamma * (W x + b) = (gamma W) x + gamma b`; the mean and standard
deviation of the input into the patch embedding.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from flexivit_jax import errors, trees
from flexivit_jax.models import vit
from flexivit_jax.weights import big_vision

_KERNEL, _FC1 = "patch_embed.proj.weight", "blocks.0.mlp.fc1.weight"
_UNLIKE = {
  "fc_norm.weight": "timm averages the tokens and then normalises (fc_norm), a FlexiViT does it the other way round",
  "reg_token": "register tokens",
  "attn_pool.latent": "attention pooling in timm's names",
  "dist_token": "a distillation token",
}

Arrays = Mapping[str, np.ndarray]


class Converted(NamedTuple):
  """Parameters by big_vision's names, the fields of their FlexiViT, and what a user should know about them."""

  flat: dict[str, np.ndarray]
  fields: dict[str, Any]
  notes: list[str]


def is_timm(arrays: Arrays) -> bool:
  """Whether the names are those of a timm Vision Transformer, or nearly."""
  return any(name.startswith(("patch_embed.", "blocks.")) for name in arrays)


def convert(arrays: Arrays, fields: Mapping[str, Any]) -> Converted:
  """Turns a timm state dict into ours; `fields` are those given by the caller.

  Raises:
    UserError: a model that is no FlexiViT, names or shapes that do not fit (all listed), an unknown number of heads.
  """
  big_vision.require(arrays, {_KERNEL: 4, _FC1: 2}, "a Vision Transformer in timm's")
  for name, why in _UNLIKE.items():
    if name in arrays:
      raise errors.UserError(f"The file has {name}: {why}; such models are not supported.")
  found, notes = _infer(arrays, fields)
  lines = trees.diff(_expected(arrays, found), dict(arrays), max_lines=len(arrays) * 4)
  if lines:
    raise errors.UserError("The arrays are not those of timm's ViT:\n  " + "\n  ".join(lines))
  return Converted(_convert(arrays, found), found, notes)


def fold_input(
  flat: dict[str, np.ndarray], mean: Sequence[float], std: Sequence[float]
) -> dict[str, np.ndarray]:
  """Lets a model that was trained on `(pixel - mean) / std`, pixels in [0, 1], take pixels in [-1, 1].

  Exact at the kernel's own size and above; where the kernel shrinks, a constant image keeps its token only nearly.

  Raises:
    UserError: not one number for each channel, or a standard deviation that is not positive.
  """
  kernel = flat["embedding/kernel"].astype(np.float64)
  channels = kernel.shape[2]
  if len(mean) != channels or len(std) != channels or min(std) <= 0:
    raise errors.UserError(
      f"mean={tuple(mean)}, std={tuple(std)}: expected {channels} numbers each, std positive."
    )
  scale, shift = 0.5 / np.asarray(std), (0.5 - np.asarray(mean)) / np.asarray(std)
  bias = flat["embedding/bias"] + np.einsum("hwcd,c->d", kernel, shift)
  kernel = kernel * scale[None, None, :, None]
  return flat | {
    "embedding/kernel": kernel.astype(np.float32),
    "embedding/bias": bias.astype(np.float32),
  }


def _infer(a: Arrays, fields: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
  width, _, *patch_size = a[_KERNEL].shape
  heads, notes = _heads(width, fields)
  found = dict(
    patch_size=tuple(patch_size),
    width=width,
    depth=len({name.split(".")[1] for name in a if name.startswith("blocks.")}),
    mlp_dim=a[_FC1].shape[0],
    num_heads=heads,
    pool_type="tok" if "cls_token" in a else "gap",
    num_classes=a["head.bias"].shape[0] if "head.bias" in a else 0,
    gelu="exact",
    kernel_operator="cubic_antialias",
    grid_operator="cubic_antialias",
  )
  if any(".ls1." in name for name in a):
    notes.append(
      "LayerScale is folded into the projections; DeiT-III and DINOv2 expect ImageNet's mean and"
      " std, which the file does not say: mean=(0.485,0.456,0.406), std=(0.229,0.224,0.225)."
    )
  if "pos_embed" not in a:
    return found, notes
  position, _ = big_vision.split_position(
    a["pos_embed"], a.get("cls_token"), fields.get("posemb_size")
  )
  grid = fields.get("posemb_size") or big_vision.square(position.shape[1])
  if _was_flexible(patch_size, grid, position.shape[1] == a["pos_embed"].shape[1], found):
    found |= {"kernel_operator": "linear", "grid_operator": "linear_antialias"}
    notes.append(_ALREADY_RESIZED)
  return found | {"posemb_size": tuple(grid)}, notes


_ALREADY_RESIZED = (
  "These shapes are those of timm's flexivit_* model.safetensors: the FlexiViT's kernel of 32x32 pixels and its 7x7"
  " positions were already resized for one patch size at 240 px. What the kernel knew of finer detail is lost; other"
  " patch sizes are resized a second time. Take big_vision's .npz (flexivit_b_i1k.npz) or timm's pytorch_model.bin"
  " instead. (flexivit_base.patch16_in21k and patch30_in21k have the same shapes and were never flexible: nothing is"
  " lost there.) All of them were trained with gelu='tanh'; timm runs them with the exact one, and so does this."
)


def _was_flexible(patch: Sequence[int], grid: Sequence[int], bare: bool, found: dict) -> bool:
  """16x16 pixels and 15x15 cells, or 30x30 and 8x8, without a position of the class token."""
  shapes = (*patch, *grid) in {(16, 16, 15, 15), (30, 30, 8, 8)}
  return shapes and bare and found["pool_type"] == "tok" and found["width"] in (384, 768, 1024)


def _heads(width: int, fields: Mapping[str, Any]) -> tuple[int, list[str]]:
  """Heads as given, or as in the published models of this width, or of 64 features each."""
  if fields.get("num_heads"):
    return fields["num_heads"], []
  known = {shape.width: shape.num_heads for shape in vit.VARIANTS.values()}
  if width not in known and width % 64:
    raise errors.UserError(
      f"The number of heads cannot be told from width {width}; give num_heads."
    )
  heads = known.get(width, width // 64)
  return heads, [f"{heads} heads: as usual for width {width}; the arrays do not say."]


def _expected(a: Arrays, f: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
  """The arrays, in timm's names, of a ViT with these fields."""
  d, mlp, channels = f["width"], f["mlp_dim"], a[_KERNEL].shape[1]
  dense = {"attn.qkv": (3 * d, d), "attn.proj": (d, d), "mlp.fc1": (mlp, d), "mlp.fc2": (d, mlp)}
  block: dict[str, tuple[int, ...]] = {f"{name}.weight": shape for name, shape in dense.items()}
  block |= {f"{name}.bias": shape[:1] for name, shape in dense.items()}
  block |= {f"{norm}.{leaf}": (d,) for norm in ("norm1", "norm2") for leaf in ("weight", "bias")}
  if any(".ls1." in name for name in a):
    block |= {"ls1.gamma": (d,), "ls2.gamma": (d,)}
  shapes: dict[str, tuple[int, ...]] = {
    f"blocks.{i}.{name}": shape for i in range(f["depth"]) for name, shape in block.items()
  }
  shapes |= {_KERNEL: (d, channels, *f["patch_size"]), "patch_embed.proj.bias": (d,)}
  shapes |= {"norm.weight": (d,), "norm.bias": (d,)}
  cells = int(np.prod(f.get("posemb_size", (0, 0))))
  with_cls = "pos_embed" in a and "cls_token" in a and a["pos_embed"].shape[1] == cells + 1
  shapes["pos_embed"] = (1, cells + with_cls, d)
  if "cls_token" in a:
    shapes["cls_token"] = (1, 1, d)
  if f["num_classes"] or "head.weight" in a:
    shapes |= {"head.weight": (f["num_classes"], d), "head.bias": (f["num_classes"],)}
  return {name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in shapes.items()}


def _convert(a: Arrays, fields: Mapping[str, Any]) -> dict[str, np.ndarray]:
  position, cls = big_vision.split_position(
    a["pos_embed"], a.get("cls_token"), fields["posemb_size"]
  )
  flat = {
    "embedding/kernel": np.ascontiguousarray(a[_KERNEL].transpose(2, 3, 1, 0)),
    "embedding/bias": a["patch_embed.proj.bias"],
    "pos_embedding": position,
    **_norm(a, "norm", "Transformer/encoder_norm"),
  }
  for i in range(fields["depth"]):
    prefix = f"blocks.{i}."
    block = {n.removeprefix(prefix): array for n, array in a.items() if n.startswith(prefix)}
    converted = _convert_block(block, fields["num_heads"])
    flat |= {f"Transformer/encoderblock_{i}/{name}": array for name, array in converted.items()}
  if fields["num_classes"]:
    flat |= _dense(a, "head", "head")
  return flat | ({} if cls is None else {"cls": cls})


def _convert_block(a: Arrays, heads: int) -> dict[str, np.ndarray]:
  attention, mlp = "MultiHeadDotProductAttention_0", "MlpBlock_0"
  flat = _norm(a, "norm1", "LayerNorm_0") | _norm(a, "norm2", "LayerNorm_1")
  flat |= _dense(a, "mlp.fc1", f"{mlp}/Dense_0")
  flat |= _dense(a, "mlp.fc2", f"{mlp}/Dense_1", a.get("ls2.gamma"))
  flat |= _dense(a, "attn.proj", f"{attention}/out", a.get("ls1.gamma"))
  out, width = f"{attention}/out/kernel", a["norm1.weight"].shape[0]
  flat[out] = flat[out].reshape(heads, -1, width)
  weights, biases = np.split(a["attn.qkv.weight"], 3), np.split(a["attn.qkv.bias"], 3)
  for name, weight, bias in zip(("query", "key", "value"), weights, biases, strict=True):
    flat[f"{attention}/{name}/kernel"] = weight.T.reshape(width, heads, -1)
    flat[f"{attention}/{name}/bias"] = bias.reshape(heads, -1)
  return flat


def _dense(a: Arrays, name: str, to: str, gamma: np.ndarray | None = None) -> dict[str, np.ndarray]:
  kernel, bias = a[f"{name}.weight"].T, a[f"{name}.bias"]
  if gamma is not None:
    kernel, bias = kernel * gamma[None], bias * gamma
  return {f"{to}/kernel": np.ascontiguousarray(kernel), f"{to}/bias": bias}


def _norm(a: Arrays, name: str, to: str) -> dict[str, np.ndarray]:
  return {f"{to}/scale": a[f"{name}.weight"], f"{to}/bias": a[f"{name}.bias"]}
