"""Which patches the logit of an image's class rests on, at each patch size (the paper's figure 13, top).

Usage:
  python tools/paper/relevance.py runs/digits --config configs/digits.py --out runs/relevance \
    [--seqhw 2,4,8] [--examples 512]

Attention relevance (`flexivit_jax.analyses.relevance`) for the class that the label names: all sizes answer the same.
Of each pair of sizes the Pearson correlation of their maps over the places, mean over images, both maps brought to the
smaller number of rows and columns by the average over each cell's area; and, to compare with, the same between an
image's map and that of the next image. Into OUT: relevance.json, relevance.csv, and relevance.png: the first images,
and over each the maps from the coarsest to the finest size.
"""

import functools
import itertools
import json
import pathlib
from typing import Any

import jax
import matplotlib.pyplot as plt
import numpy as np
from matplotlib import colors

from flexivit_jax import cli, errors, resize
from flexivit_jax.analyses import opening, relevance
from flexivit_jax.evaluators import results
from flexivit_jax.evaluators.per_size import PerSize, sizes_of
from flexivit_jax.sizes import size_label

IMAGES = 4
HEAT = colors.LinearSegmentedColormap.from_list("heat", [(1, 0.45, 0, 0), (1, 0.55, 0, 0.85)])
AT_ONCE = 4  # of a ViT-B with 30 x 30 tokens the weights alone are half a gigabyte an image


def maps(params: Any, batch: Any, *, model: Any, **size: Any) -> dict[str, jax.Array]:
  """The maps [n, gh, gw] for the classes that the labels name; with the labels and the mask."""

  def one(image: jax.Array, asked: jax.Array) -> jax.Array:
    return relevance.relevance(model, params, image[None], asked[None], **size).map[0]

  pairs = batch["image"], batch["labels"].argmax(axis=-1)
  made = jax.lax.map(lambda pair: one(*pair), pairs, batch_size=AT_ONCE)
  return {"map": made, "labels": batch["labels"], "_mask": batch["_mask"]}


def collect(runner: PerSize, params: Any, data: Any, examples: int) -> list[np.ndarray]:
  """The maps [n, gh, gw] of each size, of at most so many examples.

  Raises:
    UserError: labels that are not of one class an image; fewer than two images.
  """
  parts: list[list[np.ndarray]] = [[] for _ in runner.sizes]
  for outputs in runner.outputs(params, data):
    found = [jax.device_get(outputs[key]) for key in runner.sizes]
    real = found[0]["_mask"] > 0
    check_labels(found[0]["labels"][real])
    for part, made in zip(parts, found, strict=True):
      part.append(made["map"][real])
    if sum(map(len, parts[0])) >= examples:
      break
  whole = [np.concatenate(part)[:examples] for part in parts]
  if len(whole[0]) < 2:
    raise errors.UserError(f"Maps of {len(whole[0])} images; it takes another image to compare.")
  return whole


def check_labels(labels: np.ndarray) -> None:
  """Raises a UserError where a label [n, k] is not a one among zeros."""
  if not (((labels == 0) | (labels == 1)).all() and (labels.sum(axis=1) == 1).all()):
    raise errors.UserError(
      "Relevance is for one class an image; expected labels of one 1 among 0s."
    )


