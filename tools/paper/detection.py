"""Runs the experiments of a miniature of detection and prints what came of them; resumes what was stopped.

Usage:
  python tools/paper/detection.py emoji --out runs/scenes --init vit_ti.npz --data_dir cutouts --photos photos \
    --vectors names.npz --shuffled shuffled.npz                         run what is not done yet
  python tools/paper/detection.py bccd --out runs/bccd --init vit_ti.npz --data_dir bccd
  python tools/paper/detection.py bccd --out runs/bccd --csv FILE       the table; writes its rows

emoji: configs/detect_emoji.py, flexible, fixed and with vectors of other names. bias: the same at one size, with boxes
that begin at the centre or at the corner of a patch, at 5 x 5 and 15 x 15 tokens. bccd: configs/detect_bccd.py.
Runs are in OUT/seedN/NAME. --given adds arguments of the config to all of them, e.g. epochs=9.
"""

import argparse
import json
import pathlib
import re
import statistics
import subprocess
import sys
from typing import Any, NamedTuple

from flexivit_jax import cli
from flexivit_jax.evaluators import results
from flexivit_jax.running import metrics_writer

EMOJI, BCCD = "configs/detect_emoji.py", "configs/detect_bccd.py"


class Miniature(NamedTuple):
  """Some runs of one config.

  Attributes:
    config: its file.
    files: arguments of the config that are paths, by default those of the command line.
    runs: name of a run: its arguments.
    shown: columns of the table that is printed.
  """

  config: str
  files: tuple[str, ...]
  runs: dict[str, str]
  shown: tuple[str, ...]


_NAMED = ("init", "data_dir", "photos", "vectors")
MINIATURES = {
  "emoji": Miniature(
    EMOJI,
    _NAMED,
    {
      "flexible": "",
      "flexible_long": "steps=3500",  # the FLOPs of p16
      "p16": "fixed=16",
      "p32": "fixed=32",
      "shuffled": "vectors=SHUFFLED",
    },
    ("base", "novel", "novel_alone"),
  ),
  "bias": Miniature(
    EMOJI,
    _NAMED,
    {
      f"{bias}_{240 // patch}": f"pixels=240,fixed={patch},steps={steps},box_bias={bias}"
      for patch, steps in ((48, 600), (16, 250))
      for bias in ("centre", "corner")
    },
    ("ap50", "loss"),
  ),
  "bccd": Miniature(
    BCCD,
    ("init", "data_dir"),
    {"flexible": "", "p40": "fixed=40", "p16": "fixed=16"},
    ("ap50", "ap"),
  ),
}
# column: key of a row of eval.json, as percent; a size without such boxes has none
PERCENT = {
  "ap50": "ap50",
  "base": "ap50_base",
  "novel": "ap50_novel",
  "novel_alone": "novel_alone",
  "ap": "ap",
  "ceiling": "ceiling_recall",
} | {key: f"ap50_tokens_{key}" for key in ("below_1", "1_to_4", "4_to_16", "above_16")}
LAST = 50  # steps whose mean loss is shown
ENDS = ("TFLOPs", "minutes", "seeds")


def spec(made: Miniature, name: str, files: dict[str, str], given: str) -> str:
  """Returns the config of a run, with its arguments.

  Args:
    made: whose run it is.
    name: of the run.
    files: paths, by the name of the argument; "": none.
    given: more arguments.
  """
  own = made.runs[name].replace("SHUFFLED", files["shuffled"])
  named = [f"{k}={files[k]}" for k in made.files if files[k] and f"{k}=" not in own]
  return f"{made.config}:" + ",".join(filter(None, [*named, own, given]))


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
  by_size = [sorted(rows_of(file), key=lambda row: row["gflops"]) for file in files]
  made = []
  for rows in zip(*by_size, strict=True):
    found = {"run": name, "patch": rows[0]["patch"], "tokens": rows[0]["tokens"]}
    found["GFLOPs"] = f"{rows[0]['gflops']:.2f}"
    for column, key in PERCENT.items():
      values = [100 * row[key] for row in rows if row.get(key) is not None]
      if not values:
        found[column] = ""
        continue
      found[column] = f"{statistics.mean(values):.1f}"
      if column in ("ap50", "base", "novel", "novel_alone"):
        found |= {f"{column}_low": f"{min(values):.1f}", f"{column}_high": f"{max(values):.1f}"}
    found |= {
      "loss": f"{statistics.mean(map(loss, folders)):.3f}",
      "dropped": rows[0]["dropped_boxes"],
      "TFLOPs": f"{statistics.mean(map(flops, folders)) / 1e12:.0f}",
      "minutes": f"{statistics.mean(map(minutes, folders)):.0f}",
      "images": rows[0]["n"],
      "seeds": len(files),
    }
    made.append(found)
  return made


