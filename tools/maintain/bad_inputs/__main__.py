"""Gives every command bad inputs, and counts how each one ends: none may end in a traceback.

    python tools/maintain/bad_inputs 2000 --out results/bad_inputs.csv

An input is a command line that works, in which something is then made wrong: a file that it reads is damaged, missing,
or swapped for one of another kind; a folder of images gets what folders of images have; an argument or a value of the
config is odd. What is drawn depends on --seed and the input's number alone: `--only NUMBER` repeats one and shows what
it prints. Two processes share the work. Exit code 1 if any input ends in a traceback, a crash, or not in a minute.
"""

import argparse
import collections
import contextlib
import csv
import faulthandler
import io
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from typing import Any

from making import COMMANDS, bad_input, originals

from flexivit_jax import cli, errors

LIMIT_S = 60


class TooLongError(BaseException):
  """An input that does not end."""


def _alarm(*_: Any) -> None:
  faulthandler.dump_traceback(file=sys.__stderr__)
  raise TooLongError


def attempt(argv: list[str]) -> tuple[str, str]:
  """Runs a command line in this process; returns (how it ended, the last line or the traceback)."""
  output = io.StringIO()
  signal.signal(signal.SIGALRM, _alarm)
  signal.alarm(LIMIT_S)
  try:
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
      code = cli.main(argv)
  except SystemExit as e:  # argparse
    code = int(e.code or 0)
  except TooLongError:
    return "too long", traceback.format_exc()
  except BaseException:
    return "traceback", output.getvalue()[-2000:] + traceback.format_exc()
  finally:
    signal.alarm(0)
  text = output.getvalue()
  if "Traceback (most recent call last)" in text:
    return "traceback", text[-4000:]
  return f"exit {code}", text.strip().splitlines()[-1][:300] if text.strip() else ""


def work(numbers: range, seed: int, rows: pathlib.Path, show: bool) -> None:
  """Runs inputs one after the other; writes a row of JSON for each."""
  base = pathlib.Path(tempfile.mkdtemp(prefix="bad_inputs_"))
  os.environ |= {"XDG_CACHE_HOME": str(base / "cache")}
  try:
    made = originals(base)
    with rows.open("a") as file:
      for number in numbers:
        room = base / f"input{number}"
        room.mkdir()
        os.chdir(room)
        command, argv, wrong = bad_input(number, seed, made, room)
        begin = time.perf_counter()
        print(json.dumps({"number": number, "begun": command}), file=file, flush=True)
        ended, said = attempt(argv)
        seconds = round(time.perf_counter() - begin, 2)
        row = {
          "number": number,
          "command": command,
          "ended": ended,
          "wrong": wrong,
          "seconds": seconds,
        }
        shown = [a.replace(str(room), ".") for a in argv]
        print(
          json.dumps(row | {"argv": shown, "said": said.replace(str(room), ".")}),
          file=file,
          flush=True,
        )
        if show:
          print(f"flexivit {' '.join(shown)}\n({wrong})\n{ended}: {said}")
        os.chdir(base)
        shutil.rmtree(room, ignore_errors=True)
  finally:
    shutil.rmtree(base, ignore_errors=True)


def supervise(number: int, seed: int, rows: pathlib.Path, processes: int) -> None:
  """Divides the inputs among processes; starts one again behind an input that ended it."""
  running: dict[int, tuple[subprocess.Popen, pathlib.Path]] = {}
  for k in range(processes):
    running[k] = _start(range(k, number, processes), seed, rows.with_suffix(f".{k}"))
  while running:
    for k, (process, file) in list(running.items()):
      if process.poll() is None:
        continue
      read = [json.loads(line) for line in file.read_text().splitlines()]
      last = read[-1] if read else None
      if last and "begun" in last:  # it took the process with it
        crash = {
          "number": last["number"],
          "command": last["begun"],
          "ended": "crash",
          "wrong": "",
          "seconds": 0.0,
        }
        with file.open("a") as out:
          print(
            json.dumps(crash | {"argv": [], "said": f"exit code {process.returncode}"}), file=out
          )
        running[k] = _start(range(last["number"] + processes, number, processes), seed, file)
      else:
        if process.returncode:
          raise errors.UserError(f"process {k} ended with code {process.returncode}.")
        del running[k]
    time.sleep(0.2)


def _start(numbers: range, seed: int, file: pathlib.Path) -> tuple[subprocess.Popen, pathlib.Path]:
  span = f"{numbers.start},{numbers.stop},{numbers.step}"
  file.touch()
  argv = [sys.executable, __file__, "0", f"--seed={seed}", f"--span={span}", f"--rows={file}"]
  return subprocess.Popen(argv), file


def main() -> None:
  """Prints a table of commands and ends, and every traceback; exit code 1 if there is one."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("number", type=int, help="how many inputs")
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--only", type=int, help="this input alone; prints what it printed")
  parser.add_argument("--processes", type=int, default=2)
  parser.add_argument("--out", type=pathlib.Path, help="a CSV file of the counts")
  parser.add_argument("--log", type=pathlib.Path, help="a file of JSON lines, one for each input")
  parser.add_argument("--span", help=argparse.SUPPRESS)
  parser.add_argument("--rows", type=pathlib.Path, help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.span:
    return work(range(*map(int, args.span.split(","))), args.seed, args.rows, show=False)
  begin = time.perf_counter()
  with tempfile.TemporaryDirectory() as folder:
    rows_file = pathlib.Path(folder) / "rows"
    if args.only is not None:
      return work(range(args.only, args.only + 1), args.seed, rows_file, show=True)
    supervise(args.number, args.seed, rows_file, args.processes)
    lines = [
      line for file in sorted(rows_file.parent.iterdir()) for line in file.read_text().splitlines()
    ]
  rows = sorted(
    (row for line in lines if "ended" in (row := json.loads(line))), key=lambda row: row["number"]
  )
  if args.log:
    args.log.write_text("".join(json.dumps(row) + "\n" for row in rows))
  bad = summarise(rows, args.out)
  print(f"{len(rows)} inputs of seed {args.seed} in {time.perf_counter() - begin:.0f} s")
  if bad:
    sys.exit(1)


def summarise(rows: list[dict[str, Any]], out: pathlib.Path | None) -> int:
  """Prints the tracebacks and the counts, which also go into a CSV file; returns how many inputs ended badly."""
  bad = [row for row in rows if not row["ended"].startswith("exit")]
  for row in bad:
    print(
      f"--- input {row['number']}: {' '.join(row['argv'])}\n({row['wrong']})\n{row['ended']}: {row['said']}"
    )
  counts = collections.Counter((row["command"], row["ended"]) for row in rows)
  ends = sorted({ended for _, ended in counts})
  table = [["command", *ends]]
  table += [[command, *(str(counts[command, ended]) for ended in ends)] for command in COMMANDS]
  table.append(["all", *(str(sum(counts[c, ended] for c in COMMANDS)) for ended in ends)])
  for line in table:
    print("  ".join(f"{cell:>10}" for cell in line))
  if out:
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w", newline="") as file:
      csv.writer(file).writerows(table)
  return len(bad)


if __name__ == "__main__":
  cli.tool(main)
