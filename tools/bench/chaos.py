"""Kills a real run again and again at random moments, and compares its end with that of a run that was left alone.

python tools/bench/chaos.py 50 --config configs/digits.py:debug --out runs/chaos

Each time the same command is started, and after a random time SIGKILL, or for some of them SIGTERM, is sent. Then it
may end. Parameters, optimizer state and metrics rows (but for times) have to be those of the other run, to the bit, and
each checkpoint that was listed at a kill has to be whole. With --workdir s3://BUCKET/RUN the run that is killed is in
a bucket, where nothing may be yet; the other one is in OUT. With --emulated that bucket is one of a server on
loopback, which this tool starts, and which fails 5 % of the requests. In a bucket two things more are tried: while the
first start trains, another one has to be refused; and at the end `flexivit verify` has to find each of 100 flipped
bits. The log is OUT/chaos.jsonl. A folder that has one is deleted at the start, any other has to be empty.

python tools/bench/chaos.py 30 --config configs/digits.py --emulated
"""

import argparse
import contextlib
import hashlib
import importlib.util
import io
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

from flexivit_jax import cli, config, errors, storage
from flexivit_jax.running import bucket_lock, bucket_run, exit_codes, manifest, metrics_writer
from flexivit_jax.running.checkpoint import Checkpoints

LOG = "chaos.jsonl"
TIMES = ("step_s", "images_per_s", "data_wait")
EMULATED = pathlib.Path(__file__).parents[2] / "tests" / "running" / "emulated.py"


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


@contextlib.contextmanager
def emulated(cache: pathlib.Path, seed: int) -> Iterator[Any]:
  """Starts a server with a bucket, and a proxy that fails 5 % of the requests; yields the proxy."""
  spec = importlib.util.spec_from_file_location("emulated", EMULATED)
  if spec is None or spec.loader is None or not EMULATED.is_file():
    raise errors.UserError(f"--emulated needs {EMULATED}, of the repository.")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  if module.MISSING:
    raise errors.UserError(
      f"--emulated needs {', '.join(module.MISSING)}: pip install -r requirements-buckets.txt"
    )
  with module.server() as url, contextlib.closing(module.Failing(url, seed)) as proxy:
    proxy.share = 0.05
    os.environ.update(module.environment(proxy.url, cache.absolute()))
    yield proxy


def second_is_refused(args: list[str], run: pathlib.Path) -> str:
  """Starts the command once more while it trains; returns what is wrong, or ""."""
  bucket, end = storage.Bucket(storage.address(run) or ""), time.monotonic() + 60
  while bucket.stat(bucket_lock.NAME) is None and time.monotonic() < end:
    time.sleep(0.2)
  second = subprocess.run(args, capture_output=True, text=True, check=False)
  refused = second.returncode == exit_codes.ERROR and "is in use by process" in second.stderr
  return "" if refused else f"a second start: code {second.returncode}, {second.stderr[-300:]!r}"


def flips_missed(run: pathlib.Path, rng: random.Random, flips: int) -> list[str]:
  """Flips single bits of the checkpoints' objects; returns the objects of which `flexivit verify` does not tell."""
  bucket, missed = storage.Bucket(storage.address(run) or ""), []
  copy, names = bucket_run.fetched(run) / "checkpoints", []
  for step in (p for p in copy.iterdir() if p.name.isdigit()):
    sealed = manifest.read(step / manifest.FOLDER).files
    names += [f"checkpoints/{step.name}/{name}" for name, (size, _) in sealed.items() if size]
    names.append(f"checkpoints/{step.name}/{manifest.FOLDER}/{manifest.NAME}")
  for _ in range(flips):
    name = rng.choice(names)
    whole = bucket.read(name) or b""
    flipped = bytearray(whole)
    flipped[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
    bucket.write(name, bytes(flipped))
    if verified(run):
      missed.append(name)
    bucket.write(name, whole)
  return missed if verified(run) else [*missed, "the whole run, which nothing has changed"]


def verified(run: pathlib.Path) -> bool:
  """Whether `flexivit verify` finds nothing wrong."""
  with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
    return cli.main(["verify", storage.address(run) or str(run)]) == exit_codes.DONE


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
  parser.add_argument(
    "--emulated",
    action="store_true",
    help="in an emulated bucket; the default of --workdir is in it",
  )
  parser.add_argument("--flips", type=int, default=100, help="of bits at the end, in a bucket")
  args, overrides = parser.parse_known_args()
  given = cli.parse(command(args.config, args.out / "whole", overrides)[3:])
  config.load(given.config, given.overrides)
  log = make_room(args.out)
  with contextlib.ExitStack() as stack:
    proxy = None
    if args.emulated:
      args.workdir = args.workdir or pathlib.Path("s3://bucket/chaos/run")
      proxy = stack.enter_context(emulated(args.out / "cache", args.seed))
    wrong = series(args, overrides, log)
    if proxy:
      print(f"{proxy.failed} requests failed")
  sys.exit(wrong > 0)


def series(args: argparse.Namespace, overrides: list[str], log_file: pathlib.Path) -> int:
  """Kills, and compares; returns the number of differences."""
  rng = random.Random(args.seed)
  whole, run = args.out / "whole", args.workdir or args.out / "run"
  begun = time.monotonic()
  subprocess.run(command(args.config, whole, overrides), check=True, stderr=subprocess.DEVNULL)
  longest = args.longest or 0.8 * (time.monotonic() - begun)
  wrong, asked, in_bucket = 0, False, storage.address(run) is not None
  with log_file.open("w") as log:
    kill = 0
    while kill < args.kills:
      after, gentle = rng.uniform(0, longest), rng.random() < args.terminate
      begun = time.monotonic()
      process_args = command(args.config, run, overrides)
      with subprocess.Popen(process_args, stderr=subprocess.PIPE, text=True) as process:
        if in_bucket and not asked:
          second = second_is_refused(process_args, run)
          asked = (
            not second or process.poll() is None
          )  # else the first had ended, and nothing was asked
          wrong += asked and bool(second)
          print(second or "two writers: the second is refused", flush=True)
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
      # -SIGTERM: it came in the first tenth of a second, before there was anything to save.
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
  if in_bucket:
    missed = flips_missed(run, rng, args.flips)
    wrong += len(missed)
    print(f"{args.flips} flipped bits: {len(missed)} not found {missed or ''}".rstrip(), flush=True)
  print(f"{args.kills} kills: {wrong} differences; the end is {'the same' if same else 'another'}")
  return wrong


if __name__ == "__main__":
  cli.tool(main)
