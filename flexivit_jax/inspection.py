"""`flexivit inspect`: what a file with weights holds, and what its arrays do not say."""

import argparse
from typing import Any

from flexivit_jax import arguments, errors, trees, weights
from flexivit_jax.models import FlexiViT
from flexivit_jax.models.flexivit import common_divisors
from flexivit_jax.weights import registry


def run(args: argparse.Namespace) -> None:
  """Prints what is in args.file, or the published checkpoints."""
  if args.list == (args.file is not None):
    raise errors.UserError("Give a file or a published name to inspect, or --list alone.")
  if args.list:
    print("\n".join(listing()))
    return
  model, params, record = weights.load_with_record(args.file, **arguments.loading(args))
  print("\n".join(describe(model, params, record)))


def listing() -> list[str]:
  """Returns a line for each published checkpoint, under a heading; the address ends in one more of its names."""
  files = dict.fromkeys(
    (p.name, p.timm, p.expected.get("num_classes", ""), p.url) for p in registry.PUBLISHED.values()
  )
  rows = [("name", "in timm", "classes", "address"), *files]
  return [f"{name:24} {timm:28} {classes:>7}  {url}" for name, timm, classes, url in rows]


def describe(model: FlexiViT, params: dict, record: dict[str, Any]) -> list[str]:
  """Returns a line for each thing to know."""
  head = f"{model.num_classes} classes" if model.num_classes else "no head"
  size = f"width {model.width}, depth {model.depth}, mlp {model.mlp_dim}, {model.num_heads} heads"
  patch, grid = (_by(record[key]) for key in ("native_patch_size", "native_grid"))
  rows = {
    "format": record["format"],
    "source": f"{record['source']['file']}, {record['source']['format']}",
    "architecture": f"{size}, pool {model.pool_type}, {head}",
    "parameters": f"{trees.count(params):,}",
    "native size": f"kernel {patch} pixels, position grid {grid}",
    "activation": f"gelu {model.gelu}, LayerNorm eps {model.layer_norm_eps:g}",
    "position": record["position"],
    "resized by": f"kernel {model.kernel_operator}, grid {model.grid_operator}",
    "image": _image(record.get("image_size") or record.get("image_shape")),
  }
  if "url" in record:
    rows["fetched from"] = record["url"]
  if "flexified_from" in record:
    rows["flexified"] = f"kernel {_by(model.patch_size)} pixels, grid {_by(model.posemb_size)}"
  lines = [f"{name:13} {value}" for name, value in rows.items()]
  return lines + [f"note: {note}" for note in record["notes"]]


def _image(size: list[int] | None) -> str:
  if size is None:
    return "any size; for FlexiViT usually 240x240"
  sizes = ", ".join(map(str, common_divisors((size[0], size[1]))))
  return f"{_by(size[:2])}; seqhw that divide it: {sizes}"


def _by(size: Any) -> str:
  return "x".join(map(str, size))
