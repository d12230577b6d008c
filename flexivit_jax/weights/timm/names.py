"""timm's names for a Vision Transformer, turned into big_vision's.

What is folded, exactly up to rounding: the positions of class, distillation and register tokens into these tokens;
LayerScale (DeiT-III, DINOv2) into the projections before it is applied; the two heads of a distilled DeiT, whose mean
timm takes, into one on both tokens; the mean and standard deviation of the input into the patch embedding.
"""

import re
from collections.abc import Sequence

import numpy as np

from flexivit_jax import errors, trees
from flexivit_jax.models import vit
from flexivit_jax.trees import Arrays
from flexivit_jax.weights import big_vision, torch_layout
from flexivit_jax.weights.big_vision import Converted, Fields
from flexivit_jax.weights.timm import shapes as timm_shapes

# timm's names of the parts of a block and of attention pooling.
BLOCK = {
  "norm1": "norm1",
  "qkv": "attn.qkv",
  "out": "attn.proj",
  "scale1": "ls1.gamma",
  "norm2": "norm2",
  "fc1": "mlp.fc1",
  "fc2": "mlp.fc2",
  "scale2": "ls2.gamma",
}
POOL = {
  "probe": "latent",
  "norm": "norm",
  "query": "q",
  "kv": "kv",
  "out": "proj",
  "fc1": "mlp.fc1",
  "fc2": "mlp.fc2",
}


def is_timm(arrays: Arrays) -> bool:
  """Tells whether the names are those of a timm Vision Transformer, or nearly."""
  return any(name.startswith(("patch_embed.", "blocks.")) for name in arrays)


def convert(arrays: Arrays, fields: Fields) -> Converted:
  """Turns a timm state dict into ours; `fields` are those given by the caller.

  Of them, `num_heads`, `posemb_size` and `pool_type` say what arrays leave open. A pool type of "gap" is for a class
  token that takes part but is not the output, "tok" for one that is normalised by an `fc_norm`, "map" for attention
  pooling that sees the class and register tokens too.

  Raises:
    UserError: a model that is no FlexiViT, names or shapes that do not fit (all listed), an unknown number of heads.
  """
  arrays, notes = big_vision.without_pre_logits(_renamed(arrays))
  arrays, more = _with_biases(arrays)
  notes += more
  axes = {timm_shapes.KERNEL: 4, timm_shapes.FC1: 2} | {
    n: 3 for n in (*timm_shapes.TOKENS, "pos_embed") if n in arrays
  }
  big_vision.require(arrays, axes, "a Vision Transformer in timm's")
  _refuse_other_poolings(arrays, fields)
  inferred, more = _infer(arrays, fields)
  lines = trees.diff(timm_shapes.expected(arrays, inferred), arrays, max_lines=len(arrays) * 4)
  if lines:
    raise errors.UserError("The arrays are not those of timm's ViT:\n  " + "\n  ".join(lines))
  return Converted(_convert(arrays, inferred), inferred, notes + more)


def _renamed(arrays: Arrays) -> Arrays:
  """The names of the original DINOv2 and DeiT-III files as timm's."""
  names = {name: re.sub(r"\.gamma_([12])$", r".ls\1.gamma", name) for name in arrays}
  names["register_tokens"] = "reg_token"
  flat = dict(arrays)
  for old, new in names.items():
    if old in flat and new not in flat:
      flat[new] = flat.pop(old)
  return flat


def _with_biases(arrays: Arrays) -> tuple[Arrays, list[str]]:
  """The biases of queries, keys and values that a model does not have, as zeros."""
  kernels = [name for name in arrays if re.fullmatch(r"blocks\.\d+\.attn\.qkv\.weight", name)]
  if not kernels or any(name.endswith("attn.qkv.bias") for name in arrays):
    return arrays, []
  flat = dict(arrays)
  for name in kernels:
    flat[f"{name.removesuffix('weight')}bias"] = np.zeros(arrays[name].shape[0], np.float32)
  return flat, [
    "The model has no biases of queries, keys and values (qkv_bias=False): they are zeros."
  ]


def _refuse_other_poolings(a: Arrays, fields: Fields) -> None:
  """Raises a UserError for the two poolings of timm that no FlexiViT has."""
  if "fc_norm.weight" in a and fields.get("pool_type") != "tok":
    raise errors.UserError(
      "The file has fc_norm.weight: timm averages the tokens and then normalises (fc_norm), a FlexiViT does it the"
      " other way round; such models are not supported. If this one takes the class token, where the order makes no"
      " difference, give pool_type='tok' (in Python, weights.load(FILE, pool_type='tok'))."
    )
  others = [name for name in timm_shapes.TOKENS if name in a]
  if timm_shapes.LATENT in a and others and fields.get("pool_type") != "map":
    raise errors.UserError(
      f"The file has {timm_shapes.LATENT} and {', '.join(others)}: timm's attention pooling leaves such tokens out, a"
      " FlexiViT's does not; such models are not supported. If this one has pool_include_prefix, give pool_type='map'."
    )


