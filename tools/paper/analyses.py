"""All analyses of one checkpoint in turn, each in a folder of its own, with what each took.

Usage:
  python tools/paper/analyses.py runs/digits --config configs/digits.py --out runs/analyses \
    [--seqhw 2,4,8] [--only relevance]

Token similarity is that of the middle one of the sizes with the others. `--config.KEY=VALUE` goes to all, e.g.
`--config.evals.test.data.split=test[:500]`. An analysis that fails is said at the end; the others run.
"""

import argparse
import pathlib
import subprocess
import sys
import time

from flexivit_jax import cli, config, errors
from flexivit_jax.analyses import opening
from flexivit_jax.sizes import size_text

TOOLS = ("representations", "relevance", "token_similarity", "sizes_together", "probes")


def main() -> None:
  """Runs them; the exit status is the largest of theirs."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("checkpoint")
  parser.add_argument("--config", required=True)
  parser.add_argument("--out", type=pathlib.Path, required=True)
  parser.add_argument("--seqhw", help="e.g. 2,4,8; default: the evaluation's")
  parser.add_argument("--only", default=",".join(TOOLS), help="e.g. relevance,probes")
  args, rest = parser.parse_known_args()
  if unknown := [a for a in rest if not a.startswith("--config.")]:
    parser.error(f"unknown argument {unknown[0]}")
  names = args.only.split(",")
  if unknown := [name for name in names if name not in TOOLS]:
    raise errors.unknown("analysis", unknown[0], TOOLS)
  settings = config.load(args.config, [a.removeprefix("--config.") for a in rest])
  sizes = [str(size_text(size)) for size in opening.main_section(settings)["seqhw"]]
  sizes = args.seqhw.split(",") if args.seqhw else sizes
  given = ",".join(sizes)
  middle = sizes[len(sizes) // 2]
  options = {name: [f"--seqhw={given}"] for name in TOOLS}
  options["token_similarity"] = [
    f"--seqhw={middle}", f"--with={','.join(s for s in sizes if s != middle)}"
  ]  # fmt: skip
  failed, begun = {}, time.perf_counter()
  for name in names:
    print(f"--- {name}", flush=True)
    tool, start = pathlib.Path(__file__).with_name(f"{name}.py"), time.perf_counter()
    command = [
      sys.executable,
      tool,
      args.checkpoint,
      "--config",
      args.config,
      "--out",
      args.out / name,
    ]
    if code := subprocess.run([*command, *options[name], *rest], check=False).returncode:
      failed[name] = abs(code)
    print(f"--- {name}: {time.perf_counter() - start:.0f} s", flush=True)
  print(
    f"{time.perf_counter() - begun:.0f} s in all"
    + (f"; failed: {', '.join(failed)}" if failed else "")
  )
  sys.exit(max(failed.values(), default=0))


if __name__ == "__main__":
  cli.tool(main)
