"""Accuracy of a fixed Vision Transformer at other patch sizes, under several ways to resize its kernel. No training.

Usage:
  python tools/patch_curve.py CHECKPOINT DIR --out runs/curve [--split val] [--seqhw 5,15] [--ways pi_timm,plain_timm]
  flexivit report runs/curve/* --out runs/curve

DIR holds SPLIT/CLASS/*.jpg with all classes of the model, see tools/unpack_sample.py. Each way becomes a folder with
an eval.json. The second moment of `pi_moment` is measured on other images, those of `train[:100]`.
"""

import argparse
import pathlib
from typing import Any

from flexivit_jax import cli, experiment, results, sharding, weights
from flexivit_jax.flexify import recipe

TIMM = dict(kernel_operator="cubic_antialias", grid_operator="cubic_antialias")
PAPER = dict(kernel_operator="linear", grid_operator="linear_antialias")
WAYS: dict[str, tuple[str, dict[str, Any]]] = {
  "pi_paper": ("PI-resize, linear (paper)", PAPER),
  "pi_timm": ("PI-resize, cubic antialias (timm)", TIMM),
  "pi_moment": ("PI-resize for natural patches", PAPER),
  "plain_timm": ("plain resize, cubic antialias", TIMM | {"kernel_resize": "plain"}),
  "plain_paper": ("plain resize, linear", PAPER | {"kernel_resize": "plain"}),
}


def main() -> None:
  """Evaluates each way and prints its table."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument("checkpoint", type=pathlib.Path)
  parser.add_argument("folder", type=pathlib.Path)
  parser.add_argument("--split", default="val")
  parser.add_argument("--out", type=pathlib.Path, required=True)
  parser.add_argument("--image_size", type=int, default=240)
  parser.add_argument("--seqhw", default="5,6,8,10,12,15,16,20,24,30")
  parser.add_argument("--ways", default=",".join(WAYS))
  args = parser.parse_args()
  source = dict(name="folder", split=args.split, data_dir=str(args.folder))
  sizes = tuple(int(size) for size in args.seqhw.split(","))
  for way in args.ways.split(","):
    title, fields = WAYS[way]
    model, params = weights.load(args.checkpoint)
    if way == "pi_moment":
      others = source | {"split": "train[:100]"}
      moment = recipe.moment_of(others, args.image_size, max(model.patch_size))
      fields = fields | {"kernel_moment": moment}
    model = model.clone(**fields)
    plan = recipe.Plan({}, {}, model.num_classes, (args.image_size, 0), sizes, 25)
    section = dict(
      data=source,
      pp=recipe.labelled(plan, args.image_size),
      batch_size=plan.batch_size,
      seqhw=sizes,
    )
    evaluator = experiment.build_evaluation(section, every=1).make(model, sharding.make_mesh())
    scores, costs = evaluator.run(params), evaluator.costs(params, repeats=1)
    # Without the time, which one batch on a shared machine does not tell.
    rows = [
      a | {k: v for k, v in b.items() if k != "ms"} for a, b in zip(scores, costs, strict=True)
    ]
    print(f"{title}\n{results.table(rows)}", flush=True)
    (args.out / way).mkdir(parents=True, exist_ok=True)
    described = results.about(title, "folder", args.split, None, params, None)
    results.write(args.out / way / "eval.json", described, rows)


if __name__ == "__main__":
  cli.tool(main)
