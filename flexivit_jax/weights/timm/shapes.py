"""Names and shapes of the arrays of timm's Vision Transformers, and where their tokens' positions are."""

import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from flexivit_jax import errors
from flexivit_jax.sizes import Size
from flexivit_jax.trees import Arrays
from flexivit_jax.weights.big_vision import Fields

KERNEL, FC1, LATENT = "patch_embed.proj.weight", "blocks.0.mlp.fc1.weight", "attn_pool.latent"
TOKENS = ("cls_token", "dist_token", "reg_token")  # in the order in which timm puts them

Shapes = dict[str, tuple[int, ...]]


def prefix_length(a: Arrays) -> int:
  """Returns the number of tokens before those of the patches."""
  return sum(a[name].shape[1] for name in TOKENS if name in a and a[name].ndim == 3)


def square_grid(length: int, prefix: int) -> Size:
  """Returns the square grid of `length` positions; all, none or (DINOv2's files) the first prefix token has one."""
  left = [length - n for n in sorted({0, min(1, prefix), prefix}) if length > n]
  fits = [cells for cells in left if math.isqrt(cells) ** 2 == cells]
  if len(fits) > 1:
    raise errors.UserError(
      f"pos_embed has {length} positions, {prefix} tokens stand before the grid, and it may have"
      f" {' or '.join(map(str, fits))} cells; give posemb_size=(h, w)."
    )
  if not fits:
    raise errors.UserError(
      f"pos_embed has {length} positions, no square grid, with or without those of the {prefix} tokens before it;"
      " give posemb_size=(h, w)."
    )
  return math.isqrt(fits[0]), math.isqrt(fits[0])


def with_position(a: Arrays, grid: Sequence[int]) -> int:
  """Returns how many of the tokens before the grid have a position."""
  left = a["pos_embed"].shape[1] - math.prod(grid)
  return left if left in (min(1, prefix_length(a)), prefix_length(a)) else 0


def expected(a: Arrays, f: Fields) -> dict[str, jax.ShapeDtypeStruct]:
  """Returns names and shapes of the arrays, in timm's names, of a ViT with these fields."""
  d, k, grid = f["width"], f["num_classes"], f.get("posemb_size", (0, 0))
  tokens = {name: a[name].shape[1] if name == "reg_token" else 1 for name in TOKENS if name in a}
  tokens |= {"cls_token": 1} if "tok" in f["pool_type"] else {}
  block = _expected_block(d, f["mlp_dim"], scaled=any(".ls1." in name for name in a))
  shapes = {f"blocks.{i}.{name}": s for i in range(f["depth"]) for name, s in block.items()}
  shapes |= {KERNEL: (d, a[KERNEL].shape[1], *f["patch_size"])}
  shapes |= {name: (1, length, d) for name, length in tokens.items()}
  shapes |= {"pos_embed": (1, math.prod(grid) + ("pos_embed" in a and with_position(a, grid)), d)}
  shapes |= _norm_shapes(d, [final_norm(a)] + ["norm_pre"] * f["pre_norm"])
  if not f["pre_norm"]:  # CLIP's patch embedding has none
    shapes["patch_embed.proj.bias"] = (d,)
  if f["pool_type"] == "map":
    shapes |= _expected_pool(d, f["mlp_dim"])
  if k or any(name.startswith("head") for name in a):
    heads = ["head", "head_dist"] if "dist_token" in a else ["head"]
    shapes |= _dense_shapes({head: (k, d) for head in heads})
  return {name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in shapes.items()}


def _expected_block(d: int, mlp: int, *, scaled: bool) -> Shapes:
  dense = {"attn.qkv": (3 * d, d), "attn.proj": (d, d), "mlp.fc1": (mlp, d), "mlp.fc2": (d, mlp)}
  scales: Shapes = {"ls1.gamma": (d,), "ls2.gamma": (d,)} if scaled else {}
  return _dense_shapes(dense) | _norm_shapes(d, ["norm1", "norm2"]) | scales


def _expected_pool(d: int, mlp: int) -> Shapes:
  dense = {"q": (d, d), "kv": (2 * d, d), "proj": (d, d), "mlp.fc1": (mlp, d), "mlp.fc2": (d, mlp)}
  shapes = _dense_shapes(dense) | _norm_shapes(d, ["norm"]) | {"latent": (1, 1, d)}
  return {f"attn_pool.{name}": shape for name, shape in shapes.items()}


def _dense_shapes(dense: Mapping[str, tuple[int, int]]) -> Shapes:
  kernels: Shapes = {f"{name}.weight": shape for name, shape in dense.items()}
  return kernels | {f"{name}.bias": shape[:1] for name, shape in dense.items()}


def _norm_shapes(d: int, norms: Sequence[str]) -> Shapes:
  return {f"{norm}.{leaf}": (d,) for norm in norms for leaf in ("weight", "bias")}


def final_norm(a: Arrays) -> str:
  """Returns the name of the norm after the blocks; before or after the pooling is the same for one token."""
  return "fc_norm" if "fc_norm.weight" in a else "norm"
