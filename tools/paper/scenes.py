"""Runs the experiments of configs/detect_emoji.py and prints what came of them; resumes what was stopped.

Usage:
  python tools/paper/scenes.py --out runs/scenes --init vit_ti.npz --data_dir cutouts --photos photos \
    --vectors names.npz --shuffled shuffled.npz                         run what is not done yet
  python tools/paper/scenes.py --out runs/scenes --csv FILE             the table; writes its rows

Runs are in OUT/seedN/NAME. --given adds arguments of the config to all of them, e.g. steps=5000.
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

CONFIG = "configs/detect_emoji.py"
# name of the run: arguments of the config, and which file of vectors it takes
RUNS = {
  "flexible": ("", "vectors"),
  "p16": ("fixed=16", "vectors"),
  "p32": ("fixed=32", "vectors"),
  "shuffled": ("", "shuffled"),
}
# column: key of a row of eval.json, as percent
PERCENT = {
  "ap50": "ap50",
  "base": "ap50_base",
  "novel": "ap50_novel",
  "ap": "ap",
  "ceiling": "ceiling_recall",
}
ENDS = ("TFLOPs", "minutes", "seeds")


def spec(name: str, files: dict[str, str], given: str) -> str:
  """Returns the config of a run, with its arguments.

  Args:
    name: a key of `RUNS`.
    files: paths of "init", "data_dir", "photos" ("": none), "vectors" and "shuffled".
    given: more arguments.
  """
  argument, vectors = RUNS[name]
  named = [f"{key}={files[key]}" for key in ("init", "data_dir", "photos") if files[key]]
  return f"{CONFIG}:" + ",".join(
    filter(None, [*named, f"vectors={files[vectors]}", argument, given])
  )


def run(config: str, workdir: pathlib.Path) -> None:
  """Trains and evaluates one model, or resumes it; nothing where it is done."""
  if (workdir / "eval.json").exists():
    return
  print(f"--- {workdir}: {config}", flush=True)
  workdir.mkdir(parents=True, exist_ok=True)
  command = [sys.executable, "-m", "flexivit_jax", "train", "--config", config]
  with (workdir / "log.txt").open("a") as log:
    subprocess.run(
      [*command, "--workdir", str(workdir)], check=True, stdout=log, stderr=subprocess.STDOUT
    )


def measured(name: str, out: pathlib.Path) -> list[dict[str, Any]]:
  """Returns what is done of a run, a row for each size, coarsest first: means over the seeds, and ranges of AP50."""
  files = sorted(out.glob(f"seed*/{name}/eval.json"))
  folders = [file.parent for file in files]
  by_size = [
    sorted(json.loads(file.read_text())["rows"], key=lambda row: row["gflops"]) for file in files
  ]
  made = []
  for rows in zip(*by_size, strict=True):
    found = {"run": name, "patch": rows[0]["patch"], "tokens": rows[0]["tokens"]}
    found["GFLOPs"] = f"{rows[0]['gflops']:.2f}"
    for column, key in PERCENT.items():
      values = [100 * row[key] for row in rows]
      found[column] = f"{statistics.mean(values):.1f}"
      if key.startswith("ap50"):
        found |= {f"{column}_low": f"{min(values):.1f}", f"{column}_high": f"{max(values):.1f}"}
    found |= {
      "dropped": rows[0]["dropped_boxes"],
      "TFLOPs": f"{statistics.mean(map(flops, folders)) / 1e12:.0f}",
      "minutes": f"{statistics.mean(map(minutes, folders)):.0f}",
      "images": rows[0]["n"],
      "seeds": len(files),
    }
    made.append(found)
  return made


def flops(workdir: pathlib.Path) -> float:
  """Of a whole training, as its log says."""
  text = (workdir / "log.txt").read_text()
  return float(re.search(r"(\S+) FLOPs expected in all", text)[1])


def minutes(workdir: pathlib.Path) -> float:
  """Of the steps of a run, as its ledger has them."""
  ledger = json.loads((workdir / "ledger.json").read_text())
  saves = [entry["saves"] for entry in ledger if entry["saves"]]  # none where all was done
  return sum(float(s[max(s, key=int)]["steps"]) for s in saves) / 60


def table(rows: list[dict[str, Any]]) -> str:
  """A Markdown table: AP50 in percent of base / novel names by patch size, a line for each run."""
  lines: list[str] = []
  for name in dict.fromkeys(row["run"] for row in rows):
    own = [row for row in rows if row["run"] == name]
    if not lines:
      heads = [f"{row['patch']} px" for row in own]
      lines = [
        f"| AP50 base / novel | {' | '.join(heads)} | {' | '.join(ENDS)} |",
        "|" + "---|" * (len(heads) + 1 + len(ENDS)),
      ]
    cells = [f"{row['base']} / {row['novel']}" for row in own]
    end = " | ".join(str(own[0][key]) for key in ENDS)
    lines.append(f"| {name} | {' | '.join(cells)} | {end} |")
  return "\n".join(lines)


def main() -> None:
  """Parses the command line."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument("--out", type=pathlib.Path, required=True, help="folder of the runs")
  parser.add_argument("--init", help="the ViT-Ti/16 to start from; without it nothing is trained")
  parser.add_argument("--data_dir", default="cutouts", help="the cut-outs (default: cutouts)")
  parser.add_argument("--photos", default="", help="backgrounds (default: gradients)")
  parser.add_argument("--vectors", default="names.npz", help="of the names (default: names.npz)")
  parser.add_argument("--shuffled", default="shuffled.npz", help="(default: shuffled.npz)")
  parser.add_argument("--only", help="names of runs, with commas (default: all)")
  parser.add_argument("--seeds", default="0", help="with commas (default: 0)")
  parser.add_argument("--given", default="", help="arguments of the config, with commas")
  parser.add_argument("--csv", type=pathlib.Path, help="a file for what is done of the runs")
  args = parser.parse_args()
  names = args.only.split(",") if args.only else list(RUNS)
  if unknown := [n for n in names if n not in RUNS]:
    parser.error(f"no run {unknown[0]!r}; there are {', '.join(RUNS)}")
  if args.init:
    files = {
      key: getattr(args, key) for key in ("init", "data_dir", "photos", "vectors", "shuffled")
    }
    for seed in args.seeds.split(","):
      for name in names:
        given = ",".join(filter(None, [args.given, f"seed={seed}"]))
        run(spec(name, files, given), args.out / f"seed{seed}" / name)
  rows = [row for name in names for row in measured(name, args.out)]
  print(table(rows))
  if args.csv and rows:
    results.write_csv(args.csv, rows)


if __name__ == "__main__":
  cli.tool(main)
