"""`flexivit export`: one model at several patch sizes, to run without this project; read back and compared.

What is written, and how, is told in `weights/stablehlo.py`, `weights/onnx_folder.py` and `weights/saved_model.py`.
"""

import argparse
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from flexivit_jax import errors, weights
from flexivit_jax.commands import options
from flexivit_jax.models import FlexiViT
from flexivit_jax.weights import certificate, optional
from flexivit_jax.weights.export import (
  artifact,
  frameworks,
  onnx as onnx_folder,
  saved_model,
  stablehlo,
)

WRITERS: dict[str, Callable] = {
  "stablehlo": stablehlo.write,
  "onnx": onnx_folder.write,
  "saved_model": saved_model.write,
}
LOADERS: dict[str, Callable] = {
  "stablehlo": artifact.load_artifact,
  "onnx": onnx_folder.load,
  "saved_model": saved_model.load,
}


def run(args: argparse.Namespace) -> None:
  """Writes args.out and its certificate; prints the differences."""
  given = _options(args)
  model, params, record = weights.load_with_record(args.checkpoint, **options.loading(args))
  model = model.clone(attention="einsum")  # what runs everywhere, and is not this machine's choice
  if args.to == "onnx" and model.dtype != "float32":
    model, record = _in_float32(model, record)
  weights.print_notes(record)
  hw = certificate.image_hw(record, args.image_size)
  record = weights.written_for(record, hw)
  WRITERS[args.to](args.out, model, params, record, image_hw=hw, sizes=args.seqhw, **given)
  if not args.verify:
    print(f"wrote {args.out}, not compared with its source (--no-verify)")
    return
  rows = verify(args.out, model, params, to=args.to)
  for row in rows:
    print(f"seqhw {row.seqhw:3}: largest difference of the logits {row.difference:.1e}")
  if rows:
    certificate.write(args.out, args.checkpoint, rows, record, hw)
    print(f"wrote {args.out} and {certificate.path_of(args.out)}")
  else:
    print(f"wrote {args.out}, not compared with its source: that takes the platform cpu")


def verify(
  out: pathlib.Path, model: FlexiViT, params: dict, *, to: str = "stablehlo"
) -> list[certificate.Row]:
  """Reads what was written back and compares its logits with the model's, on the CPU; no rows if it cannot run there.

  Raises:
    UserError: they differ. What was written is removed then, and after any other error.
  """
  try:
    rows = _compare(out, model, params, LOADERS[to])
    for row in rows:
      if not row.difference <= row.limit:
        raise errors.UserError(
          f"The artifact differs at seqhw={row.seqhw} by {row.difference:.1e}, more than"
          f" {row.limit:.1e}; nothing is written. Please report this."
        )
  except Exception:
    shutil.rmtree(out) if out.is_dir() else out.unlink()
    raise
  return rows


def _compare(
  out: pathlib.Path, model: FlexiViT, params: dict, load: Callable
) -> list[certificate.Row]:
  cpu = _cpu()
  with jax.default_device(cpu):
    loaded = load(out)
    if cpu is None or "cpu" not in loaded.record.get("platforms", ["cpu"]):
      return []
    *hw, channels = loaded.record["image_shape"]
    image, params = certificate.images(tuple(hw), channels), jax.tree.map(np.asarray, params)
    return [
      certificate.Row(s, certificate.logits(model, params, image, s), loaded.predict(image, s))
      for s in loaded.sizes
    ]


def _cpu() -> jax.Device | None:
  try:
    return jax.devices("cpu")[0]
  except RuntimeError:  # JAX_PLATFORMS leaves it out
    return None


def _options(args: argparse.Namespace) -> dict[str, Any]:
  """What only one kind of export takes; all that can be wrong before the checkpoint is read."""
  if args.to not in WRITERS:
    raise errors.unknown("kind of export, --to", args.to, WRITERS)
  if args.to == "stablehlo":
    return {} if args.platforms is None else {"platforms": args.platforms}
  if args.platforms is not None:
    raise errors.UserError(
      f"--platforms has no effect with --to={args.to}, which runs wherever its framework does; remove it."
    )
  if args.to == "saved_model":
    optional.require("tensorflow", "Writing a SavedModel")
    return {}
  optional.require("onnx", "Writing ONNX")
  if args.verify:
    optional.require("onnxruntime", frameworks.COMPARING_ONNX)
  return {}


def _in_float32(model: FlexiViT, record: dict[str, Any]) -> tuple[FlexiViT, dict[str, Any]]:
  """The same model with its matrix products in float32, as ONNX graphs have them, and a note of that."""
  note = f"ONNX graphs are in float32; the model's own matrix products are in {model.dtype}."
  print(f"note: {note}")
  changed = {"model": record["model"] | {"dtype": "float32"}, "notes": [*record["notes"], note]}
  return model.clone(dtype="float32"), record | changed
