"""Runs the experiments of configs/miniature.py and prints what came of them; goes on where it was stopped.

python tools/paper/miniature.py --out runs/miniature --data_dir DIR         run what is not done yet, then the tables
python tools/paper/miniature.py --out runs/miniature --tables               the tables only
python tools/paper/miniature.py --out runs/miniature --tables --csv FILE    and adds them to a file as those of results/
"""

import argparse
import concurrent.futures
import json
import pathlib
import statistics
import subprocess
import sys
import threading
from typing import Any

from flexivit_jax import cli
from flexivit_jax.evaluators import results

SHORT = "epochs=2"
EQUAL = "flops=5.18e12"  # what two epochs of uniformly drawn sizes take
# name of the run: argument of configs/miniature.py; {out} is the folder of the runs of the same seed
RUNS = {
  "fixed6": "fixed=6",
  "fixed3": "fixed=3",
  "flexivit": "",
  "distilled_init": "teacher={out}/fixed6,init={out}/fixed6",
  "distilled_random": "teacher={out}/fixed6",
  "short": SHORT,
  "short_plain": f"{SHORT},resize=plain",
  "short_area": f"{SHORT},resize=area",
  "short_norm": f"{SHORT},resize=norm",
  "short_kernel24": f"{SHORT},kernel=24",
  "short_kernel4": f"{SHORT},kernel=4",
  "short_grid12": f"{SHORT},grid=12",
  "short_fixed6": f"{EQUAL},fixed=6",
  "coarse_to_fine": f"{EQUAL},sizes=coarse_to_fine",
  "fine_to_coarse": f"{EQUAL},sizes=fine_to_coarse",
  "equal_flops": f"{EQUAL},sizes=flops",
  "adaptive": f"{EQUAL},sizes=adaptive",
  "axis_depth": f"{EQUAL},axis=depth",
  "axis_stride": f"{EQUAL},axis=stride,kernel=18",
}
# Too long for two cores; with an accelerator: --only long,long_fixed6,...
LONG = {
  "long": "epochs=30",
  "long_fixed6": "epochs=30,fixed=6",
  "long_fixed3": "epochs=30,fixed=3",
}
NEEDS = {"distilled_init": ["fixed6"], "distilled_random": ["fixed6"]}


def run(name: str, out: pathlib.Path, seed: int, data_dir: str | None) -> None:
  """Trains one model, or goes on with it; nothing where it is done."""
  workdir = out / name
  if (workdir / "eval.json").exists():
    return
  arguments = (RUNS | LONG)[name].format(out=out)
  spec = "configs/miniature.py:" + ",".join(filter(None, [arguments, f"seed={seed}"]))
  command = [
    sys.executable,
    "-m",
    "flexivit_jax.train",
    "--config",
    spec,
    "--workdir",
    str(workdir),
  ]
  if data_dir is not None:
    command.append(f"--config.input.data.data_dir={data_dir}")
  print(f"--- {workdir}: {spec}", flush=True)
  workdir.mkdir(parents=True, exist_ok=True)
  with (workdir / "log.txt").open("a") as log:
    subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT)


def run_all(
  names: list[str], out: pathlib.Path, seeds: list[int], jobs: int, data_dir: str | None
) -> list[str]:
  """Runs `jobs` at a time, in the order given, each after those it needs; returns those that failed."""
  pairs = [(seed, name) for seed in seeds for name in names]
  done = {pair: threading.Event() for pair in pairs}
  failed: list[str] = []

  def work(pair: tuple[int, str]) -> None:
    seed, name = pair
    for need in NEEDS.get(name, []):
      if (seed, need) in done:
        done[seed, need].wait()  # it came earlier in the order, so it runs or has run
    try:
      run(name, folder(out, seed), seed, data_dir)
    except subprocess.CalledProcessError as error:
      failed.append(
        f"{folder(out, seed) / name} (exit status {error.returncode}; see log.txt there)"
      )
    finally:
      done[pair].set()

  with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
    list(pool.map(work, pairs))
  return failed


def folder(out: pathlib.Path, seed: int) -> pathlib.Path:
  """Where the runs of a seed are."""
  return out / f"seed{seed}"


def measured(name: str, out: pathlib.Path) -> list[dict[str, Any]]:
  """What is done of a run, a row for each size, coarsest first: top-1 in percent, mean and range over seeds."""
  made = [json.loads(file.read_text()) for file in sorted(out.glob(f"seed*/{name}/eval.json"))]
  found = []
  for of_size in zip(
    *(sorted(run["rows"], key=lambda row: row["gflops"]) for run in made), strict=True
  ):
    top1 = [100 * row["top1"] for row in of_size]
    found.append(
      {
        "run": name,
        "patch": of_size[0].get("patch", ""),
        "seqhw": of_size[0].get("seqhw", ""),
        "model": (RUNS | LONG)[name].replace("{out}/", "") or "-",
        "MFLOPs": f"{1e3 * of_size[0]['gflops']:.0f}",
        "top1": f"{statistics.mean(top1):.1f}",
        "low": f"{min(top1):.1f}",
        "high": f"{max(top1):.1f}",
        "seeds": len(made),
        "steps": "/".join(sorted({str(run["step"]) for run in made})),
      }
    )
  return found


def table(names: list[str], out: pathlib.Path) -> str:
  """A Markdown table of what is done."""
  lines = ["| run | argument | coarsest | | | finest | steps | seeds |", "|" + "---|" * 8]
  for rows in filter(None, (measured(name, out) for name in names)):
    cells = [f"{row['top1']} ({row['low']} to {row['high']})" for row in rows]
    run, model, steps, seeds = (rows[0][key] for key in ("run", "model", "steps", "seeds"))
    lines.append(f"| {run} | {model} | {' | '.join(cells)} | {steps} | {seeds} |")
  return "\n".join(lines)


def main() -> None:
  """Parses the command line."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
  parser.add_argument("--out", type=pathlib.Path, required=True, help="folder of the runs")
  parser.add_argument("--data_dir", help="where TFDS prepared cifar10 (default: TFDS's own folder)")
  parser.add_argument("--only", help="names of runs, with commas (default: all but the long ones)")
  parser.add_argument("--seeds", default="0,1", help="with commas (default: 0,1)")
  parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default: 1)")
  parser.add_argument("--tables", action="store_true", help="train nothing")
  parser.add_argument("--csv", type=pathlib.Path, help="a file to add what is done of the runs to")
  args = parser.parse_args()
  known = RUNS | LONG
  names = args.only.split(",") if args.only else list(RUNS)
  if unknown := [n for n in names if n not in known]:
    parser.error(f"no run {unknown[0]!r}; there are {', '.join(known)}")
  failed = []
  if not args.tables:
    seeds = [int(seed) for seed in args.seeds.split(",")]
    failed = run_all(names, args.out, seeds, args.jobs, args.data_dir)
  print(table(list(known), args.out))
  if args.csv and (rows := [row for name in names for row in measured(name, args.out)]):
    results.append_csv(args.csv, rows)
  if failed:
    sys.exit("Failed: " + "; ".join(failed))


if __name__ == "__main__":
  cli.tool(main)
