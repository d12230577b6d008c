"""Cascades against single sizes: accuracy over measured ms, and how often the guarantee is broken.

Usage:
  python tools/bench/cascades.py runs/cifar10 --name "CIFAR-10" --seqhw 3,4,6,8 --settings lost:margin:.02
    drop:margin:.015 --checked lost:margin:.02 --out runs/cascades

Labelled images as of `flexivit cascade`. They are run once at each size. Then, for each seed, one half of them
calibrates cascades, and the other half measures these and each size alone, side by side, in dense batches. OUT gets
cascades.csv: means over the seeds, with the lowest and the highest.

A setting is the risk, the signal and alpha. The guarantee of those in --checked: all images stand for the population.
From it as many as half are drawn, with replacement, as calibration images; the risk of the cascade is then known
exactly, of all images. A violation is one above alpha; there should be a share of at most delta of them
(guarantee.csv). `test_half`: the same with halves of the images in place of draws, and the risk on the other half,
whose own chance adds to it.
"""

import argparse
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from flexivit_jax import cli, errors
from flexivit_jax.analyses import cascading
from flexivit_jax.budget import cascade as rules
from flexivit_jax.budget.cascade import Cascade
from flexivit_jax.commands import labelled, options
from flexivit_jax.devices import compilation
from flexivit_jax.evaluators import results
from flexivit_jax.inference import predictor
from flexivit_jax.sizes import size_text

PLACES = {"top1": 2, "below": 2, "time": 1, "ms": 3, "compute": 1, "lost": 2}  # decimals
Row = dict[str, Any]


class Images(NamedTuple):
  """Labelled images in memory, and how many are run at a time."""

  image: np.ndarray
  labels: np.ndarray
  batch: int

  def some(self, chosen: np.ndarray) -> list[Mapping[str, np.ndarray]]:
    """Returns batches of chosen ones."""
    parts = np.split(chosen, range(self.batch, len(chosen), self.batch))
    return [
      {"image": self.image[p], "labels": self.labels[p], "_mask": np.ones(len(p), np.float32)}
      for p in parts
    ]


def read(batches: Any) -> Images:
  """Reads all images that count."""
  parts = [(b["image"][b["_mask"] > 0], b["labels"][b["_mask"] > 0]) for b in batches]
  image, labels = (np.concatenate(each) for each in zip(*parts, strict=True))
  return Images(image, labels, len(next(iter(batches))["image"]))


def of(found: cascading.Scored, chosen: np.ndarray) -> cascading.Scored:
  """Returns the scores of chosen images."""
  return found._replace(
    scores=tuple(each[chosen] for each in found.scores), labels=found.labels[chosen]
  )


class Setting(NamedTuple):
  """What a cascade is fitted with."""

  risk: str
  signal: str
  alpha: float

  @property
  def name(self) -> str:
    """In a table: "margin lost 2 %"."""
    return f"{self.signal} {self.risk} {100 * self.alpha:g} %"


def setting(text: str) -> Setting:
  """Parses "lost:margin:.02"; raises a ValueError on anything else."""
  risk, signal, alpha = text.split(":")
  return Setting(risk, signal, float(alpha))


def exceeds(made: Cascade, found: cascading.Scored) -> bool:
  """Tells whether the risk is above alpha."""
  scores = [found.scores[k] for k in made.at(found.sizes)]
  right = found.scores[-1].argmax(axis=1) == found.labels
  own = made.answers(scores) == found.labels
  count = int((right & ~own).sum()) - (made.risk == "drop") * int((own & ~right).sum())
  return count > made.alpha * len(right) + 1e-9


# --- accuracy over time ---


def timed(
  asked: cascading.Asked,
  images: Images,
  found: cascading.Scored,
  settings: Sequence[Setting],
  seed: int,
  repeats: int,
) -> Iterator[Row]:
  """Yields a row for each cascade and each size alone on the test half of a split; ms are the least of all repeats."""
  calibrates, tests = np.array_split(np.random.default_rng(seed).permutation(len(found.labels)), 2)
  own = of(found, calibrates)
  made = [cascading.fit(own, seed=seed, **each._asdict()) for each in settings]
  singles = [rules.alone(size, asked.classes) for size in found.sizes]
  passes = [cascading.walk(asked, images.some(tests), [*made, *singles]) for _ in range(repeats)]
  ran = [each[0]._replace(ms=min(r.ms for r in each)) for each in zip(*passes, strict=True)]
  finest = ran[-1]
  gflops = dict(zip(found.sizes, found.gflops, strict=True))
  ways = [each.name for each in settings]
  ways += [f"seqhw={size_text(size)}" for size in found.sizes]
  for way, cascade, one in zip(ways, [*made, *singles], ran, strict=True):
    row = cascading.row(cascade, one, finest, gflops)
    best = row["finest"]
    yield {
      "way": way,
      "stages": row["cascade"],
      "top1": 100 * row["top1"],
      "below": 100 * (best["top1"] - row["top1"]),
      "ms": row["ms"],
      "time": 100 * row["ms"] / best["ms"],
      "compute": 100 * row["gflops"] / found.gflops[-1],
      "lost": 100 * row["lost"],
      "seed": seed,
      "n": row["n"],
    }


