"""`flexivit doctor`: is this machine, or are these machines, ready for a run? See `flexivit_jax.doctor`."""

import argparse
import functools
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TextIO

from flexivit_jax import errors
from flexivit_jax.commands import options
from flexivit_jax.doctor.findings import Finding, wrong
from flexivit_jax.running import exit_codes

HELP = "is this machine ready: versions, devices, storage, data, the other hosts"


def add_arguments(p: argparse.ArgumentParser) -> None:
  """The run folder and the config that are to be checked, the form of the answer."""
  p.add_argument(
    "--workdir", type=options.path, help="the run folder: is written to, read, deleted"
  )
  p.add_argument(
    "--data",
    metavar="CONFIG[:ARG]",
    help="a config: its mesh must fit, and its training images are read for three seconds",
  )
  p.add_argument(
    "--images_per_s", type=float, help="with --data: fewer images a second are not enough"
  )
  p.add_argument("--limit", type=float, default=60.0, help="seconds for each check (default 60)")
  p.add_argument("--json", action="store_true", help="everything, to be read by a program")
  options.add_overrides(p)
  options.add_processes(p)


def run(args: argparse.Namespace) -> None:
  """Prints a line for each check: "ok", or what is wrong and what to do."""
  from flexivit_jax.doctor import examination, findings

  if not 0 < args.limit <= 86400:  # not a NaN either
    raise errors.UserError(f"--limit={args.limit}; expected seconds, as 60.")
  if args.images_per_s is not None and args.data is None:
    raise errors.UserError("--images_per_s is of the images of --data; give that, too.")
  if args.overrides and args.data is None:
    raise errors.UserError(f"--config.{args.overrides[0]} changes the config of --data; give that.")
  printed: list[findings.Finding] = []

  def show(finding: findings.Finding) -> None:
    print(finding.line(examination.WIDTH), flush=True)
    printed.append(finding)

  def end(rows: examination.Rows, processes: int = 1, out: TextIO | None = None) -> None:
    rest = [row for row in rows if row[1] not in printed]
    if args.json:
      print(json.dumps(findings.as_json(rows, processes), indent=1), file=out, flush=True)
    elif rest:
      print(findings.as_text(rest), file=out, flush=True)
    _raise(rows)

  found = examination.of_machine(args.limit)
  if (broken := examination.of_jax(args.limit)) is not None:
    end([("", f) for f in [*found, broken]])
  from flexivit_jax import config
  from flexivit_jax.running import distributed

  settings = None if args.data is None else config.load(args.data, args.overrides)
  try:
    options.join(args)
  except errors.UserError as e:
    missing = findings.Finding(
      "processes", False, str(e), "start all with one --coordinator_address"
    )
    end([("", f) for f in [*found, missing]])
  needs: dict[str, tuple[Callable[[], str], str]] = {}
  if settings is not None:
    again = "read the message; `flexivit bench --input` repeats it"
    needs["data"] = functools.partial(_reading, settings, args.images_per_s), again
    needs["evaluations"] = functools.partial(_evaluations, settings), "prepare what is missing"
  # Of one process a line comes as soon as it is known; of several, those of all are put together first.
  alone = not args.json and not distributed.is_on()
  for finding in found if alone else ():
    show(finding)
  see = show if alone else lambda finding: None
  of_devices, reached = examination.of_devices(args.workdir, settings, needs, args.limit, see)
  rows, whole = examination.of_all([*found, *of_devices], args.limit, reached=reached)
  import jax

  if whole:
    return end(rows, jax.process_count())
  # The others say nothing on standard output (`options.join`); here each has to speak for itself.
  index = jax.process_index()
  where = f"process {index}: " if distributed.is_on() else ""
  return end([(where, f) for _, f in rows], out=sys.stderr if index else None)


def _raise(rows: Sequence[tuple[str, Finding]]) -> None:
  """Ends the command where a check is not green."""
  bad = [finding for _, finding in rows if not finding.ok]
  if not bad:
    return
  names = ", ".join(dict.fromkeys(finding.check for finding in bad))
  said = f"{len(bad)} of {len(rows)} checks are not green: {names}."
  if any(finding.failure == "time" for finding in bad):
    # Python would wait at its end for what hangs.
    print(f"flexivit: error: {said}", file=sys.stderr, flush=True)
    os._exit(exit_codes.ERROR)
  raise errors.UserError(said)


def _reading(settings: Mapping[str, Any], wanted: float | None) -> str:
  """Reads the training images of a config for three seconds."""
  from flexivit_jax.experiment import benchmarks

  row = benchmarks.reading(settings, seconds=3.0)
  rate = row["images_per_s"]
  said = f"{rate:.0f} images/s of {row['image']}, {row['images_per_core_s']:.0f} a core"
  if wanted is not None and rate < wanted:
    wrong(
      f"{said}; {wanted:.0f} are wanted",
      "pack the data (flexivit pack), copy them to a local disk, or give more cores (input.workers, input.threads)",
    )
  return said


def _evaluations(settings: Mapping[str, Any]) -> str:
  """Opens what the evaluations of a config need, as `flexivit train` does before its first step."""
  from flexivit_jax import experiment

  try:
    exp = experiment.from_config(settings)
  except errors.UserError:
    sections = settings.get("evals") or {}
    lost = experiment.missing_data(sections)  # all of them, not only the first
    if not lost:
      raise
    keys = ", ".join(lost)
    wrong(
      f"{len(lost)} of {len(sections)} have no data ({keys}): "
      + " ".join(dict.fromkeys(lost.values())),
      "prepare them, or leave an evaluation out: --config.evals.NAME=None",
    )
  return f"{len(exp.evaluations)}: {', '.join(exp.evaluations)}" if exp.evaluations else "none"
