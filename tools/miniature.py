"""Runs the experiments of configs/miniature.py, one after the other, and prints what came of them.

python tools/miniature.py --out runs/miniature --data_dir DIR         run what is not done yet, then the table
python tools/miniature.py --out runs/miniature --tables               the table only
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys

SHORT = "epochs=2"
EQUAL = "flops=5.18e12"  # what two epochs of uniformly drawn sizes take
# name of the run: argument of configs/miniature.py; {out} is the folder of the runs
RUNS = {
  "fixed6": "fixed=6",
  "fixed3": "fixed=3",
  "flexivit": "",
  "flexivit_s1": "seed=1",
  "distilled_init": "teacher={out}/fixed6,init={out}/fixed6",
  "distilled_random": "teacher={out}/fixed6",
  "short": SHORT,
  "short_plain": f"{SHORT},resize=plain",
  "short_area": f"{SHORT},resize=area",
  "short_norm": f"{SHORT},resize=norm",
  "curriculum_coarse_to_fine": f"{EQUAL},sizes=coarse_to_fine",
  "curriculum_fine_to_coarse": f"{EQUAL},sizes=fine_to_coarse",
  "curriculum_flops": f"{EQUAL},sizes=flops",
  "curriculum_adaptive": f"{EQUAL},sizes=adaptive",
  "axis_depth": f"{EQUAL},axis=depth",
  "axis_stride": f"{EQUAL},axis=stride,kernel=18",
  "short_kernel24": f"{SHORT},kernel=24",
  "short_kernel4": f"{SHORT},kernel=4",
  "short_grid12": f"{SHORT},grid=12",
  "short_s1": f"{SHORT},seed=1",
  "curriculum_coarse_to_fine_s1": f"{EQUAL},sizes=coarse_to_fine,seed=1",
}
CACHED = (
  "distilled_init",
  "distilled_random",
)  # the same draws: the second reads what the first asked the teacher


def run(name: str, out: pathlib.Path, data_dir: str | None) -> None:
  """Trains one model, or goes on with it; nothing where it is done."""
  if (out / name / "eval.json").exists():
    return
  spec = f"configs/miniature.py:{RUNS[name].format(out=out)}"
  command = [
    sys.executable,
    "-m",
    "flexivit_jax.train",
    "--config",
    spec,
    "--workdir",
    str(out / name),
  ]
  if data_dir is not None:
    command.append(f"--config.input.data.data_dir={data_dir}")
  if name in CACHED:
    command.append(f"--config.teacher_cache={out / 'teacher_cache'}")
  print(f"--- {name}: {spec}", flush=True)
  subprocess.run(command, check=True, env=os.environ)


def table(out: pathlib.Path) -> str:
  """Returns a Markdown table of the runs that are done: top-1 in percent at each size, coarsest first."""
  lines = ["| run | argument | coarsest | | | finest | steps |", "|---|---|---|---|---|---|---|"]
  for name, spec in RUNS.items():
    file = out / name / "eval.json"
    if not file.exists():
      continue
    made = json.loads(file.read_text())
    rows = sorted(made["rows"], key=lambda row: row["gflops"])
    cells = [f"{100 * row['top1']:.1f}" for row in rows]
    shown = spec.replace("{out}/", "") or "-"
    lines.append(f"| {name} | {shown} | {' | '.join(cells)} | {made['step']} |")
  return "\n".join(lines)


def main() -> None:
  """Parses the command line."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
  parser.add_argument("--out", type=pathlib.Path, required=True, help="folder of the runs")
  parser.add_argument("--data_dir", help="where TFDS prepared cifar10 (default: TFDS's own folder)")
  parser.add_argument("--only", help="names of runs, with commas (default: all)")
  parser.add_argument("--tables", action="store_true", help="train nothing")
  args = parser.parse_args()
  names = args.only.split(",") if args.only else list(RUNS)
  if unknown := [n for n in names if n not in RUNS]:
    parser.error(f"no run {unknown[0]!r}; there are {', '.join(RUNS)}")
  for name in names if not args.tables else ():
    run(name, args.out, args.data_dir)
  print(table(args.out))


if __name__ == "__main__":
  main()