def summary(name: str, rows: Sequence[Row]) -> Iterator[Row]:
  """Yields the mean over the seeds of each way, of some columns also the lowest and the highest."""
  for way in dict.fromkeys(row["way"] for row in rows):
    own = [row for row in rows if row["way"] == way]
    numbers: Row = {}
    for column, places in PLACES.items():
      values = [row[column] for row in own]
      numbers[column] = f"{np.mean(values):.{places}f}"
      if column in ("below", "time"):
        ends = {"low": min(values), "high": max(values)}
        numbers |= {f"{column}_{end}": f"{value:.{places}f}" for end, value in ends.items()}
    stages = " or ".join(sorted({row["stages"] for row in own}))
    yield {
      "model": name,
      "way": way,
      **numbers,
      "stages": stages,
      "n": own[0]["n"],
      "seeds": len(own),
    }


# --- the guarantee ---


def guarantee(found: cascading.Scored, given: Setting, delta: float, splits: int) -> Row:
  """Returns how often the guarantee is broken."""
  n = len(found.labels)
  drawn, halves = 0, 0
  for seed in range(splits):
    rng = np.random.default_rng([seed, 1])
    some, (calibrates, tests) = (
      rng.integers(n, size=n // 2),
      np.array_split(rng.permutation(n), 2),
    )
    fit = lambda own, seed=seed: cascading.fit(  # noqa: E731
      of(found, own), delta=delta, seed=seed, unit="gflops", **given._asdict()
    )
    drawn += exceeds(fit(some), found)
    halves += exceeds(fit(calibrates), of(found, tests))
  return {
    "way": given.name,
    "draws": splits,
    "violations": drawn,
    "percent": f"{100 * drawn / splits:.1f}",
    "delta": 100 * delta,
    "most": int(stats.binom.ppf(0.99, splits, delta)),
    "test_half": halves,
    "n": n // 2,
  }


def main() -> None:
  """Measures, writes, and prints."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  labelled.add_arguments(parser)
  options.add_reading(parser)
  parser.add_argument("--name", required=True, help="of the model, in the tables")
  parser.add_argument("--seqhw", required=True)
  parser.add_argument("--settings", type=setting, nargs="+", required=True)
  parser.add_argument("--checked", type=setting, nargs="*", default=[])
  parser.add_argument("--delta", type=float, default=0.05)
  parser.add_argument("--seeds", type=int, default=5, help="of halves that are timed")
  parser.add_argument("--repeats", type=int, default=1, help="of which the fastest counts")
  parser.add_argument("--splits", type=int, default=200, help="by which the guarantee is checked")
  parser.add_argument("--batch_size", type=int)
  parser.add_argument("--out", type=pathlib.Path, required=True)
  args, rest = parser.parse_known_args()
  args.overrides = [a.removeprefix("--config.") for a in rest if a.startswith("--config.")]
  if unknown := [a for a in rest if not a.startswith("--config.")]:
    raise errors.UserError(f"Unknown argument {unknown[0]!r}.")
  compilation.keep_programs()
  name, section = labelled.section(args)
  section = {**section, **({"batch_size": args.batch_size} if args.batch_size else {})}
  loaded = predictor.load(args.checkpoint, whole=True, **options.loading(args))
  evaluation = labelled.evaluation(name, section, loaded)
  asked, batches = cascading.Asked(loaded), evaluation.batches()
  found = cascading.scored(asked, batches, predictor.sizes_of(args.seqhw, loaded), print)
  args.out.mkdir(parents=True, exist_ok=True)
  images, rows = read(batches), []
  for seed in range(args.seeds):
    rows += list(timed(asked, images, found, args.settings, seed, args.repeats))
    results.write_csv(args.out / "seeds.csv", rows)
    print(f"seed {seed} is done", flush=True)
  means = list(summary(args.name, rows))
  results.write_csv(args.out / "cascades.csv", means)
  for row in means:
    print("  ".join(f"{key} {value}" for key, value in row.items()))
  checked = []
  for given in args.checked:
    checked.append({"model": args.name, **guarantee(found, given, args.delta, args.splits)})
    print("  ".join(f"{key} {value}" for key, value in checked[-1].items()), flush=True)
    results.write_csv(args.out / "guarantee.csv", checked)


if __name__ == "__main__":
  cli.tool(main)
