"""An artifact: one model at several patch sizes in one file, to run where only jax and numpy are.

A zip: the weights once; for each size its kernel and position grid, resampled here and never again, and a StableHLO
program that takes all of them and any number of images; a record with the sha256 of each part. `artifact.py` runs it.
"""

import hashlib
import io
import json
import pathlib
import zipfile
from collections.abc import Sequence

import jax
import numpy as np
from jax import export

from flexivit_jax import errors, trees
from flexivit_jax.files import replacing
from flexivit_jax.models import FlexiViT
from flexivit_jax.sizes import SeqHw, size_args, size_text
from flexivit_jax.trees import Json, Params
from flexivit_jax.weights import baking, npz

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
FORMAT = "flexivit artifact 1"


def write(
  out: pathlib.Path,
  model: FlexiViT,
  params: Params,
  record: Json,
  *,
  image_hw: tuple[int, int],
  sizes: Sequence[SeqHw],
  platforms: Sequence[str] = ("cpu", "cuda", "tpu"),
) -> None:
  """Writes an artifact for images of `image_hw`; it appears under its name only when it is complete.

  Args:
    out: a name that ends in .zip and is not there yet.
    model, params, record: what `weights.load_with_record` returns; the record goes into the file.
    image_hw: pixels.
    sizes: tokens per side or (per column, per row), a program each; in the file (4, 6) is "4x6".
    platforms: where it is to run, of `PLATFORMS`.

  Raises:
    UserError: a size that does not divide the image, an unknown platform, another suffix, a file that is there.
  """
  _check(out, platforms)
  shape = (*image_hw, params["embedding"]["kernel"].shape[2])
  shared = {n: a for n, a in trees.flatten(params).items() if n not in baking.RESAMPLED}
  parts = {"weights.npz": _npz(shared)}
  for size in dict.fromkeys(sizes):
    fixed, baked = baking.bake(model, params, image_hw=image_hw, **size_args(size))
    flat = trees.flatten(baked)
    program = _program(fixed, flat, shape, platforms)
    parts[f"{size_text(size)}/embedding.npz"] = _npz(
      {n: flat[n] for n in baking.RESAMPLED if n in flat}
    )
    parts[f"{size_text(size)}/program.mlirbc"] = program.mlir_module_serialized
  described = record | {
    "format": FORMAT,
    "sizes": [size_text(size) for size in dict.fromkeys(sizes)],
    "image_size": list(image_hw),
    "image_shape": list(shape),
    "outputs": model.num_classes or model.num_features,
    "platforms": list(platforms),
    "calling_convention_version": program.calling_convention_version,
    "jax": jax.__version__,
    "sha256": {name: hashlib.sha256(part).hexdigest() for name, part in parts.items()},
  }
  _write(out, parts | {"record.json": json.dumps(described, allow_nan=False).encode()})


def _check(out: pathlib.Path, platforms: Sequence[str]) -> None:
  for platform in platforms:
    if platform not in PLATFORMS:
      raise errors.unknown("platform", platform, PLATFORMS)
  if out.suffix != ".zip":
    raise errors.UserError(f"{out}: an artifact is a .zip; give a name that ends so.")
  if out.exists():
    raise errors.UserError(f"{out} is there already; remove it or give another name.")


def _program(
  model: FlexiViT, flat: Params, shape: tuple[int, ...], platforms: Sequence[str]
) -> export.Exported:
  """The forward pass at the model's own patch size, of arrays by name and a batch of any size."""

  def forward(flat: Params, image: jax.Array) -> jax.Array:
    return model.apply({"params": trees.unflatten(flat)}, image)[0]

  arrays = {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in flat.items()}
  image = jax.ShapeDtypeStruct((*export.symbolic_shape("n"), *shape), np.float32)
  # Every argument is kept, used or not: the loader knows their names, not what the model does with them.
  return export.export(jax.jit(forward, keep_unused=True), platforms=platforms)(arrays, image)


def _npz(arrays: Params) -> bytes:
  file = io.BytesIO()
  np.savez(file, allow_pickle=False, **{name: np.asarray(array) for name, array in arrays.items()})
  return file.getvalue()


def _write(out: pathlib.Path, parts: dict[str, bytes]) -> None:
  out.parent.mkdir(parents=True, exist_ok=True)
  with replacing(out) as part:
    with zipfile.ZipFile(part, "w", zipfile.ZIP_STORED) as file:
      for name, data in parts.items():
        file.writestr(zipfile.ZipInfo(name), data)  # its date is fixed: equal content, equal bytes
    npz.seal(part)
