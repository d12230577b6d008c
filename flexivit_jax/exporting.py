"""`flexivit export`: one model at several patch sizes in one file, to run where only jax and numpy are.

A zip: the weights once; for each size its kernel and position grid, resampled here and never again, and a StableHLO
program that takes all of them and any number of images; a record with the sha256 of each part. `artifact.py` runs it.
"""

import argparse
import hashlib
import io
import json
import pathlib
import zipfile
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax import export

from flexivit_jax import arguments, artifact, errors, trees, weights
from flexivit_jax.models import FlexiViT
from flexivit_jax.weights import certificate

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
FORMAT = "flexivit artifact 1"
_BAKED = ("embedding/kernel", "pos_embedding")


def run(args: argparse.Namespace) -> None:
  """Writes args.out and its certificate; prints the differences."""
  model, params, record = weights.load_with_record(args.checkpoint, **arguments.loading(args))
  hw = certificate.image_hw(record, args.image_size)
  given = {} if args.platforms is None else {"platforms": args.platforms}
  write_artifact(args.out, model, params, record, image_hw=hw, sizes=args.seqhw, **given)
  rows = verify(args.out, model, params)
  for row in rows:
    print(f"seqhw {row.seqhw:3}: largest difference of the logits {row.difference:.1e}")
  if rows:
    certificate.write(args.out, args.checkpoint, rows, record, hw)
    print(f"wrote {args.out} and {certificate.path_of(args.out)}")
  else:
    print(f"wrote {args.out}, not compared with its source: that takes the platform cpu")


def write_artifact(
  out: pathlib.Path,
  model: FlexiViT,
  params: dict,
  record: dict[str, Any],
  *,
  image_hw: tuple[int, int],
  sizes: Sequence[int],
  platforms: Sequence[str] = ("cpu", "cuda", "tpu"),
) -> None:
  """Writes an artifact for images of `image_hw`; it appears under its name only when it is complete.

  Args:
    out: a name that ends in .zip and is not there yet.
    model, params, record: what `weights.load_with_record` returns; the record goes into the file.
    image_hw: pixels.
    sizes: tokens per side (`seqhw`), a program each.
    platforms: where it is to run, of `PLATFORMS`.

  Raises:
    UserError: a size that does not divide the image, an unknown platform, another suffix, a file that is there.
  """
  _check(out, platforms)
  shape = (*image_hw, params["embedding"]["kernel"].shape[2])
  parts = {"weights.npz": _npz({n: a for n, a in trees.flatten(params).items() if n not in _BAKED})}
  for size in dict.fromkeys(sizes):
    fixed, baked = weights.bake(model, params, image_hw=image_hw, seqhw=size)
    flat = trees.flatten(baked)
    program = _program(fixed, flat, shape, platforms)
    parts[f"{size}/embedding.npz"] = _npz({n: flat[n] for n in _BAKED if n in flat})
    parts[f"{size}/program.mlirbc"] = program.mlir_module_serialized
  described = record | {
    "format": FORMAT,
    "sizes": list(dict.fromkeys(sizes)),
    "image_size": list(image_hw),
    "image_shape": list(shape),
    "outputs": model.num_classes or model.width,
    "platforms": list(platforms),
    "calling_convention_version": program.calling_convention_version,
    "jax": jax.__version__,
    "sha256": {name: hashlib.sha256(part).hexdigest() for name, part in parts.items()},
  }
  _write(out, parts | {"record.json": json.dumps(described, allow_nan=False).encode()})


def verify(out: pathlib.Path, model: FlexiViT, params: dict) -> list[certificate.Row]:
  """Reads the artifact back and compares its logits with the model's, on the CPU; no rows if it cannot run there.

  Raises:
    UserError: they differ, and then the artifact is removed.
  """
  cpu = _cpu()
  with jax.default_device(cpu):
    loaded = artifact.load_artifact(out)
    if cpu is None or "cpu" not in loaded.record["platforms"]:
      return []
    *hw, channels = loaded.record["image_shape"]
    image, params = certificate.images(tuple(hw), channels), jax.tree.map(np.asarray, params)
    rows = [
      certificate.Row(s, certificate.logits(model, params, image, s), loaded.predict(image, s))
      for s in loaded.sizes
    ]
  for row in rows:
    if not row.difference <= row.limit:
      out.unlink()
      raise errors.UserError(
        f"The artifact differs at seqhw={row.seqhw} by {row.difference:.1e}, more than"
        f" {row.limit:.1e}; nothing is written. Please report this."
      )
  return rows


def _cpu() -> jax.Device | None:
  try:
    return jax.devices("cpu")[0]
  except RuntimeError:  # JAX_PLATFORMS leaves it out
    return None


def _check(out: pathlib.Path, platforms: Sequence[str]) -> None:
  for platform in platforms:
    if platform not in PLATFORMS:
      raise errors.unknown("platform", platform, PLATFORMS)
  if out.suffix != ".zip":
    raise errors.UserError(f"{out}: an artifact is a .zip; give a name that ends so.")
  if out.exists():
    raise errors.UserError(f"{out} is there already; remove it or give another name.")


def _program(
  model: FlexiViT, flat: dict[str, Any], shape: tuple[int, ...], platforms: Sequence[str]
) -> export.Exported:
  """The forward pass at the model's own patch size, of arrays by name and a batch of any size."""

  def forward(flat: dict[str, Any], image: Any) -> Any:
    return model.apply({"params": trees.unflatten(flat)}, image)[0]

  arrays = {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in flat.items()}
  image = jax.ShapeDtypeStruct((*export.symbolic_shape("n"), *shape), np.float32)
  # Every argument is kept, used or not: the loader knows their names, not what the model does with them.
  return export.export(jax.jit(forward, keep_unused=True), platforms=platforms)(arrays, image)


def _npz(arrays: dict[str, Any]) -> bytes:
  file = io.BytesIO()
  np.savez(file, allow_pickle=False, **{name: np.asarray(array) for name, array in arrays.items()})
  return file.getvalue()


def _write(out: pathlib.Path, parts: dict[str, bytes]) -> None:
  out.parent.mkdir(parents=True, exist_ok=True)
  part = out.with_name(f".{out.name}.part")
  with zipfile.ZipFile(part, "w", zipfile.ZIP_STORED) as file:
    for name, data in parts.items():
      file.writestr(zipfile.ZipInfo(name), data)  # its date is fixed: equal content, equal bytes
  part.replace(out)
