"""Images a second from a local folder and from an emulated bucket whose requests take longer than here; data wait.

python tools/bench/bucket_input.py --data_dir DIR        # DIR has TFDS's cifar10, as array_record
python tools/bench/bucket_input.py --data_dir DIR --wait 40
python tools/bench/bucket_input.py --data_dir DIR --requests 32 64

The bucket is moto's server behind a proxy that answers requests for ranges itself, both in Python and on the same cores
as what is measured (requirements-buckets.txt). Photographs are those of tools/bench/time_input.py, packed. Each line is
one epoch, the quickest of --rounds.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Iterator
from typing import Any
from unittest import mock

from flexivit_jax import cli, data, storage
from flexivit_jax.data import pack_inputs, packing, remote_shards
from flexivit_jax.evaluators import results

ROOT = pathlib.Path(__file__).resolve().parents[2]
URL = "s3://bucket/data"
READ = "keep('label')"  # no decoding: what the input can bring
DECODE = "decode_inception_crop(224)|flip_lr|value_range(-1, 1)|keep('image', 'label')"
PIECES = {"alone": 1, "256 KiB": 2**18, "whole shards": 2**40}
Options = dict[str, Any]


def module(path: str) -> types.ModuleType:
  """A file of the repository that is not of the package."""
  spec = importlib.util.spec_from_file_location(pathlib.Path(path).stem, ROOT / path)
  assert spec and spec.loader
  loaded = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(loaded)
  return loaded


def pack_photos(folder: pathlib.Path, number: int) -> None:
  """Packs JPEGs of 500 x 375 into shards of 16 MiB."""
  files = module("tools/bench/time_input.py").photos((500, 375), 92, number)
  records = [{"image": file, "label": 0, "id": str(i)} for i, file in enumerate(files)]
  source = data.Source(
    "photos", "train", 1, None, number, lambda indices: [records[i] for i in indices]
  )
  packing.pack(pack_inputs.of_source(source, {}), folder, split="train", shard_bytes=2**24)


def upload(folder: pathlib.Path, url: str, proxy: Any) -> None:
  """Copies a folder into the bucket."""
  bucket = storage.Bucket(url)
  names = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
  for name, path in names.items():
    bucket.upload(path, name)
  for name, entry in bucket.entries().items():
    place = f"{url.removeprefix('s3:/')}/{name}"
    proxy.objects[place] = str(entry.version.tag), names[name].read_bytes()


def images_per_s(options: Options, pp: str) -> float:
  """Reads one epoch of shuffled batches."""
  source, size = data.make_source(**options), 128
  steps, begun = len(source) // size, time.perf_counter()
  with data.train_batches(
    source, pp, batch_size=size, seed=0, num_steps=steps, threads=2, keep_mb=0
  ) as batches:
    for _ in batches:
      pass
  return steps * size / (time.perf_counter() - begun)


@contextlib.contextmanager
def fresh_cache(name: str, scratch: pathlib.Path) -> Iterator[None]:
  """An empty cache folder."""
  with mock.patch.dict(os.environ, {"FLEXIVIT_CACHE": str(scratch / name)}):
    yield


def throughput(
  name: str, local: Options, remote: Options, proxy: Any, scratch: pathlib.Path, rounds: int
) -> list[dict[str, str]]:
  """Measures a data set from each place, with each delay; "cache" is a second epoch from the bucket."""
  rates: dict[tuple[str, str, str], list[float]] = {}
  requests: dict[tuple[str, str, str], int] = {}

  def measure(key: tuple[str, str, str], options: Options, pp: str) -> None:
    before = proxy.requests
    rates.setdefault(key, []).append(images_per_s(options, pp))
    requests[key] = proxy.requests - before

  defaults = remote_shards.RemoteShards.__init__.__kwdefaults__
  for turn in range(rounds):
    for pp in (READ, DECODE) if name == "photographs" else (READ,):
      shown = name if pp == READ else f"{name}, decoded"
      measure((shown, "local folder", ""), local, pp)
      for delay in (0, 20, 50):
        for pieces, size in PIECES.items() if pp == READ else [("256 KiB", 2**18)]:
          changed = {**defaults, "piece": size}
          proxy.delay_s = delay / 1000
          with (
            mock.patch.object(remote_shards.RemoteShards.__init__, "__kwdefaults__", changed),
            fresh_cache(f"{shown} {delay} {pieces} {turn}", scratch),
          ):
            measure((shown, f"bucket, {pieces}", str(delay)), remote, pp)
            if (pieces, delay) == ("256 KiB", 20):
              measure((shown, "cache", ""), remote, pp)
  rows = []
  for key, found in rates.items():
    row = dict(zip(("data", "from", "delay ms"), key, strict=True))
    asked = str(requests[key]) if key[2] else ""
    rows.append({**row, "images/s": f"{max(found):.0f}", "requests": asked})
    print(*rows[-1].values(), sep=" | ", flush=True)
  return rows


def by_requests(
  remote: Options, proxy: Any, scratch: pathlib.Path, numbers: list[int], rounds: int
) -> list[dict[str, str]]:
  """Measures records alone with so many requests at a time."""
  rates: dict[tuple[int, int], list[float]] = {}
  changed = {**remote_shards.RemoteShards.__init__.__kwdefaults__, "piece": 1}
  for turn in range(rounds):
    for number in numbers:
      for delay in (20, 50):
        proxy.delay_s = delay / 1000
        with (
          mock.patch.object(remote_shards, "_REQUESTS", number),
          mock.patch.object(remote_shards.RemoteShards.__init__, "__kwdefaults__", changed),
          fresh_cache(f"{number} {delay} {turn}", scratch),
        ):
          rates.setdefault((number, delay), []).append(images_per_s(remote, READ))
  rows = []
  for (number, delay), found in rates.items():
    row = {"requests at a time": str(number), "delay ms": str(delay)}
    rows.append(row | {"images/s": f"{max(found):.0f}"})
    print(*rows[-1].values(), sep=" | ", flush=True)
  return rows


def data_wait(steps: int, folders: dict[str, str], scratch: pathlib.Path) -> list[dict[str, str]]:
  """Trains configs/cifar10.py for some steps with its data in each place; returns the shares of time waited."""
  rows = []
  for name, folder in folders.items():
    run = scratch / f"run {name}"
    command = [sys.executable, "-m", "flexivit_jax", "train", "--workdir", str(run)]
    command += ["--config", str(ROOT / "configs" / "cifar10.py")]
    changes: dict[str, Any] = dict(
      total_steps=steps, total_epochs=None, evals=None, checkpoint=None
    )
    changes |= {"input.data.data_dir": folder, "optim.schedule.warmup_steps": 5}
    command += [f"--config.{key}={value}" for key, value in changes.items()]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    seconds = json.loads((run / "ledger.json").read_text())[-1]["seconds"]
    waited, busy = seconds.get("data wait", 0.0), seconds["steps"]
    row = {
      "data in": name,
      "steps": str(steps),
      "s": f"{waited + busy:.1f}",
      "waited s": f"{waited:.2f}",
      "data wait": f"{100 * waited / (waited + busy):.1f} %",
    }
    rows.append(row)
    print(*row.values(), sep=" | ", flush=True)
  return rows


def main() -> None:
  """Parses the command line; prints a line for each measurement."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--data_dir", type=pathlib.Path, required=True, help="has TFDS's cifar10")
  parser.add_argument("--number", type=int, default=1024, help="of photographs")
  parser.add_argument("--rounds", type=int, default=3)
  parser.add_argument(
    "--wait", type=int, metavar="STEPS", help="data wait of configs/cifar10.py instead"
  )
  parser.add_argument(
    "--requests", type=int, nargs="+", metavar="N", help="so many at a time, records alone, instead"
  )
  parser.add_argument("--csv", type=pathlib.Path, help="a file to add the numbers to")
  args = parser.parse_args()
  emulated = module("tests/running/emulated.py")
  with contextlib.ExitStack() as stack:
    scratch = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
    server = stack.enter_context(emulated.server())
    proxy = emulated.Failing(server)
    stack.callback(proxy.close)
    env = emulated.environment(proxy.url, scratch / "cache")
    stack.enter_context(mock.patch.dict(os.environ, env))
    upload(args.data_dir / "cifar10", f"{URL}/cifar10", proxy)
    if args.wait:
      proxy.delay_s = 0.02
      places = {"local folder": str(args.data_dir), "bucket": URL, "bucket, in the cache": URL}
      rows = data_wait(args.wait, places, scratch)
    elif args.requests:
      remote = dict(name="cifar10", split="test", data_dir=URL)
      rows = by_requests(remote, proxy, scratch, args.requests, args.rounds)
    else:
      pack_photos(scratch / "photos", args.number)
      upload(scratch / "photos", f"{URL}/photos", proxy)
      cifar = dict(name="cifar10", split="test")
      photos = dict(name="packed", split="train")
      local = str(scratch / "photos")
      rows = throughput(
        "photographs",
        photos | {"data_dir": local},
        photos | {"data_dir": f"{URL}/photos"},
        proxy,
        scratch,
        args.rounds,
      )
      rows += throughput(
        "CIFAR-10",
        cifar | {"data_dir": str(args.data_dir)},
        cifar | {"data_dir": URL},
        proxy,
        scratch,
        args.rounds,
      )
  if args.csv:
    results.append_csv(args.csv, rows)


if __name__ == "__main__":
  cli.tool(main)