def together(one: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Maps [n, h, w] of two grids on the smaller number of rows and columns, as [n, places]."""
  grid = min(one.shape[1], other.shape[1]), min(one.shape[2], other.shape[2])

  def bring(maps: np.ndarray) -> np.ndarray:
    cells = np.moveaxis(maps, 0, -1).astype(np.float64)
    return np.asarray(resize.resize_grid(cells, grid, "area")).reshape(-1, len(maps)).T

  return bring(one), bring(other)


def correlation(one: np.ndarray, other: np.ndarray) -> np.ndarray:
  """Pearson's of each row of [n, places]; NaN where one is the same at all places."""
  a, b = (x - x.mean(axis=1, keepdims=True) for x in (one, other))
  with np.errstate(invalid="ignore"):
    return (a * b).sum(axis=1) / np.sqrt((a**2).sum(axis=1) * (b**2).sum(axis=1))


def pair(names: tuple[str, str], one: np.ndarray, other: np.ndarray) -> dict[str, Any]:
  """A row of the table: how alike the maps of two sizes are, and those of an image and the next."""
  a, b = together(one, other)
  own, next_image = correlation(a, b), correlation(a, np.roll(b, -1, axis=0))
  known = int(np.isfinite(own).sum())
  if not known:
    raise errors.UserError(f"At {' or '.join(names)} no image's map differs between places.")
  return {
    "seqhw": names[0],
    "other": names[1],
    "correlation": float(np.nanmean(own)),
    "error": float(np.nanstd(own) / np.sqrt(known)),
    "other_image": float(np.nanmean(next_image)),
    "examples": known,
  }


def draw(path: pathlib.Path, images: np.ndarray, found: dict[str, np.ndarray]) -> None:
  """A row for each image: itself, and the map of each size laid over it, clear at 0, opaque at the map's largest."""
  rows, columns = len(images), 1 + len(found)
  figure, axes = plt.subplots(
    rows, columns, figsize=(1.4 * columns + 0.8, 1.4 * rows + 0.3), layout="constrained", squeeze=False
  )  # fmt: skip
  h, w = images.shape[1:3]
  place = {"vmin": 0, "vmax": 1, "extent": (0, w, h, 0)}
  for row, image in enumerate(np.clip((images + 1) / 2, 0, 1)):
    gray = image.mean(axis=-1)
    axes[row, 0].imshow(image if image.shape[-1] == 3 else gray, cmap="gray", **place)
    for axis, values in zip(axes[row, 1:], found.values(), strict=True):
      axis.imshow(0.1 + 0.6 * gray, cmap="gray", **place)  # so that the color stands out
      drawn = axis.imshow(values[row] / max(values[row].max(), 1e-30), cmap=HEAT, **place)
  for axis, title in zip(axes[0], ["image", *found], strict=True):
    axis.set_title(title, fontsize=9)
  for axis in axes.ravel():
    axis.set_axis_off()
  bar = figure.colorbar(drawn, ax=axes, shrink=0.6, aspect=30, ticks=[0, 1])
  bar.ax.set_facecolor("0.3")
  bar.ax.tick_params(labelsize=8)
  bar.set_label("relevance, of the map's largest", fontsize=8)
  figure.savefig(path, dpi=150)
  plt.close(figure)


def main() -> None:
  """Measures, writes, and prints how alike the maps of each pair of sizes are."""
  parser = opening.parser(__doc__)
  parser.add_argument("--examples", type=int, default=512, help="so many of the first")
  args, (model, params, data, mesh, seqhw, *_) = opening.open_checkpoint(parser)
  first = next(iter(data))
  images = np.asarray(first["image"][first["_mask"] > 0][:IMAGES])

  def grid(size: dict[str, Any]) -> Any:
    return model.grid(images.shape[1:3], **size)

  sizes = sorted(sizes_of(seqhw), key=lambda size: np.prod(grid(size).grid_hw))
  fn = functools.partial(maps, model=model)
  runner = PerSize(fn, model, data, mesh, sizes=sizes, inputs=("image", "labels"))
  if len(runner.sizes) < 2:
    raise errors.UserError(f"--seqhw {args.seqhw}: it takes two sizes to compare.")
  runner.compile(params)
  names = [size_label(runner.names(size)) for size in runner.sizes.values()]
  if one := [
    n
    for n, size in zip(names, runner.sizes.values(), strict=True)
    if np.prod(grid(size).grid_hw) == 1
  ]:
    raise errors.UserError(
      f"At {one[0]} there is one patch, and nothing to correlate; leave it out of --seqhw."
    )
  patches = ["{} x {} px".format(*grid(size).patch_hw) for size in runner.sizes.values()]
  found = collect(runner, params, data, args.examples)
  rows = [
    pair((names[i], names[j]), found[i], found[j])
    for i, j in itertools.combinations(range(len(names)), 2)
  ]
  args.out.mkdir(parents=True, exist_ok=True)
  (args.out / "relevance.json").write_text(json.dumps(rows, indent=1) + "\n")
  results.write_csv(args.out / "relevance.csv", rows)
  draw(args.out / "relevance.png", images[: args.examples], dict(zip(patches, found, strict=True)))
  for row in rows:
    print(
      f"{row['seqhw']} and {row['other']}: correlation {row['correlation']:.2f} +- {row['error']:.2f} over"
      f" {row['examples']} images (with the next image's map {row['other_image']:.2f})"
    )


if __name__ == "__main__":
  cli.tool(main)
