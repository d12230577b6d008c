"""Kills a real run again and again at random moments, and compares its end with that of a run that was left alone.

python tools/bench/chaos.py 50 --config configs/digits.py:debug --out runs/chaos

Each time the same command is started, and after a random time SIGKILL, or for some of them SIGTERM, is sent. Then it
may end. Parameters, optimizer state and metrics rows (but for times) have to be those of the other run, to the bit, and
each checkpoint that was listed at a kill has to be whole. With --workdir s3://BUCKET/RUN the run that is killed is in
a bucket, where nothing may be yet; the other one is in OUT. The log is OUT/chaos.jsonl. A folder that has one is
deleted at the start, any other has to be empty.
"""

import argparse
import hashlib
import json
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from typing import Any

from flexivit_jax import cli, config, errors, storage
from flexivit_jax.running import bucket_run, exit_codes, metrics_writer
from flexivit_jax.running.checkpoint import Checkpoints

LOG = "chaos.jsonl"
TIMES = ("step_s", "images_per_s", "data_wait")


def command(config: str, workdir: pathlib.Path, overrides: list[str]) -> list[str]:
  """The one that is started again and again."""
  given = [f"--config={config}", f"--workdir={workdir}", *overrides]
  return [sys.executable, "-m", "flexivit_jax.cli", "train", *given]


def digest(workdir: pathlib.Path) -> str:
  """Of the last checkpoint's files of arrays as they restore, and of the rows."""
  checkpoints = Checkpoints(workdir / "checkpoints", read_only=True)
  sums = checkpoints.verify(checkpoints.latest_step() or 0).arrays
  checkpoints.close()
  rows = metrics_writer.read_rows(workdir / "metrics.jsonl")
  kept = [{k: v for k, v in row.items() if k not in TIMES} for row in rows]
  return hashlib.sha256(json.dumps([sums, kept], sort_keys=True).encode()).hexdigest()


def here(workdir: pathlib.Path) -> pathlib.Path:
  """The run as files of this machine: of one in a bucket a copy, or an empty folder where there is nothing yet."""
  try:
    return bucket_run.fetched(workdir)
  except errors.UserError:
    return pathlib.Path(tempfile.gettempdir(), "none")


def remove(workdir: pathlib.Path) -> None:
  """Deletes a run."""
  if url := storage.address(workdir):
    bucket = storage.Bucket(url)
    for name in bucket.entries():
      bucket.delete(name)
  else:
    shutil.rmtree(workdir)


def damaged(workdir: pathlib.Path) -> list[str]:
  """What is wrong with the checkpoints that are listed."""
  if not (workdir / "checkpoints").is_dir():
    return []
  found = []
  for step in sorted(p for p in (workdir / "checkpoints").iterdir() if p.name.isdigit()):
    checkpoints = Checkpoints(workdir / "checkpoints", read_only=True)
    try:
      checkpoints.verify(int(step.name))
    except Exception as error:
      found.append(str(error))
    finally:
      checkpoints.close()
  return found


def make_room(out: pathlib.Path) -> pathlib.Path:
  """Deletes what this tool left there the last time; returns the log's path, which marks the folder as its own."""
  log = out / LOG
  if out.exists() and not log.is_file() and not (out.is_dir() and not any(out.iterdir())):
    raise errors.UserError(
      f"{out} is there and no folder of this tool's, which have a {LOG}; give another --out."
    )
  if out.exists():
    shutil.rmtree(out)
  out.mkdir(parents=True)
  log.touch()
  return log


def main() -> None:
  """Prints a line for each kill, and the verdict; exit code 1 for any difference."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("kills", type=int)
  parser.add_argument("--config", default="configs/digits.py")
  parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/chaos"))
  parser.add_argument("--workdir", type=pathlib.Path, help="of the run that is killed")
  parser.add_argument(
    "--longest",
    type=float,
    help="seconds until a kill, at most; default: 0.8 of what the whole run took",
  )
  parser.add_argument("--terminate", type=float, default=0.2, help="share of SIGTERM")
  parser.add_argument("--seed", type=int, default=0)
  args, overrides = parser.parse_known_args()
  rng = random.Random(args.seed)
  whole, run = args.out / "whole", args.workdir or args.out / "run"
  given = cli.parse(command(args.config, whole, overrides)[3:])
  config.load(given.config, given.overrides)
  log_file = make_room(args.out)
  begun = time.monotonic()
  subprocess.run(command(args.config, whole, overrides), check=True, stderr=subprocess.DEVNULL)
  longest = args.longest or 0.8 * (time.monotonic() - begun)
  wrong = 0
  with log_file.open("w") as log:
    kill = 0
    while kill < args.kills:
      after, gentle = rng.uniform(0, longest), rng.random() < args.terminate
      begun = time.monotonic()
      with subprocess.Popen(
        command(args.config, run, overrides), stderr=subprocess.PIPE, text=True
      ) as process:
        try:
          process.wait(after)
        except subprocess.TimeoutExpired:
          process.send_signal(signal.SIGTERM if gentle else signal.SIGKILL)
        _, said = process.communicate()
      problems = damaged(here(run))
      wrong += len(problems)
      # 0: it came to its end before; the run begins anew, for there would be nothing left to kill.
      row: dict[str, Any] = {
        "kill": kill,
        "after_s": round(after, 2),
        "signal": "TERM" if gentle else "KILL",
      }
      row |= {"code": process.returncode, "took_s": round(time.monotonic() - begun, 2)}
      row |= {"resumed": next((s for s in said.splitlines() if "resumed from" in s), None)}
      row |= {"damaged": problems}
      if process.returncode == exit_codes.DONE:
        same = digest(here(run)) == digest(whole)
        wrong += not same
        row |= {"ended": True, "same": same}
        remove(run)
      else:
        kill += 1
      # -SIGTERM: it came while Python was still importing, before there was anything to save.
      if process.returncode not in (
        exit_codes.DONE,
        exit_codes.STOPPED,
        -signal.SIGKILL,
        -signal.SIGTERM,
      ):
        wrong += 1
        row |= {"unexpected": said.splitlines()[-3:]}
      log.write(json.dumps(row) + "\n")
      log.flush()
      print(row, flush=True)
  subprocess.run(command(args.config, run, overrides), check=True, stderr=subprocess.DEVNULL)
  same = digest(here(run)) == digest(whole)
  wrong += not same
  print(f"{args.kills} kills: {wrong} differences; the end is {'the same' if same else 'another'}")
  sys.exit(wrong > 0)


if __name__ == "__main__":
  cli.tool(main)
