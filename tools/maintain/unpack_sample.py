"""Turns a zip of one image per class with its labels.csv into the folders OUT/train/CLASS and OUT/val/CLASS.

Usage:
  python tools/maintain/unpack_sample.py imagenet_sample_1k_256.zip photos [--held_out 200]

`val` gets images of classes drawn with seed 0; every class has a folder in both, so that labels are class indices.
"""

import argparse
import csv
import io
import pathlib
import zipfile

import numpy as np

from flexivit_jax import cli


def main() -> None:
  """Writes the folders."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("zip", type=pathlib.Path)
  parser.add_argument("out", type=pathlib.Path)
  parser.add_argument("--held_out", type=int, default=200)
  args = parser.parse_args()
  with zipfile.ZipFile(args.zip) as archive:
    rows = list(csv.DictReader(io.StringIO(archive.read("labels.csv").decode())))
    held_out = set(np.random.default_rng(0).permutation(len(rows))[: args.held_out].tolist())
    for i, row in enumerate(rows):
      name = f"{int(row['index']):04}_{row['wnid']}"
      for split in ("train", "val"):
        (args.out / split / name).mkdir(parents=True, exist_ok=True)
      file = (
        args.out / ("val" if i in held_out else "train") / name / pathlib.Path(row["file"]).name
      )
      file.write_bytes(archive.read(row["file"]))


if __name__ == "__main__":
  cli.tool(main)
