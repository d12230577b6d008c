"""Whether a FlexiViT goes by shape or by texture, at each patch size (the paper's figure 25).

Usage:
  python tools/paper/shape_texture.py CHECKPOINT IMAGES --out runs/shape [--seqhw 5,8,15,30] [--size 240]

IMAGES holds the cue conflicts of Geirhos et al. (arXiv 1811.12231), SHAPE/<shape><number>-<texture><number>.png: the
folder stimuli/style-transfer-preprocessed-512 of github.com/rgeirhos/texture-vs-shape, 1,280 images of 16 categories,
of which those whose shape and texture agree are left out. CHECKPOINT is of a model of ImageNet-1k's 1000 classes. The
category with the largest mean probability of its classes is the decision; shape bias is the share of shape among the
decisions for shape or texture. Into OUT: shape_texture.json, shape_texture.csv, shape_texture.png.
"""

import argparse
import functools
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import matplotlib.pyplot as plt
import numpy as np

from flexivit_jax import cli, data, errors, sizes, weights
from flexivit_jax.analyses import cue_conflict
from flexivit_jax.budget import calibration
from flexivit_jax.data import label_maps
from flexivit_jax.devices import sharding
from flexivit_jax.evaluators import results
from flexivit_jax.evaluators.per_size import PerSize, sizes_of
from flexivit_jax.models import grid
from flexivit_jax.sizes import size_label

PP = "decode|resize_small({small})|central_crop({size})|value_range(-1, 1)|keep('image')"
BATCH = 64


def logits(params: Any, batch: Any, *, model: Any, **size: Any) -> tuple[jax.Array, jax.Array]:
  """Of a batch, with its mask."""
  return model.apply({"params": params}, batch["image"], **size)[0], batch["_mask"]


def batches(images: Sequence[cue_conflict.Conflict], size: int) -> data.EvalBatches:
  """The images in their order, prepared as in the other evaluations: of 272 pixels the central 240."""

  def read(indices: Sequence[int]) -> list[dict[str, Any]]:
    paths = [images[i].path for i in indices]
    return [{"image": p.read_bytes(), "label": 0, "id": str(p)} for p in paths]

  source = data.Source("cue_conflict", "all", 1, None, len(images), read)
  pp = PP.format(small=round(size * 272 / 240), size=size)
  return data.eval_batches(source, pp, batch_size=BATCH)


def measure(
  model: Any,
  params: Any,
  images: Sequence[cue_conflict.Conflict],
  categories: Mapping[str, Sequence[int]],
  *,
  seqhw: Sequence[Any],
  size: int,
) -> list[dict[str, Any]]:
  """Rows of `cue_conflict.rows` for each size, each with what names it and "patch", pixels (of a square as large).

  Raises:
    UserError: a model of another number of classes, or a size that does not divide the image.
  """
  if model.num_classes != label_maps.NUM_I1K:
    raise errors.UserError(
      f"The model has {model.num_classes} classes; expected the {label_maps.NUM_I1K} of ImageNet-1k, of which the"
      " categories are made."
    )
  fn = functools.partial(logits, model=model)
  loaded, mesh = batches(images, size), sharding.make_mesh()
  runner = PerSize(fn, model, loaded, mesh, sizes=sizes_of(seqhw), inputs=("image",))
  runner.compile(params)
  parts = [jax.device_get(outputs) for outputs in runner.outputs(params, loaded)]
  rows = []
  for key, static in runner.sizes.items():
    found = np.concatenate([part[key][0][part[key][1] > 0] for part in parts])
    decisions = cue_conflict.decide(np.exp(calibration.log_softmax(found)), categories)
    patch = math.sqrt(math.prod(model.grid((size, size), **static).patch_hw))
    names = {"seqhw": size_label(runner.names(static)), "patch": round(patch, 2)}
    rows += [names | row for row in cue_conflict.rows(images, decisions, list(categories))]
  return rows


def draw(path: pathlib.Path, rows: Sequence[dict[str, Any]]) -> None:
  """Shape bias against patch size: all images with the interval, and a point for each category."""
  figure, axes = plt.subplots(figsize=(6.0, 4.0), layout="constrained")
  known = sorted((r for r in rows if r["shape_bias"] is not None), key=lambda r: r["patch"])
  whole = [r for r in known if r["category"] == cue_conflict.ALL]
  single = [r for r in known if r["category"] != cue_conflict.ALL]
  axes.plot(
    [r["patch"] for r in single], [100 * r["shape_bias"] for r in single], ".", color="#9aa3ad",
    markersize=4, label="images of one shape category",
  )  # fmt: skip
  middle = np.array([r["shape_bias"] for r in whole])
  ends = np.array([[r["low"], r["high"]] for r in whole]).reshape(-1, 2).T
  axes.errorbar(
    [r["patch"] for r in whole], 100 * middle, yerr=100 * np.abs(ends - middle[None]), fmt="-o",
    color="#0072b2", capsize=3, label="all, with 95 % interval",
  )  # fmt: skip
  axes.set_xscale("log")
  patches = sorted({r["patch"] for r in rows})
  axes.set_xticks(patches, [f"{p:g}" for p in patches], minor=False)
  axes.set_xticks([], minor=True)
  axes.set_ylim(-3, 103)
  axes.set_xlabel("patch size (pixels)")
  axes.set_ylabel("shape bias (%)")
  axes.legend(frameon=False, fontsize=8)
  figure.savefig(path, dpi=150)
  plt.close(figure)


def main() -> None:
  """Measures, writes, and prints."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("checkpoint", type=pathlib.Path)
  parser.add_argument("images", type=pathlib.Path)
  parser.add_argument("--out", type=pathlib.Path, required=True)
  parser.add_argument(
    "--seqhw", default="5,8,15,30", help="or e.g. 4x6; 'all': patches of 8 to 48 pixels"
  )
  parser.add_argument("--size", type=int, default=240, help="pixels of an image's side")
  args = parser.parse_args()
  categories = label_maps.cue_conflict()
  images = cue_conflict.conflicts(args.images, list(categories))
  model, params = weights.load(args.checkpoint)
  seqhw = sizes.parse(args.seqhw, grid.paper_sizes(args.size))
  rows = measure(model, params, images, categories, seqhw=seqhw, size=args.size)
  args.out.mkdir(parents=True, exist_ok=True)
  (args.out / "shape_texture.json").write_text(json.dumps(rows, indent=1) + "\n")
  results.write_csv(args.out / "shape_texture.csv", rows)
  draw(args.out / "shape_texture.png", rows)
  for row in (r for r in rows if r["category"] == cue_conflict.ALL):
    decided = f"{row['shape'] + row['texture']} of {row['n']} images decided for shape or texture"
    bias = "no shape bias"
    if row["shape_bias"] is not None:
      bias = f"shape bias {row['shape_bias']:.1%} ({row['low']:.1%} to {row['high']:.1%})"
    print(f"seqhw {row['seqhw']}, patch {row['patch']:g}: {bias}, {decided}")


if __name__ == "__main__":
  cli.tool(main)
