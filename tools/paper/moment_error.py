"""How well a kernel that shrinks keeps the tokens of real patches, for white noise and for measured second moments.

Usage:
  python tools/paper/moment_error.py CHECKPOINT DIR [--sizes 15,12,10,8]

DIR holds train/CLASS/*.jpg. Moments are of a hundred images, errors of a hundred others: the norm of the difference
between the tokens of patches and those of the resized patches, relative to the tokens' (the bias, and the mean that it
answers to, left in). "2-D" is the whole second moment of a channel's patch, "separable" the product of one along rows
and columns, as the model stores it.
"""

import argparse
import pathlib
from typing import Any

import numpy as np

from flexivit_jax import cli, data, resize, weights
from flexivit_jax.flexify import recipe


def patches(folder: pathlib.Path, split: str, side: int) -> Any:
  """Patches [n, side, side, c] of a hundred images, in [-1, 1]."""
  source = data.make_source(name="folder", split=split, data_dir=folder)
  prepare = data.parse(f"decode|{recipe.central(14 * side)}|keep('image')")
  images = [prepare({"image": r["image"]}, None)["image"] for r in source.read(range(100))]
  cut = np.stack(images).reshape(100, 14, side, 14, side, 3).transpose(0, 1, 3, 2, 4, 5)
  return cut.reshape(-1, side, side, 3).astype(np.float64)


def full_resize(kernel: Any, new: int, operator: str, s: Any) -> Any:
  """PI-resize under a whole second moment `s` of a channel's patch: (sqrt(S) B^T)^+ sqrt(S) w."""
  old = kernel.shape[0]
  b = np.kron(*[resize.resize_matrix(old, new, operator)] * 2)
  values, vectors = np.linalg.eigh(s)
  root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
  p = np.linalg.pinv(root @ b.T, rcond=1e-8) @ root
  return (p @ kernel.reshape(old * old, -1)).reshape(new, new, *kernel.shape[2:])


def main() -> None:
  """Prints a line for each size."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument("checkpoint", type=pathlib.Path)
  parser.add_argument("folder", type=pathlib.Path)
  parser.add_argument("--sizes", default="15,12,10,8")
  args = parser.parse_args()
  _, params = weights.load(args.checkpoint)
  kernel = np.asarray(params["embedding"]["kernel"], np.float64)
  side = kernel.shape[0]
  measured, test = (
    patches(args.folder, split, side) for split in ("train[:100]", "train[100:200]")
  )
  moment = recipe.moment_of(
    dict(name="folder", split="train[:100]", data_dir=str(args.folder)), 14 * side, side
  )
  flat = measured.transpose(0, 3, 1, 2).reshape(-1, side * side)
  s = flat.T @ flat / len(flat)
  line = np.asarray(moment)[np.abs(np.subtract.outer(np.arange(side), np.arange(side)))]
  product = np.kron(line, line) * np.trace(s) / side**2
  print(
    f"separable against 2-D moment: {np.linalg.norm(product - s) / np.linalg.norm(s):.3f} of its norm"
  )
  print("moment " + " ".join(f"{m:.3f}" for m in moment))
  tokens = np.tensordot(test, kernel, 3)
  for new in map(int, args.sizes.split(",")):
    matrix = resize.resize_matrix(side, new)
    small = np.einsum("ah,bw,nhwc->nabc", matrix, matrix, test, optimize=True)
    kernels = {
      "white noise": resize.pi_resize(kernel, (new, new)),
      "separable": resize.pi_resize(kernel, (new, new), "linear", moment),
      "2-D": full_resize(kernel, new, "linear", s),
    }
    errors = {
      name: np.linalg.norm(np.tensordot(small, k, 3) - tokens) / np.linalg.norm(tokens)
      for name, k in kernels.items()
    }
    print(f"{side} -> {new:2}: " + ", ".join(f"{name} {e:.3f}" for name, e in errors.items()))


if __name__ == "__main__":
  cli.tool(main)
