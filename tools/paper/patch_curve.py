"""Accuracy of a fixed Vision Transformer at other patch sizes, under several ways to resize its kernel. No training.

Usage:
  python tools/paper/patch_curve.py CHECKPOINT FOLDER --out runs/curve [--split val] [--seqhw 5,15] [--ways pi_timm]
  python tools/paper/patch_curve.py CHECKPOINT FOLDER --out runs/figure4 --grid 14 [--patches 8,16,32]
  flexivit report runs/curve/* --out runs/curve

FOLDER holds images as FOLDER/SPLIT/CLASS/*.jpg (also png, webp, ...) with all classes of the model, see
tools/maintain/unpack_sample.py. Each way becomes a folder with an eval.json.

The first keeps the image, so that smaller patches are more tokens. The second, the paper's figure 4, keeps the grid:
the image of grid x kernel pixels is resized together with the kernel, linearly and without antialiasing. Where it grows
PI-resize then keeps the tokens too, but for what is next to a patch's edge: resized as a whole, an image mixes
neighbours there, which the operator of one patch does not know. The second moment of `pi_moment` is measured on other
images, those of `train[:100]`.
"""

import argparse
import pathlib
from collections.abc import Sequence
from typing import Any

from flexivit_jax import cli, errors, experiment, sizes, weights
from flexivit_jax.data import class_names
from flexivit_jax.devices import sharding
from flexivit_jax.evaluators import results
from flexivit_jax.flexify import recipe
from flexivit_jax.models import grid

TIMM = dict(kernel_operator="cubic_antialias", grid_operator="cubic_antialias")
PAPER = dict(kernel_operator="linear", grid_operator="linear_antialias")
WAYS: dict[str, tuple[str, dict[str, Any]]] = {
  "pi_paper": ("PI-resize, linear (paper)", PAPER),
  "pi_timm": ("PI-resize, cubic antialias (timm)", TIMM),
  "pi_moment": ("PI-resize for natural patches", PAPER),
  "plain_timm": ("plain resize, cubic antialias", TIMM | {"kernel_resize": "plain"}),
  "plain_paper": ("plain resize, linear", PAPER | {"kernel_resize": "plain"}),
  "area_paper": ("area heuristic, linear", PAPER | {"kernel_resize": "area"}),
  "norm_paper": ("norm heuristic, linear", PAPER | {"kernel_resize": "norm"}),
}
BATCH = 25


def models_of(
  model: Any, names: Sequence[str], source: dict[str, Any], side: int
) -> dict[str, Any]:
  """The model under each way.

  Raises:
    UserError: a way that there is not; no images in `train` to measure the second moment on.
  """
  if strange := [name for name in names if name not in WAYS]:
    raise errors.unknown("way", strange[0], WAYS)
  made = {name: model.clone(**WAYS[name][1]) for name in names}
  if "pi_moment" in made:
    moment = recipe.moment_of(source | {"split": "train[:100]"}, side, max(model.patch_size))
    made["pi_moment"] = made["pi_moment"].clone(kernel_moment=moment)
  return made


def settings(args: argparse.Namespace, kernel: Sequence[int]) -> list[tuple[int, int, Any]]:
  """Pixels of the side of the image as it is made, and as it is then resized; grids.

  Raises:
    UserError: sizes of one form with the other; a kernel that is not square, to resize an image with.
  """
  if args.grid is None:
    if args.patches is not None:
      raise errors.UserError("--patches goes with --grid; without it give --seqhw.")
    given = "5,6,8,10,12,15,16,20,24,30" if args.seqhw is None else args.seqhw
    side = 240 if args.image_size is None else args.image_size
    return [(side, side, sizes.parse(given, grid.paper_sizes(side)))]
  if args.seqhw is not None or args.image_size is not None:
    raise errors.UserError(
      "With --grid the image follows the patch: give --patches, no --seqhw or --image_size."
    )
  if kernel[0] != kernel[1]:
    raise errors.UserError(
      f"--grid is for a square kernel; that of the model has {tuple(kernel)} pixels."
    )
  given = "8,12,16,24,32" if args.patches is None else args.patches
  patches = sizes.parse(given, lacking="--patches takes pixels of a side")
  return [(args.grid * kernel[0], args.grid * patch, (args.grid,)) for patch in patches]


def measure(
  model: Any,
  params: Any,
  source: dict[str, Any],
  side: int,
  resized: int,
  seqhw: Any,
  classes: Sequence[class_names.Classes] = (),
) -> list[dict[str, Any]]:
  """Rows of an evaluation at these grids, of images made at `side` pixels and then resized.

  `classes` are those of the model.
  """
  plan = recipe.FlexifyRecipe({}, {}, model.num_classes, (side, 0), seqhw, BATCH)
  pp = recipe.labelled(plan, side)
  if resized != side:
    pp = pp.replace("|onehot", f"|resize({resized})|onehot")
  section = dict(data=source, pp=pp, batch_size=BATCH, seqhw=seqhw)
  evaluation = experiment.build_evaluation("", section, every=1, classes=classes)
  evaluator = evaluation.make(model, sharding.make_mesh())
  scores, costs = evaluator.run(params), evaluator.costs(params, repeats=1)
  # Without the time, which one batch on a shared machine does not tell.
  return [a | {k: v for k, v in b.items() if k != "ms"} for a, b in zip(scores, costs, strict=True)]


def main() -> None:
  """Evaluates each way and prints its table."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument("checkpoint", type=pathlib.Path)
  parser.add_argument("folder", type=pathlib.Path, help="FOLDER/SPLIT/CLASS/*.jpg")
  parser.add_argument("--split", default="val")
  parser.add_argument("--out", type=pathlib.Path, required=True)
  parser.add_argument("--image_size", type=int, help="pixels a side (default 240)")
  parser.add_argument("--seqhw", help="tokens a side (default: patches of 8 to 48 of 240 pixels)")
  parser.add_argument("--grid", type=int, help="tokens a side at every patch size: figure 4")
  parser.add_argument("--patches", help="with --grid: pixels a side (default 8,12,16,24,32)")
  parser.add_argument("--ways", default=",".join(WAYS), help="default: all")
  args = parser.parse_args()
  source = dict(name="folder", split=args.split, data_dir=str(args.folder))
  model, params, record = weights.load_with_record(args.checkpoint)
  classes = class_names.known_of(record, model.num_classes, f"the checkpoint {args.checkpoint}")
  runs = settings(args, model.patch_size)
  made = models_of(model, args.ways.split(","), source, runs[0][0])
  for way, of_way in made.items():
    title = WAYS[way][0]
    rows = [row for run in runs for row in measure(of_way, params, source, *run, classes)]
    print(f"{title}\n{results.table(rows)}", flush=True)
    (args.out / way).mkdir(parents=True, exist_ok=True)
    described = results.about(title, "folder", args.split, None, params, None)
    results.write(args.out / way / "eval.json", described, rows)


if __name__ == "__main__":
  cli.tool(main)
