"""What frozen features are worth at each patch size: few-shot linear probes and nearest neighbours.

Usage:
  python tools/paper/probes.py runs/digits --config configs/digits.py --out runs/probes \
    [--shots 1,10] [--k 20] [--seqhw 2,4]

Fitted to so many training images of each class of the config, drawn with seed 0, prepared as those of its evaluation,
on which it is tested: ridge regression on the pre-logits (the evaluator `fewshot`), and, on the most shots, weighted
nearest neighbours (`knn`). Into OUT: probes.json, probes.csv, probes.png.
"""

import json
import pathlib
from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt

from flexivit_jax import cli, data, errors, experiment
from flexivit_jax.analyses import opening
from flexivit_jax.evaluators import results


def measure(opened: opening.Opened, title: str, **section: Any) -> list[dict[str, Any]]:
  """Rows of one evaluator, with its title as "probe"."""
  kept = {k: opened.section[k] for k in ("data", "pp", "batch_size")}
  whole = {**kept, "seqhw": opened.seqhw, "train_data": opened.training, **section}
  evaluator = experiment.build_evaluation("probe", whole, every=1).make(opened.model, opened.mesh)
  rows = results.measure(evaluator, opened.params)
  return [
    {"probe": title, **{k: row[k] for k in ("seqhw", "patch", "gflops", "top1", "n")}}
    for row in rows
  ]


def draw(path: pathlib.Path, rows: Sequence[dict[str, Any]]) -> None:
  """Top-1 against compute, a line for each probe."""
  figure, axes = plt.subplots(figsize=(6.0, 4.4), layout="constrained")
  for probe in dict.fromkeys(row["probe"] for row in rows):
    own = [row for row in rows if row["probe"] == probe]
    axes.plot([r["gflops"] for r in own], [100 * r["top1"] for r in own], "-o", label=probe)
  axes.set_xscale("log")
  axes.set_xlabel("GFLOPs of an image")
  axes.set_ylabel("top-1 (%)")
  figure.legend(loc="outside lower center", ncols=2, frameon=False)
  figure.savefig(path, dpi=150)
  plt.close(figure)


def main() -> None:
  """Measures, writes, and prints."""
  parser = opening.parser(__doc__)
  parser.add_argument("--shots", default="1,5,10", help="of each class (default 1,5,10)")
  parser.add_argument("--k", type=int, default=20, help="neighbours that vote (default 20)")
  args, opened = opening.open_checkpoint(parser)
  if opened.training is None:
    raise errors.UserError(f"{args.config} has no input.data, which probes are fitted to.")
  shots = sorted(int(s) for s in args.shots.split(","))
  classes = data.make_source(**opened.training).num_classes
  if args.k > classes * shots[-1]:
    raise errors.UserError(
      f"--k={args.k} neighbours of {shots[-1]} images of each of {classes} classes; give more --shots or fewer --k."
    )
  rows = []
  for few in shots:
    rows += measure(opened, f"{few}-shot ridge", type="fewshot", shots=few)
  rows += measure(
    opened, f"{args.k} nearest of {shots[-1]} a class", type="knn", k=args.k, shots=shots[-1]
  )
  args.out.mkdir(parents=True, exist_ok=True)
  (args.out / "probes.json").write_text(json.dumps(rows, indent=1) + "\n")
  results.write_csv(args.out / "probes.csv", rows)
  draw(args.out / "probes.png", rows)
  for row in rows:
    print(f"{row['probe']}, {row['seqhw']}: {row['top1']:.1%}")


if __name__ == "__main__":
  cli.tool(main)
