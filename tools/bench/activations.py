"""Compares the estimate of activations, `Model.activation_bytes`, with what XLA's CPU compiler allocates.

python tools/bench/activations.py --csv results/activations.csv
python tools/bench/activations.py --teachers --csv results/teachers.csv

Each program is the gradients of a training step on four forced devices, in float32, with attention as the formula has
it. XLA's figure is the temporary memory of one device; the estimate is that of the device's images, and with
`scan="by_block"` a copy of the blocks' parameters. Only compiled, never run.

With --teachers: the teachers' program, its estimate, and the gradients of their student, which are another program; and
what both take as one program, with and without a barrier between. On one device.
"""

import argparse
import functools
import os
import pathlib
from collections.abc import Iterator
from typing import Any

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp

from flexivit_jax import cli, trees
from flexivit_jax.devices import compilation, sharding
from flexivit_jax.evaluators import results
from flexivit_jax.models import FlexiViT, flops
from flexivit_jax.objectives.distill import Teacher, distill
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


# Student, teacher, images. The first two are those of configs/i1k_distill.py in a coarse and the finest size.
DISTILLED: list[tuple[dict[str, Any], int, dict[str, Any], int]] = [
  (dict(variant="S"), 10, dict(variant="B"), 8),
  (dict(variant="S"), 30, dict(variant="B"), 2),
  (dict(variant="Ti", depth=4), 5, dict(variant="L", depth=12), 4),
  (dict(variant="Ti", depth=4), 5, dict(variant="B"), 8),
]


def distilled(student: FlexiViT, seqhw: int, teacher: FlexiViT, n: int) -> dict[str, str]:
  """A row of the table of teachers: of 224 pixels at patch 16, their student's of 240."""

  def spec(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)

  def params(model: FlexiViT) -> Any:
    return jax.eval_shape(lambda: steps.init_params(model, {"image": (16, 16, 3)}, seed=0))

  frozen = {"t": params(teacher)}
  objective = distill(
    teachers={"t": Teacher(teacher, frozen["t"], "teacher_image", {"seqhw": 14})}, mixup_p=1.0
  )
  assert objective.teaching is not None
  targets = functools.partial(steps.targets, teaching=objective.teaching, seed=0)
  gradients = functools.partial(
    steps.gradients, model=student, objective=objective, seed=0, seqhw=seqhw
  )
  state = steps.TrainState(spec(dtype=jnp.int32), params(student), None)  # type: ignore[arg-type]
  seen, image = {"teacher_image": spec(n, 224, 224, 3)}, spec(n, 240, 240, 3)
  taught = jax.eval_shape(targets, state.step, seen, frozen)

  def in_one(state: Any, image: Any, seen: Any, frozen: Any, *, barrier: bool) -> Any:
    said = targets(state.step, seen, frozen)
    if barrier:
      said, image = jax.lax.optimization_barrier((said, image))
    return gradients(state, {"image": image, "targets": said})

  def mib(fn: Any, *args: Any) -> float:
    return compilation.compile_one(fn, args, "").temp_bytes / MIB

  both = (state, image, seen, frozen)
  got = mib(targets, state.step, seen, frozen)
  expected = n * flops.forward_bytes(teacher, {"image": (224, 224, 3)}, seqhw=14) / MIB
  numbers = {
    "teacher MiB": got,
    "estimate MiB": expected,
    "student MiB": mib(gradients, state, {"image": image, "targets": taught}),
    "as one MiB": mib(functools.partial(in_one, barrier=False), *both),
    "with a barrier MiB": mib(functools.partial(in_one, barrier=True), *both),
    "teacher if trained MiB": n
    * teacher.activation_bytes({"image": (224, 224, 3)}, seqhw=14)
    / MIB,
  }
  names = {
    f"{who} width x depth": f"{one.width} x {one.depth}"
    for who, one in (("student", student), ("teacher", teacher))
  }
  row = {**names, "tokens": str(seqhw**2 + 1), "images": str(n)}
  row |= {k: f"{v:.1f}" for k, v in numbers.items()}
  return row | {"estimate / teacher": f"{expected / got:.2f}"}


def rows(teachers: bool) -> Iterator[dict[str, str]]:
  """Yields the rows of a table."""
  make = functools.partial(FlexiViT, num_classes=10, attention="einsum")
  if teachers:
    for student, seqhw, teacher, n in DISTILLED:
      yield distilled(make(**student), seqhw, make(**teacher), n)
    return
  for fields, side, seqhw, each in PROGRAMS:
    model = make(**fields)
    got, expected = temporary(model, side, seqhw, each), estimate(model, side, seqhw, each)
    yield {
      "width": str(model.width), "depth": str(model.depth), "scan": str(model.scan),
      "remat": str(model.remat or "none"), "tokens": str(seqhw**2 + 1), "images": str(each),
      "XLA MiB": f"{got / MIB:.1f}", "estimate MiB": f"{expected / MIB:.1f}",
      "estimate / XLA": f"{expected / got:.2f}",
    }  # fmt: skip


def main() -> None:
  """Parses the command line."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
  parser.add_argument("--csv", type=pathlib.Path, help="a file to add the rows to")
  parser.add_argument("--teachers", action="store_true", help="of teachers and their students")
  args = parser.parse_args()
  for row in rows(args.teachers):
    print(", ".join(f"{k} {v}" for k, v in row.items()), flush=True)
    if args.csv:
      results.append_csv(args.csv, [row])


if __name__ == "__main__":
  cli.tool(main)
