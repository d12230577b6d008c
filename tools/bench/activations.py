"""Compares the estimate of activations, `Model.activation_bytes`, with what XLA's CPU compiler allocates.

python tools/bench/activations.py --csv results/activations.csv

Each program is the gradients of a training step on four forced devices, in float32, with attention as the formula has
it. XLA's figure is the temporary memory of one device; the estimate is that of the device's images, and with
`scan="by_block"` a copy of the blocks' parameters. Only compiled, never run.
"""

import argparse
import functools
import os
import pathlib
from typing import Any

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp

from flexivit_jax import cli, trees
from flexivit_jax.devices import compilation, sharding
from flexivit_jax.evaluators import results
from flexivit_jax.models import FlexiViT
from flexivit_jax.objectives.supervised import supervised
from flexivit_jax.training import steps

MIB = 2**20
TINY = dict(variant="Ti", depth=4)
# Model, pixels a side, tokens a side, images a device. S is the paper's model at its finest size.
PROGRAMS: list[tuple[dict[str, Any], int, int, int]] = [
  *((dict(TINY, scan=scan, remat=remat), 96, seqhw, 8)
    for scan in (True, "by_block", False) for remat in (False, "dots", "blocks") for seqhw in (6, 16)),
  *((dict(variant="S", scan=bool(remat), remat=remat), 240, 30, 1) for remat in (False, "dots", "blocks")),
]  # fmt: skip


def temporary(model: FlexiViT, side: int, seqhw: int, each: int) -> int:
  """Bytes that XLA allocates on each device besides arguments and results."""
  mesh = sharding.make_mesh()
  spec = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
  n = each * mesh.size
  batch = {
    k: spec(shape, sharding=sharding.batch_split(mesh))
    for k, shape in {"image": (n, side, side, 3), "labels": (n, model.num_classes)}.items()
  }
  params = jax.eval_shape(lambda: steps.init_params(model, {"image": (side, side, 3)}, seed=0))
  everywhere = sharding.replicated(mesh)
  placed = jax.tree.map(lambda x: spec(x.shape, sharding=everywhere), params)
  step: Any = jax.ShapeDtypeStruct((), jnp.int32, sharding=everywhere)
  state = steps.TrainState(step, placed, None)
  fn = functools.partial(steps.gradients, model=model, objective=supervised(), seed=0, seqhw=seqhw)
  return compilation.compile_one(fn, (state, batch), "the gradients").temp_bytes


def estimate(model: FlexiViT, side: int, seqhw: int, each: int) -> float:
  """Bytes that `flexivit plan` expects of the same."""
  shapes = {"image": (side, side, 3)}
  expected = each * model.activation_bytes(shapes, seqhw=seqhw)
  if model.scan == "by_block":
    params = jax.eval_shape(lambda: steps.init_params(model, shapes, seed=0))
    blocks = [v for k, v in params["Transformer"].items() if k.startswith("encoderblock_")]
    expected += trees.size_in_bytes(blocks)
  return expected


def main() -> None:
  """Parses the command line."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
  parser.add_argument("--csv", type=pathlib.Path, help="a file to add the rows to")
  args = parser.parse_args()
  for fields, side, seqhw, each in PROGRAMS:
    model = FlexiViT(num_classes=10, attention="einsum", **fields)
    got, expected = temporary(model, side, seqhw, each), estimate(model, side, seqhw, each)
    row = {
      "width": str(model.width), "depth": str(model.depth), "scan": str(model.scan),
      "remat": str(model.remat or "none"), "tokens": str(seqhw**2 + 1), "images": str(each),
      "XLA MiB": f"{got / MIB:.1f}", "estimate MiB": f"{expected / MIB:.1f}",
      "estimate / XLA": f"{expected / got:.2f}",
    }  # fmt: skip
    print(", ".join(f"{k} {v}" for k, v in row.items()), flush=True)
    if args.csv:
      results.append_csv(args.csv, [row])


if __name__ == "__main__":
  cli.tool(main)
