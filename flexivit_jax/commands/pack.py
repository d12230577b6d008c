"""`flexivit pack KEY=VALUE ... --out FOLDER`: a data set as large files with random access; see `data.packing`."""

import argparse
import inspect
import os
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from flexivit_jax import errors
from flexivit_jax.commands import options

if TYPE_CHECKING:
  from flexivit_jax.data.pack_inputs import Input
  from flexivit_jax.data.shards import Done

HELP = "a folder, tar shards or parquet as shards with random access"
_MOST_MB = 2**20  # a TiB in one file
_EVERY_S = 5.0  # between two lines of progress


def add_arguments(p: argparse.ArgumentParser) -> None:
  """The data, the folder, the shards."""
  p.add_argument(
    "data",
    nargs="+",
    metavar="KEY=VALUE",
    help="the keys of a config's data section, e.g. name=folder data_dir=photos split=train; name=tar and name=parquet"
    " read these files",
  )
  p.add_argument("--out", required=True, type=options.path, help="the folder of the packed data")
  p.add_argument("--split", help="the name of the split there (default: that of the data)")
  p.add_argument(
    "--shard_mb", type=float, default=256, help="a shard ends when it has so many MiB (default 256)"
  )
  p.add_argument("--shard_examples", type=int, help="a shard has at most so many examples")
  p.add_argument(
    "--on_bad",
    choices=("raise", "skip"),
    default="raise",
    help="rows that cannot be packed end the command, or are left out and listed in the manifest",
  )
  p.add_argument("--max_errors", type=int, help="bad rows that skip tolerates (default 100)")
  p.add_argument("--threads", type=int, help="that read ahead (default: cores, at most 16)")


def run(args: argparse.Namespace) -> None:
  """Packs args.data, and prints what came of it; goes on where it was stopped."""
  from flexivit_jax import storage
  from flexivit_jax.data import packing
  from flexivit_jax.running import run_folder, signals

  if url := storage.address(args.out):
    raise errors.UserError(
      f"--out {url} is an address; expected a folder of this machine, which is copied there afterwards: `aws s3 cp"
      f" --recursive FOLDER {url}`, or `gcloud storage cp -r`."
    )
  if not 0 < args.shard_mb < _MOST_MB:
    raise errors.UserError(f"--shard_mb is {args.shard_mb:g}; expected more than 0, below 2^20.")
  with signals.catch() as stop, stop.interruptible():
    source = _input(options.data_values(args.data), args.on_bad)
    split = args.split or source.about["split"]
    for text in source.notes:
      _note(text)
    # Checked again by `pack`, but a folder of others must not get our lock.
    packing.check_folder(args.out)
    with run_folder.locked(args.out, option="--out"):
      done = packing.pack(
        source,
        args.out,
        split=split,
        shard_bytes=int(args.shard_mb * 2**20),
        on_bad=args.on_bad,
        note=_note,
        progress=_progress(source.size),
        **options.chosen(args, "shard_examples", "max_errors", "threads"),
      )
  skipped = f", {done.skipped:,} bad rows left out" if done.skipped else ""
  shards = f"{done.shards:,} shard{'s' if done.shards > 1 else ''}"
  print(
    f"{args.out}: {split}: {done.examples:,} examples in {shards} of {done.bytes / 2**20:,.1f} MiB in all"
    f"{skipped}. To read it: name='packed', split={split!r}, data_dir={str(args.out)!r}"
  )


# Where data are on this machine, and what does not change a row that is not bad. Class names are recorded themselves.
_NOT_ABOUT = (
  "data_dir",
  "cache_gb",
  "on_bad",
  "allow_empty",
  "classes",
  "num_classes",
  "upright",
)


def _input(values: dict[str, Any], on_bad: str) -> "Input":
  """Opens the data.

  Raises:
    UserError: an argument is unknown or missing, or see `data.make_source`.
  """
  from flexivit_jax import config, data
  from flexivit_jax.data import pack_inputs, packing

  name = values["name"]
  if build_input := packing.INPUTS.get(name):
    rest = {key: value for key, value in values.items() if key != "name"}
    config.check("data", rest, build_input)
    return build_input(**rest)
  build = data.SOURCES.get(name)
  if on_bad == "skip" and build and "on_bad" in inspect.signature(build).parameters:
    values = {"on_bad": on_bad, **values}
  config.check("data", values, data.make_source)
  about = {
    key: value
    for key, value in sorted(values.items())
    if key not in _NOT_ABOUT and not (isinstance(value, str) and os.path.isabs(value))
  }
  source = data.make_source(**values)
  return pack_inputs.of_source(source, about)


def _note(text: str) -> None:
  print(text, file=sys.stderr, flush=True)


def _progress(size: int | None) -> Callable[["Done"], None]:
  """Returns what prints a line every few seconds; what is left is judged by the rows that were read since the start."""
  began = printed = time.monotonic()

  def show(done: "Done") -> None:
    nonlocal printed
    now = time.monotonic()
    if now - printed < _EVERY_S:
      return
    printed = now
    rate = done.read / (now - began)
    of = f"/{size:,}" if size else ""
    parts = [f"row {done.rows:,}{of}", f"{done.shards:,} shards", f"{done.bytes / 2**20:,.0f} MiB"]
    parts += [f"{done.skipped:,} left out"] if done.skipped else []
    parts += [f"{rate:,.0f} rows/s"]
    parts += [f"{(size - done.rows) / rate / 60:,.1f} min left"] if size and rate else []
    _note(" | ".join(parts))

  return show