def _infer(a: Arrays, fields: Fields) -> tuple[Fields, list[str]]:
  width, _, *patch_size = a[timm_shapes.KERNEL].shape
  heads, notes = _heads(width, fields)
  pool = _pool(a, fields)
  inferred = dict(
    patch_size=tuple(patch_size),
    width=width,
    depth=len({name.split(".")[1] for name in a if name.startswith("blocks.")}),
    mlp_dim=a[timm_shapes.FC1].shape[0],
    num_heads=heads,
    pool_type=pool,
    registers=max(timm_shapes.prefix_length(a) - ("tok" in pool), 0),
    pre_norm="norm_pre.weight" in a,
    layer_norm_eps=1e-5 if "norm_pre.weight" in a else 1e-6,
    num_classes=a["head.bias"].shape[0] if "head.bias" in a else 0,
    gelu="exact",
    kernel_operator="cubic_antialias",
    grid_operator="cubic_antialias",
  )
  notes += [note for told, note in _assumed(a) if told not in fields]
  if "pos_embed" not in a:
    return inferred, notes
  grid = fields.get("posemb_size")
  if grid is None:
    grid = timm_shapes.square_grid(a["pos_embed"].shape[1], timm_shapes.prefix_length(a))
    notes += big_vision.assumed_square(grid)
    if timm_shapes.prefix_length(a) and not timm_shapes.with_position(a, grid):
      notes += big_vision.assumed_bare(grid)
  if _was_flexible(patch_size, grid, timm_shapes.with_position(a, grid) == 0, inferred):
    inferred |= {"kernel_operator": "linear", "grid_operator": "linear_antialias"}
    notes.append(_ALREADY_RESIZED)
  return inferred | {"posemb_size": tuple(grid)}, notes


def _pool(a: Arrays, fields: Fields) -> str:
  if "dist_token" in a:
    return "tok+reg"
  default = "map" if timm_shapes.LATENT in a else "tok" if "cls_token" in a else "gap"
  return fields.get("pool_type") or default


def _assumed(a: Arrays) -> list[tuple[str, str]]:
  """What arrays leave open: pairs of (the field that would say it, a note)."""
  notes = {
    ".ls1.": (
      "",
      "LayerScale is folded into the projections. DeiT-III and DINOv2 expect mean=(0.485,0.456,0.406),"
      " std=(0.229,0.224,0.225), which a config.json says and arrays do not.",
    ),
    "norm_pre.": (
      "layer_norm_eps",
      "A LayerNorm before the blocks is CLIP's: layer_norm_eps=1e-5, as in all of timm's that have one. OpenAI's"
      " want gelu='quick', all of them mean=(0.48145466,0.4578275,0.40821073), std=(0.26862954,0.26130258,0.27577711).",
    ),
    "attn_pool.": (
      "gelu",
      "Attention pooling is SigLIP's: the exact GELU, as most of timm's have it; some of SigLIP 2 want gelu='tanh'.",
    ),
    "dist_token": (
      "",
      "A distilled DeiT: the head takes both tokens, as timm takes the mean of two heads.",
    ),
  }
  return [note for part, note in notes.items() if any(part in name for name in a)]


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


def _heads(width: int, fields: Fields) -> tuple[int, list[str]]:
  """Heads as given, or as in the published models of this width, or of 64 features each."""
  if heads := fields.get("num_heads"):
    if heads < 1 or width % heads:
      raise errors.UserError(f"num_heads={heads} does not divide the width {width}.")
    return heads, []
  usual = {shape.width: shape.num_heads for shape in vit.VARIANTS.values()}
  if width not in usual and width % 64:
    raise errors.UserError(
      f"The number of heads cannot be told from width {width}; give num_heads."
    )
  heads = usual.get(width, width // 64)
  return heads, [f"{heads} heads: as usual for width {width}; the arrays do not say."]


def _convert(a: Arrays, f: Fields) -> Arrays:
  flat = {
    "embedding/kernel": torch_layout.patches_from_torch(a[timm_shapes.KERNEL]),
    "embedding/bias": a.get("patch_embed.proj.bias", np.zeros(f["width"], np.float32)),
    **_convert_tokens(a, f),
    **torch_layout.norm_from_torch(a, timm_shapes.final_norm(a), "Transformer/encoder_norm"),
  }
  if f["pre_norm"]:
    flat |= torch_layout.norm_from_torch(a, "norm_pre", "pre_norm")
  for i in range(f["depth"]):
    block = torch_layout.block_from_torch(
      torch_layout.under(f"blocks.{i}.", a), BLOCK, f["num_heads"]
    )
    flat |= {f"Transformer/encoderblock_{i}/{name}": array for name, array in block.items()}
  if f["pool_type"] == "map":
    pool = torch_layout.pool_from_torch(torch_layout.under("attn_pool.", a), POOL, f["num_heads"])
    flat |= {f"MAPHead_0/{name}": array for name, array in pool.items()}
  return flat | (_convert_head(a) if f["num_classes"] else {})


def _convert_tokens(a: Arrays, f: Fields) -> Arrays:
  """Position grid, class token and registers, to which their own positions are added."""
  position, has_class = a["pos_embed"], "tok" in f["pool_type"]
  n = timm_shapes.with_position(a, f["posemb_size"])
  flat = {"pos_embedding": position[:, n:]}
  present = [a[name] for name in timm_shapes.TOKENS if name in a]
  if not present:
    return flat
  tokens = np.concatenate(present, axis=1)
  tokens[:, :n] += position[:, :n]
  flat |= {"cls": tokens[:, :1]} if has_class else {}
  return flat | ({"registers": tokens[:, has_class:]} if f["registers"] else {})


def _convert_head(a: Arrays) -> Arrays:
  head = torch_layout.dense_from_torch(a, "head", "head")
  if "dist_token" not in a:
    return head
  other = torch_layout.dense_from_torch(a, "head_dist", "head")
  return {
    "head/kernel": np.concatenate([head["head/kernel"], other["head/kernel"]]) / 2,
    "head/bias": (head["head/bias"] + other["head/bias"]) / 2,
  }
