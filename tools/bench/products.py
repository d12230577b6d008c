"""How much of a forward pass of one image are its matrix products with weights, on this device.

python tools/bench/products.py --out products.csv

The pass has its kernel and position grid resized beforehand, as `predict` does; `resizing_ms` is one that does it each
time. The products are those of the blocks (queries, keys and values, projection, MLP), one after the other in a program
of their own. All take turns.
"""

import argparse
import csv
import functools
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from flexivit_jax import cli, weights
from flexivit_jax.models import FlexiViT

IMAGE = (240, 240)


def resizing(model: FlexiViT, params: Any, seqhw: int) -> Callable[[], Any]:
  """The model's pass of one image that resizes kernel and grid each time, compiled."""
  image = jnp.zeros((1, *IMAGE, 3))
  apply = functools.partial(model.apply, seqhw=seqhw)
  program = jax.jit(lambda p, x: apply({"params": p}, x)[0]).lower(params, image).compile()
  return functools.partial(program, params, image)


def forward(model: FlexiViT, params: Any, seqhw: int) -> Callable[[], Any]:
  """The same pass with both resized beforehand."""
  fixed, baked = weights.bake(model, params, image_hw=IMAGE, seqhw=seqhw)
  image = jnp.zeros((1, *IMAGE, 3))
  program = jax.jit(lambda p, x: fixed.apply({"params": p}, x)[0]).lower(baked, image).compile()
  return functools.partial(program, baked, image)


def products(model: FlexiViT, seqhw: int) -> Callable[[], Any]:
  """The products of its blocks with weights of the same shapes, compiled."""
  width, mlp, tokens = model.width, model.mlp_dim, seqhw * seqhw + 1
  shapes = ((width, 3 * width), (width, width), (width, mlp), (mlp, width))
  arrays = [[jnp.zeros(shape) for shape in shapes] for _ in range(model.depth)]

  def run(arrays: Any, x: jax.Array) -> jax.Array:
    for qkv, out, first, second in arrays:
      x = (x @ qkv)[:, :width] @ out
      x = (x @ first) @ second
    return x

  x = jnp.ones((tokens, width))
  return functools.partial(jax.jit(run).lower(arrays, x).compile(), arrays, x)


def measure(seqhw: int, variant: str, rounds: int) -> dict[str, float]:
  """Returns the median milliseconds of each."""
  model = FlexiViT(num_classes=1000, variant=variant)
  image = jnp.zeros((1, *IMAGE, 3))
  params = jax.jit(lambda: model.init(jax.random.key(0), image, seqhw=5)["params"])()
  calls = {
    "resizing_ms": resizing(model, params, seqhw),
    "forward_ms": forward(model, params, seqhw),
    "products_ms": products(model, seqhw),
  }
  times: dict[str, list[float]] = {name: [] for name in calls}
  for _ in range(rounds):
    for name, call in calls.items():
      jax.block_until_ready(call())
      begin = time.perf_counter()
      jax.block_until_ready(call())
      times[name].append((time.perf_counter() - begin) * 1e3)
  return {name: round(statistics.median(seconds), 3) for name, seconds in times.items()}


def main() -> None:
  """Parses the command line."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--variant", default="S")
  parser.add_argument("--seqhw", default="5,8,15,30")
  parser.add_argument("--rounds", type=int, default=15)
  parser.add_argument("--out", type=pathlib.Path, help="a CSV file to write")
  args = parser.parse_args()
  rows = []
  for seqhw in map(int, args.seqhw.split(",")):
    found = measure(seqhw, args.variant, args.rounds)
    share = round(found["products_ms"] / found["forward_ms"], 2)
    rows.append({"patch": IMAGE[0] // seqhw, **found, "share": share})
    print("  ".join(f"{name} {value}" for name, value in rows[-1].items()), flush=True)
  if args.out:
    with args.out.open("w", newline="") as file:
      writer = csv.DictWriter(file, rows[0], lineterminator="\n")
      writer.writeheader()
      writer.writerows(rows)


if __name__ == "__main__":
  cli.tool(main)
