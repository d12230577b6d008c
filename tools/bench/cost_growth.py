"""How the time of a training step grows with tokens and width, and what the paper's ImageNet-1k run would then cost.

python tools/bench/cost_growth.py --widths 192,384,768 --batch_size 4

For each width, milliseconds an image at all sizes are fitted by c + a n + b n^2 in the n tokens: c is what a step costs
whatever it sees (the update), a what grows with the tokens (projections, MLP), b the attention. Least squares of
relative errors, none of the three below zero.
"""

import argparse
import functools
import pathlib
import statistics

import jax
import numpy as np
from scipy import optimize

from flexivit_jax import cli
from flexivit_jax.devices import timing
from flexivit_jax.evaluators import results
from flexivit_jax.experiment import benchmarks, loaders
from flexivit_jax.models import FlexiViT


def measure(width: int, sizes: list[int], args: argparse.Namespace) -> dict[int, list[float]]:
  """Seconds of a training step at each size, in turns."""
  model = FlexiViT(
    num_classes=1000,
    width=width,
    depth=args.depth,
    mlp_dim=4 * width,
    num_heads=width // 64,
    dtype=args.dtype or loaders.default_dtype(),
  )
  step, _, _ = benchmarks.training(model, sizes, args.batch_size, args.image_size)
  return timing.alternate({n: functools.partial(step, n) for n in sizes}, args.rounds)


def fit(tokens: np.ndarray, times: np.ndarray) -> tuple[np.ndarray, float]:
  """The three parts, and the largest relative error of the fit."""
  powers = np.stack([np.ones_like(tokens), tokens, tokens**2], axis=1)
  found, _ = optimize.nnls(powers / times[:, None], np.ones_like(times))
  return found, float(np.abs(powers @ found / times - 1).max())


def main() -> None:
  """Prints the times, the fits and the exponents."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--widths", default="192,384,768")
  parser.add_argument("--depth", type=int, default=12)
  parser.add_argument("--batch_size", type=int, default=4)
  parser.add_argument("--image_size", type=int, default=240)
  parser.add_argument("--seqhw", default="5,8,12,15,20,24")
  parser.add_argument("--rounds", type=int, default=3)
  parser.add_argument("--dtype")
  parser.add_argument(
    "--csv", type=pathlib.Path, help="a file to add the numbers to: results/cost_growth.csv"
  )
  args = parser.parse_args()
  sizes = [int(n) for n in args.seqhw.split(",")]
  tokens = np.array([float(n * n) for n in sizes])
  print(f"{jax.devices()[0].device_kind}, batch {args.batch_size}, ms of a step an image")
  print(
    "width  "
    + " ".join(f"{int(n):>7}" for n in tokens)
    + "    c        a n at 225  b n^2 at 225  error"
  )
  slopes = []
  for width in map(int, args.widths.split(",")):
    times = measure(width, sizes, args)
    per = np.array([statistics.median(times[n]) for n in sizes]) / args.batch_size * 1e3
    (c, a, b), error = fit(tokens, per)
    parts = f"{c:8.2f} {a * 225:11.2f} {b * 225**2:12.2f} {error:8.1%}"
    print(f"{width:5}  " + " ".join(f"{t:7.1f}" for t in per) + f" {parts}", flush=True)
    slopes.append(per)
    if args.csv:
      row = {"width": width} | {
        f"n = {int(n)}": f"{t:.0f}" for n, t in zip(tokens, per, strict=True)
      }
      row |= {"c": f"{c:.0f}", "a n at 225": f"{a * 225:.0f}", "b n^2 at 225": f"{b * 225**2:.0f}"}
      results.append_csv(args.csv, [row | {"error in %": f"{100 * error:.1f}"}])
  if len(slopes) > 1:
    widths = np.log([float(w) for w in args.widths.split(",")])
    exponents = np.polyfit(widths, np.log(np.array(slopes)), 1)[0]
    print("exponent in the width: " + " ".join(f"{e:7.2f}" for e in exponents))


if __name__ == "__main__":
  cli.tool(main)
