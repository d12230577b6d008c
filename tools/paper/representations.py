"""How alike a FlexiViT's representations are at different patch sizes: CKA of all pairs of layers and sizes.

Usage:
  python tools/paper/representations.py runs/digits --config configs/digits.py --out runs/cka [--seqhw 2,4,8]

For each size and block: what attention and what the MLP adds to the tokens of the patches, brought to the coarsest of
the grids by a linear, antialiased resize (as of position embeddings), so that features of all sizes are of the same
places; and the pooled representation, as it is. CKA over minibatches (see `similarity`), its arc-cosine as a distance,
and a map of these. Into OUT: cka.json, cka.csv, cka.png (the matrix), map.png; and of a model with a class token the
same of that token after each block: class_token_cka.json and so on. Where a layer is the same for all examples CKA is
not defined: null in the JSON, empty in the CSV, blank in the pictures.
"""

import csv
import functools
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import matplotlib.pyplot as plt
import numpy as np

from flexivit_jax import cli, resize
from flexivit_jax.analyses import opening, similarity
from flexivit_jax.evaluators.per_size import PerSize, sizes_of
from flexivit_jax.sizes import size_label

PARTS = ("sa", "mlp")


def features(
  params: Any, batch: Any, *, model: Any, grid: tuple[int, int], **size: Any
) -> tuple[dict[str, list[jax.Array]], jax.Array]:
  """Of each layer [n, p], those of the patches at places of `grid`, and of the class token; the mask of the batch."""
  image = batch["image"]
  _, out = model.apply({"params": params}, image, **size)
  own = model.grid(image.shape[1:3], **size).grid_hw
  blocks = [out["encoder"][k] for k in sorted(out["encoder"]) if k.startswith("block")]

  def placed(tokens: Any) -> Any:
    cells = tokens[:, model.prefix_length :].reshape(len(image), *own, -1)
    return jax.vmap(lambda t: resize.resize_grid(t, grid))(cells).reshape(len(image), -1)

  pooled = out["pre_logits"]
  found = {"": [*(placed(block[part]) for block in blocks for part in PARTS), pooled]}
  if "tok" in model.pool_type:
    found["class_token_"] = [*(block["+mlp"][:, 0] for block in blocks), pooled]
  return found, batch["_mask"]


def layers(model: Any) -> dict[str, list[str]]:
  """Their names, in the order of `features`."""
  blocks = range(model.depth)
  found = {"": [*(f"block {i} {part}" for i in blocks for part in PARTS), "pooled"]}
  if "tok" in model.pool_type:
    found["class_token_"] = [*(f"block {i}" for i in blocks), "pooled"]
  return found


def draw_matrix(
  path: pathlib.Path, matrix: np.ndarray, sizes: Sequence[str], per_size: int
) -> None:
  """The whole matrix, a block of rows for each size."""
  figure, axes = plt.subplots(figsize=(6.4, 5.6), layout="constrained")
  shown = axes.imshow(matrix, vmin=0, vmax=1, cmap="cividis")
  middles = [per_size * (i + 0.5) - 0.5 for i in range(len(sizes))]
  axes.set_xticks(middles, sizes)
  axes.set_yticks(middles, sizes)
  for edge in range(1, len(sizes)):
    axes.axhline(per_size * edge - 0.5, color="white", linewidth=0.8)
    axes.axvline(per_size * edge - 0.5, color="white", linewidth=0.8)
  axes.set_xlabel("tokens a side; within each, layers from first to last")
  figure.colorbar(shown, label="CKA")
  figure.savefig(path, dpi=150)
  plt.close(figure)


def draw_map(path: pathlib.Path, points: np.ndarray, sizes: Sequence[str], per_size: int) -> None:
  """The layers of each size as a line, from the first (a ring) to the pooled representation (a star)."""
  figure, axes = plt.subplots(figsize=(6.4, 4.8), layout="constrained")
  colors = plt.get_cmap("viridis")(np.linspace(0, 0.85, len(sizes)))
  for i, size in enumerate(sizes):
    own = points[per_size * i : per_size * (i + 1)]
    axes.plot(*own.T, "-o", color=colors[i], markersize=3, linewidth=1, label=size)
    axes.plot(*own[0], "o", color=colors[i], markersize=9, markerfacecolor="white")
    axes.plot(*own[-1], "*", color=colors[i], markersize=13)
  axes.set_aspect("equal")
  axes.set_xlabel("first axis (radians)")
  axes.set_ylabel("second axis (radians)")
  axes.legend(title="tokens a side", frameon=False)
  figure.savefig(path, dpi=150)
  plt.close(figure)