def rows_of(file: pathlib.Path) -> list[dict[str, Any]]:
  """The rows of an evaluation; with AP50 of novel names that compete alone, where that was measured."""
  rows = json.loads(file.read_text())["rows"]
  alone = file.with_name("eval_novel.json")
  if not alone.exists():
    return rows
  of_size = {row["tokens"]: row["ap50"] for row in json.loads(alone.read_text())["rows"]}
  return [{**row, "novel_alone": of_size[row["tokens"]]} for row in rows]


def flops(workdir: pathlib.Path) -> float:
  """Of a whole training, as its log says."""
  text = (workdir / "log.txt").read_text()
  return float(re.search(r"(\S+) FLOPs expected in all", text)[1])


def loss(workdir: pathlib.Path) -> float:
  """The mean of the last steps."""
  rows = metrics_writer.read_rows(workdir / "metrics.jsonl")
  return statistics.mean([row["loss"] for row in rows if "loss" in row][-LAST:])


def minutes(workdir: pathlib.Path) -> float:
  """Of the steps of a run, as its ledger has them."""
  ledger = json.loads((workdir / "ledger.json").read_text())
  saves = [entry["saves"] for entry in ledger if entry["saves"]]  # none where all was done
  return sum(float(s[max(s, key=int)]["steps"]) for s in saves) / 60


def table(rows: list[dict[str, Any]], shown: tuple[str, ...]) -> str:
  """A Markdown table: columns of the rows by patch size, a line for each run."""
  lines: list[str] = []
  for name in dict.fromkeys(row["run"] for row in rows):
    own = [row for row in rows if row["run"] == name]
    if not lines:
      heads = [f"{row['patch']} px" for row in own]
      lines = [
        f"| {' / '.join(shown)} | {' | '.join(heads)} | {' | '.join(ENDS)} |",
        "|" + "---|" * (len(heads) + 1 + len(ENDS)),
      ]
    cells = [" / ".join(row[key] for key in shown) for row in own]
    end = " | ".join(str(own[0][key]) for key in ENDS)
    lines.append(f"| {name} | {' | '.join(cells)} | {end} |")
  return "\n".join(lines)


def main() -> None:
  """Parses the command line."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument("miniature", choices=MINIATURES)
  parser.add_argument("--out", type=pathlib.Path, required=True, help="folder of the runs")
  parser.add_argument("--init", help="the ViT-Ti/16 to start from; without it nothing is trained")
  parser.add_argument("--data_dir", default="", help="the data (default: the config's)")
  parser.add_argument("--photos", default="", help="backgrounds (default: gradients)")
  parser.add_argument("--vectors", default="names.npz", help="of the names (default: names.npz)")
  parser.add_argument("--shuffled", default="shuffled.npz", help="(default: shuffled.npz)")
  parser.add_argument("--only", help="names of runs, with commas (default: all)")
  parser.add_argument("--seeds", default="0", help="with commas (default: 0)")
  parser.add_argument("--given", default="", help="arguments of the config, with commas")
  parser.add_argument("--csv", type=pathlib.Path, help="a file for what is done of the runs")
  args = parser.parse_args()
  made = MINIATURES[args.miniature]
  names = args.only.split(",") if args.only else list(made.runs)
  if unknown := [n for n in names if n not in made.runs]:
    parser.error(f"no run {unknown[0]!r}; there are {', '.join(made.runs)}")
  if args.init:
    files = {
      key: getattr(args, key) for key in ("init", "data_dir", "photos", "vectors", "shuffled")
    }
    for seed in args.seeds.split(","):
      for name in names:
        given = ",".join(filter(None, [args.given, f"seed={seed}"]))
        run(spec(made, name, files, given), args.out / f"seed{seed}" / name)
  rows = [row for name in names for row in measured(name, args.out)]
  print(table(rows, made.shown))
  if args.csv and rows:
    empty = {key for key in rows[0] if all(row[key] == "" for row in rows)}
    kept = [{key: value for key, value in row.items() if key not in empty} for row in rows]
    results.write_csv(args.csv, kept)


if __name__ == "__main__":
  cli.tool(main)
