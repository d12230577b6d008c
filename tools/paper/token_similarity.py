"""Whether tokens of different patch sizes that lie at the same place are alike (the paper's figure 13, bottom).

Usage:
  python tools/paper/token_similarity.py runs/digits --config configs/digits.py --out runs/tokens \
    --seqhw 4 --with 2,3,6,8

Cosine similarity of the last tokens of the patches (after the last LayerNorm) of one grid, --seqhw, with those of
others. The score: how often the token of the other grid that is most alike is one that covers the middle of the patch;
chance is what a random token would score. Into OUT: tokens.json, tokens.csv, and tokens.png: the similarity of the
central token with all tokens, for the first images.
"""

import functools
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import matplotlib.pyplot as plt
import numpy as np

from flexivit_jax import cli, errors, sizes
from flexivit_jax.analyses import opening
from flexivit_jax.evaluators import results
from flexivit_jax.evaluators.per_size import PerSize, sizes_of
from flexivit_jax.sizes import size_label

IMAGES = 4


def tokens(params: Any, batch: Any, *, model: Any, **size: Any) -> tuple[jax.Array, jax.Array]:
  """The patches' last tokens [n, l, d] of length one, and the mask of the batch."""
  _, out = model.apply({"params": params}, batch["image"], **size)
  found = out["encoded"][:, model.prefix_length :]
  return found / jax.numpy.linalg.norm(found, axis=-1, keepdims=True), batch["_mask"]


def same_place(one: Sequence[int], other: Sequence[int]) -> np.ndarray:
  """Bool [l, m]: whether a token of grid `other` covers the middle of a patch of grid `one`, edges included."""

  def axis(a: int, b: int) -> np.ndarray:
    middle = (2 * np.arange(a) + 1) * b  # in units of 1 / (2 a b)
    low, high = 2 * a * np.arange(b), 2 * a * (np.arange(b) + 1)
    return (low[None] <= middle[:, None]) & (middle[:, None] <= high[None])

  return np.kron(axis(one[0], other[0]), axis(one[1], other[1])).astype(bool)


def draw(
  path: pathlib.Path, images: np.ndarray, maps: dict[str, np.ndarray], grid: Sequence[int]
) -> None:
  """A row for each image: itself, with the central patch framed, and the similarity at each other size."""
  rows, columns = len(images), 1 + len(maps)
  figure, axes = plt.subplots(
    rows, columns, figsize=(1.6 * columns, 1.7 * rows), layout="constrained", squeeze=False
  )
  h, w = images.shape[1:3]
  i, j = grid[0] // 2, grid[1] // 2
  for row, image in enumerate(images):
    shown = (image + 1) / 2
    axes[row, 0].imshow(
      shown if shown.shape[-1] == 3 else shown[..., 0], cmap="gray", extent=(0, w, h, 0)
    )
    corner = (w / grid[1] * j, h / grid[0] * i)
    axes[row, 0].add_patch(
      plt.Rectangle(corner, w / grid[1], h / grid[0], fill=False, color="#d55e00")
    )
    for column, (name, values) in enumerate(maps.items(), start=1):
      drawn = axes[row, column].imshow(
        values[row], vmin=-1, vmax=1, cmap="RdBu_r", extent=(0, w, h, 0)
      )
      if row == 0:
        axes[row, column].set_title(f"{name} x {name}" if name.isdigit() else name, fontsize=9)
  for axis in axes.ravel():
    axis.set_xticks([])
    axis.set_yticks([])
  figure.colorbar(drawn, ax=axes, shrink=0.6, label="cosine")
  figure.savefig(path, dpi=150)
  plt.close(figure)


def main() -> None:
  """Measures, writes, and prints the scores."""
  parser = opening.parser(__doc__, required=True, help="the grid whose tokens are looked for")
  parser.add_argument("--with", dest="others", required=True, help="the other grids, e.g. 2,3,6,8")
  parser.add_argument(
    "--examples", type=int, default=512, help="stop after so many, at the end of a batch"
  )
  args, (model, params, data, mesh, *_) = opening.open_checkpoint(parser)
  first = next(iter(data))
  images = np.asarray(first["image"][:IMAGES])
  sought = sizes.parse_one(args.seqhw, "the tokens of one grid are looked for")
  given = (sought, *sizes.parse(args.others, lacking="--with takes the other grids"))
  if len(set(given)) != len(given):
    raise errors.UserError(f"--seqhw {args.seqhw} --with {args.others}: a size stands there twice.")
  static = sizes_of(given)
  grids = [model.grid(images.shape[1:3], **size).grid_hw for size in static]
  fn = functools.partial(tokens, model=model)
  runner = PerSize(fn, model, data, mesh, sizes=static, inputs=("image",))
  runner.compile(params)
  names = [size_label(runner.names(size)) for size in runner.sizes.values()]
  places = [same_place(grids[0], grid) for grid in grids]
  hits, seen, maps = np.zeros(len(static)), 0, {}
  for outputs in runner.outputs(params, data):
    found = jax.device_get([outputs[key] for key in runner.sizes])
    real = found[0][1] > 0
    own = found[0][0][real]
    for k, (theirs, _) in enumerate(found):
      alike = np.einsum("nld,nmd->nlm", own, theirs[real])
      nearest = alike.argmax(axis=2)
      hits[k] += places[k][np.arange(nearest.shape[1]), nearest].sum() / nearest.shape[1]
      if not seen and k:
        centre = (grids[0][0] // 2) * grids[0][1] + grids[0][1] // 2
        maps[names[k]] = alike[:IMAGES, centre].reshape(-1, *grids[k])
    seen += len(own)
    if seen >= args.examples:
      break
  rows = [
    {"seqhw": names[0], "other": name, "same_place": float(h / seen), "chance": float(p.mean()), "examples": seen}
    for name, h, p in zip(names[1:], hits[1:], places[1:], strict=True)
  ]  # fmt: skip
  args.out.mkdir(parents=True, exist_ok=True)
  (args.out / "tokens.json").write_text(json.dumps(rows, indent=1) + "\n")
  results.write_csv(args.out / "tokens.csv", rows)
  draw(args.out / "tokens.png", images, maps, grids[0])
  for row in rows:
    print(
      f"{row['seqhw']} -> {row['other']}: the most alike token covers the place in {row['same_place']:.1%} of the"
      f" patches of {seen} images (chance {row['chance']:.1%})"
    )


if __name__ == "__main__":
  cli.tool(main)