def main() -> None:
  """Measures, writes, and prints how alike each size is to the last one, by layer."""
  parser = opening.parser(__doc__)
  parser.add_argument(
    "--examples", type=int, default=1024, help="stop after so many, at the end of a batch"
  )
  args, (model, params, data, mesh, seqhw, *_) = opening.open_checkpoint(parser)
  image_hw = next(iter(data))["image"].shape[1:3]
  sizes = sizes_of(seqhw)
  grids = [model.grid(image_hw, **size).grid_hw for size in sizes]
  coarsest = (min(g[0] for g in grids), min(g[1] for g in grids))
  fn = functools.partial(features, model=model, grid=coarsest)
  runner = PerSize(fn, model, data, mesh, sizes=sizes, inputs=("image",))
  runner.compile(params)
  names = [size_label(runner.names(size)) for size in runner.sizes.values()]
  kinds = layers(model)
  found = {k: similarity.MinibatchCKA(len(sizes) * len(v)) for k, v in kinds.items()}
  seen = 0
  for outputs in runner.outputs(params, data):
    everything = jax.device_get([outputs[key] for key in runner.sizes])
    real = everything[0][1] > 0
    if real.sum() >= 4:
      for kind, of_kind in found.items():
        of_kind.update([x[real] for each, _ in everything for x in each[kind]])
      seen += int(real.sum())
    if seen >= args.examples:
      break
  args.out.mkdir(parents=True, exist_ok=True)
  about = {"checkpoint": str(args.checkpoint), "examples": seen, "grid": coarsest}
  for kind, of_kind in found.items():
    matrix = of_kind.result()
    write(args.out, kind, matrix, names, kinds[kind], about)
    print(
      f"{kind or 'patches'}, {seen} examples; CKA with the same layer at {names[-1]} tokens a side:"
    )
    print("\n".join(lines(matrix, names, kinds[kind])))


def lines(matrix: np.ndarray, sizes: Sequence[str], layers: Sequence[str]) -> list[str]:
  """For each layer how alike each size is to the last."""
  count, found = len(layers), []
  for j, layer in enumerate(layers):
    values = matrix[j::count, len(matrix) - count + j]
    each = ", ".join(
      f"{n} " + ("not defined" if np.isnan(v) else f"{v:.2f}")
      for n, v in zip(sizes, values, strict=True)
    )
    found.append(f"{layer:>12}: {each}")
  return found


def defined(matrix: np.ndarray) -> list[list[float | None]]:
  """Its rows; None for what is not a number."""
  return [[None if np.isnan(v) else float(v) for v in row] for row in matrix]


def write(
  out: pathlib.Path,
  kind: str,
  matrix: np.ndarray,
  sizes: Sequence[str],
  layers: Sequence[str],
  about: dict[str, Any],
) -> None:
  """The files of one kind of features; `kind` is what their names begin with."""
  points = similarity.embed(similarity.arc_cosine(matrix))
  rows = [f"{name} | {layer}" for name in sizes for layer in layers]
  made = {**about, "rows": rows, "cka": defined(matrix), "map": defined(points)}
  (out / f"{kind}cka.json").write_text(json.dumps(made, allow_nan=False) + "\n")
  with (out / f"{kind}cka.csv").open("w", newline="") as file:
    csv.writer(file).writerows(
      [["", *rows], *([r, *v] for r, v in zip(rows, defined(matrix), strict=True))]
    )
  draw_matrix(out / f"{kind}cka.png", matrix, sizes, len(layers))
  draw_map(out / f"{kind}map.png", points, sizes, len(layers))


if __name__ == "__main__":
  cli.tool(main)
