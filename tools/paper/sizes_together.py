"""One FlexiViT at several patch sizes: calibration of each, agreement between them, and ensembles at equal compute.

Usage:
  python tools/paper/sizes_together.py runs/digits --config configs/digits.py --out runs/together [--seqhw 2,4,8]

Of the evaluation of a config. For each size: top-1, NLL (nats), ECE (15 bins), and the temperature that is best on the
examples with even numbers, with NLL and ECE of the others before and after. For each two sizes how often they say the
same. For each two and three sizes the mean of their probabilities, beside the best single size that computes no more.
Into OUT: sizes.json, sizes.csv, agreement.csv, ensembles.csv, ensembles.png.
"""

import csv
import functools
import itertools
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import matplotlib.pyplot as plt
import numpy as np

from flexivit_jax import cli, errors
from flexivit_jax.analyses import opening
from flexivit_jax.budget import calibration
from flexivit_jax.evaluators import results
from flexivit_jax.evaluators.per_size import PerSize, sizes_of
from flexivit_jax.sizes import size_label

MEMBERS = (2, 3)


def logits(params: Any, batch: Any, *, model: Any, **size: Any) -> tuple[jax.Array, ...]:
  """Of a batch, with its labels and its mask."""
  found, _ = model.apply({"params": params}, batch["image"], **size)
  return found, batch["labels"], batch["_mask"]


def of_size(name: str, found: np.ndarray, labels: np.ndarray, gflops: float) -> dict[str, Any]:
  """What is measured of one size. `found`: logits [n, k]; `labels`: classes [n]."""
  fitted, rest = slice(0, None, 2), slice(1, None, 2)
  heat = calibration.temperature(found[fitted], labels[fitted])
  row: dict[str, Any] = {"seqhw": name, "gflops": gflops, "n": len(labels)}
  row |= {"top1": float((found.argmax(axis=1) == labels).mean())}
  row |= {"nll": calibration.nll(found, labels), "ece": calibration.ece(found, labels)}
  row["temperature"] = heat
  for when, values in (("before", found[rest]), ("after", found[rest] / heat)):
    row[f"nll_{when}"] = calibration.nll(values, labels[rest])
    row[f"ece_{when}"] = calibration.ece(values, labels[rest])
  return row


def ensembles(
  names: Sequence[str], found: Sequence[np.ndarray], labels: np.ndarray, gflops: Sequence[float]
) -> list[dict[str, Any]]:
  """A row for each set of sizes: its top-1, the best single size's that costs no more, the gain and its standard error.

  Compute of an ensemble is that of its members together.
  """
  probabilities = [np.exp(calibration.log_softmax(f)) for f in found]
  right = [f.argmax(axis=1) == labels for f in found]
  rows = []
  for count in MEMBERS:
    for members in itertools.combinations(range(len(names)), count):
      cost = sum(gflops[i] for i in members)
      own = np.mean([probabilities[i] for i in members], axis=0).argmax(axis=1) == labels
      single = max(
        (i for i in range(len(names)) if gflops[i] <= cost), key=lambda i: right[i].mean()
      )
      apart = own.astype(float) - right[single]
      rows.append({
        "members": "+".join(names[i] for i in members), "gflops": cost, "top1": float(own.mean()),
        "single": names[single], "single_top1": float(right[single].mean()),
        "gain": float(apart.mean()), "standard_error": float(apart.std() / np.sqrt(len(labels))),
      })  # fmt: skip
  return rows


def draw(path: pathlib.Path, rows: Sequence[dict], mixed: Sequence[dict]) -> None:
  """Top-1 against compute: single sizes as a line, ensembles as points."""
  figure, axes = plt.subplots(figsize=(6.0, 4.0), layout="constrained")
  for count, marker in zip(MEMBERS, "s^", strict=True):
    points = [r for r in mixed if r["members"].count("+") == count - 1]
    axes.plot(
      [r["gflops"] for r in points], [100 * r["top1"] for r in points], marker, color="#d55e00",
      markersize=5, markerfacecolor="none", label=f"{count} sizes, mean of probabilities",
    )  # fmt: skip
  axes.plot(
    [r["gflops"] for r in rows], [100 * r["top1"] for r in rows], "-o", color="#0072b2",
    label="one size",
  )  # fmt: skip
  axes.set_xscale("log")
  axes.set_xlabel("GFLOPs of an image")
  axes.set_ylabel("top-1 (%)")
  axes.legend(frameon=False)
  figure.savefig(path, dpi=150)
  plt.close(figure)


def main() -> None:
  """Measures, writes, and prints."""
  args, (model, params, data, mesh, seqhw, *_) = opening.open_checkpoint(opening.parser(__doc__))
  fn = functools.partial(logits, model=model)
  runner = PerSize(fn, model, data, mesh, sizes=sizes_of(seqhw), inputs=("image", "labels"))
  runner.compile(params)
  names = [size_label(runner.names(size)) for size in runner.sizes.values()]
  if len(names) < 2:
    raise errors.UserError(f"One size, {names[0]}; this compares two or more.")
  h, w, channels = next(iter(data))["image"].shape[1:]
  gflops = [2 * model.gmacs({"image": (h, w, channels)}, **size) for size in runner.sizes.values()]
  parts = [
    jax.device_get([outputs[key] for key in runner.sizes])
    for outputs in runner.outputs(params, data)
  ]
  real = np.concatenate([p[0][2] for p in parts]) > 0
  given = np.concatenate([p[0][1] for p in parts])[real]
  if not (given.sum(axis=1) == 1).all():
    raise errors.UserError("Some labels are several classes or none; this takes one of each image.")
  labels = given.argmax(axis=1)
  found = [np.concatenate([p[i][0] for p in parts])[real] for i in range(len(names))]
  rows = [of_size(n, f, labels, g) for n, f, g in zip(names, found, gflops, strict=True)]
  says = np.stack([f.argmax(axis=1) for f in found])
  agreement = (says[:, None] == says[None]).mean(axis=2)
  mixed = ensembles(names, found, labels, gflops)
  args.out.mkdir(parents=True, exist_ok=True)
  everything = {"sizes": rows, "agreement": agreement.tolist(), "ensembles": mixed}
  (args.out / "sizes.json").write_text(json.dumps(everything, indent=1) + "\n")
  results.write_csv(args.out / "sizes.csv", rows)
  results.write_csv(args.out / "ensembles.csv", mixed)
  with (args.out / "agreement.csv").open("w", newline="") as file:
    lines = ([n, *a] for n, a in zip(names, agreement, strict=True))
    csv.writer(file).writerows([["", *names], *lines])
  draw(args.out / "ensembles.png", rows, mixed)
  for row in rows:
    print("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))
  print(
    "agreement: "
    + "; ".join(f"{n} {np.round(a, 3).tolist()}" for n, a in zip(names, agreement, strict=True))
  )
  ahead = [r for r in mixed if r["gain"] > 2 * r["standard_error"]]
  behind = [r for r in mixed if r["gain"] < -2 * r["standard_error"]]
  best = max(mixed, key=lambda r: r["gain"])
  print(
    f"{len(mixed)} ensembles: {len(ahead)} ahead of the best single size at no more compute by two standard errors,"
    f" {len(behind)} behind; the best, {best['members']}: {best['gain']:+.2%} +- {best['standard_error']:.2%}"
  )


if __name__ == "__main__":
  cli.tool(main)
