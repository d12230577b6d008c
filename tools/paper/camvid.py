"""Runs the experiments of configs/segmenter_camvid.py and prints what came of them; goes on where it was stopped.

python tools/paper/camvid.py --out runs/camvid --init vit_ti.npz --data_dir camvid   run what is not done yet
python tools/paper/camvid.py --out runs/camvid --csv FILE                            the table; writes its rows
"""

import argparse
import json
import pathlib
import re
import statistics
import subprocess
import sys
from typing import Any

from flexivit_jax import cli
from flexivit_jax.evaluators import results

CONFIG = "configs/segmenter_camvid.py"
# name of the run: argument of the config
RUNS = {
  f"{decoder}{name}": f"decoder={decoder}{argument}"
  for decoder in ("mask", "linear")
  for name, argument in (("", ""), ("_p16", ",fixed=16"), ("_p40", ",fixed=40"), ("_p20", ",fixed=20"))
} | {"linear_fused": "decoder=linear,fuse=2", "linear_coarse": "decoder=linear,coarse=True"}  # fmt: skip
ENDS = ("TFLOPs", "minutes", "seeds")


def run(name: str, workdir: pathlib.Path, given: str) -> None:
  """Trains and evaluates one model, or goes on with it; nothing where it is done."""
  if (workdir / "eval.json").exists():
    return
  spec = f"{CONFIG}:{RUNS[name]},{given}"
  command = [sys.executable, "-m", "flexivit_jax", "train", "--config", spec]
  print(f"--- {workdir}: {spec}", flush=True)
  workdir.mkdir(parents=True, exist_ok=True)
  with (workdir / "log.txt").open("a") as log:
    subprocess.run(
      [*command, "--workdir", str(workdir)], check=True, stdout=log, stderr=subprocess.STDOUT
    )


def measured(name: str, out: pathlib.Path) -> list[dict[str, Any]]:
  """What is done of a run, a row for each size, coarsest first: percent, means over the seeds and their range."""
  files = sorted(out.glob(f"seed*/{name}/eval.json"))
  made = {file.parent: json.loads(file.read_text()) for file in files}
  found = []
  for rows in zip(*(by_cost(one["rows"]) for one in made.values()), strict=True):
    miou = [100 * row["miou"] for row in rows]
    found.append(
      {
        "run": name,
        "patch": rows[0]["patch"],
        "seqhw": rows[0]["seqhw"],
        "GFLOPs": f"{rows[0]['gflops']:.2f}",
        "miou": f"{statistics.mean(miou):.1f}",
        "low": f"{min(miou):.1f}",
        "high": f"{max(miou):.1f}",
        "boundary_iou": f"{100 * statistics.mean(row['boundary_iou'] for row in rows):.1f}",
        "pixels": f"{100 * statistics.mean(row['pixel_accuracy'] for row in rows):.1f}",
        "ceiling": f"{100 * rows[0]['ceiling']:.1f}",
        "TFLOPs": f"{statistics.mean(flops(folder) for folder in made) / 1e12:.0f}",
        "minutes": f"{statistics.mean(minutes(folder) for folder in made):.0f}",
        "images": rows[0]["n"],
        "seeds": len(made),
      }
    )
  return found


def by_cost(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
  """Rows of sizes, the cheapest first."""
  return sorted(rows, key=lambda row: row["gflops"])


def flops(workdir: pathlib.Path) -> float:
  """Of a whole training, as its log says."""
  text = (workdir / "log.txt").read_text()
  return float(re.search(r"(\S+) FLOPs expected in all", text)[1])


def minutes(workdir: pathlib.Path) -> float:
  """Of the steps of a run, as its ledger has them."""
  ledger = json.loads((workdir / "ledger.json").read_text())
  saves = [entry["saves"] for entry in ledger if entry["saves"]]  # none where all was done
  return sum(float(s[max(s, key=int)]["steps"]) for s in saves) / 60


def table(out: pathlib.Path) -> str:
  """A Markdown table of what is done: mIoU in percent by patch size."""
  lines: list[str] = []
  for rows in filter(None, (measured(name, out) for name in RUNS)):
    if not lines:
      heads = [f"{row['patch']} px" for row in rows]
      lines = [
        f"| run | {' | '.join(heads)} | {' | '.join(ENDS)} |",
        "|" + "---|" * (len(heads) + 1 + len(ENDS)),
      ]
    cells = [f"{row['miou']} ({row['low']} to {row['high']})" for row in rows]
    end = " | ".join(str(rows[0][key]) for key in ENDS)
    lines.append(f"| {rows[0]['run']} | {' | '.join(cells)} | {end} |")
  return "\n".join(lines)


def main() -> None:
  """Parses the command line."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
  parser.add_argument("--out", type=pathlib.Path, required=True, help="folder of the runs")
  parser.add_argument("--init", help="the ViT-Ti/16 to start from; without it nothing is trained")
  parser.add_argument("--data_dir", default="camvid", help="the data (default: camvid)")
  parser.add_argument("--only", help="names of runs, with commas (default: all)")
  parser.add_argument("--seeds", default="0,1", help="with commas (default: 0,1)")
  parser.add_argument("--csv", type=pathlib.Path, help="a file for what is done of the runs")
  args = parser.parse_args()
  names = args.only.split(",") if args.only else list(RUNS)
  if unknown := [n for n in names if n not in RUNS]:
    parser.error(f"no run {unknown[0]!r}; there are {', '.join(RUNS)}")
  if args.init:
    for seed in args.seeds.split(","):
      for name in names:
        given = f"init={args.init},data_dir={args.data_dir},seed={seed}"
        run(name, args.out / f"seed{seed}" / name, given)
  print(table(args.out))
  if args.csv and (rows := [row for name in names for row in measured(name, args.out)]):
    results.write_csv(args.csv, rows)


if __name__ == "__main__":
  cli.tool(main)
