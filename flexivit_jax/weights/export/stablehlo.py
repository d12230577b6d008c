"""An artifact: one model at several patch sizes in one file, to run where only jax and numpy are.

A zip: the weights once; for each size its kernel and position grid, resampled here and never again, and a StableHLO
program that takes all of them and any number of images; a record with the sha256 of each part. `artifact.py` runs it.
Of two towers the programs give embeddings, and there is one more, of texts, with weights of its own. Of a Segmenter
they give the scores of every pixel, of a detector boxes and their scores, by name.
"""

import hashlib
import io
import json
import pathlib
import zipfile
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax import export

from flexivit_jax import errors, trees
from flexivit_jax.files import replacing
from flexivit_jax.models import (
  FlexiViT,
  OwlViT,
  Segmenter,
  TextTower,
  TwoTowers,
  two_towers,
  vit_part,
)
from flexivit_jax.sizes import SeqHw, SizeArgs, size_args, size_text
from flexivit_jax.trees import Json, Params
from flexivit_jax.weights import baking, npz

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
FORMAT = "flexivit artifact 1"
FORMAT_OF_PIXELS = "flexivit artifact 2"
FORMAT_OF_BOXES = "flexivit artifact 3"
BOXES = ("pred_boxes", "class_logits")
Result = tuple[jax.Array, Json]  # of a model: its main output, and all by name


def write(
  out: pathlib.Path,
  model: FlexiViT | TwoTowers | Segmenter | OwlViT,
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
    model, params, record: what `weights.load_with_record` or `weights.tasks.load` returns; the record goes into the
      file, and with it the tokenizer.
    image_hw: pixels.
    sizes: tokens per side or (per column, per row), a program each; in the file (4, 6) is "4x6".
    platforms: where it is to run, of `PLATFORMS`.

  Raises:
    UserError: a size that does not divide the image, an unknown platform, another suffix, a file that is there; a
      detector whose queries are not fixed (`models.owl_vit.with_queries`).
  """
  _check(out, platforms)
  towers = isinstance(model, TwoTowers)
  whole, own = (model.parts["image"], params["image"]) if towers else (model, params)
  if isinstance(model, OwlViT) and model.open:
    raise errors.UserError(
      "This detector's queries are texts or vectors, and an exported one has fixed ones; give --names."
    )
  end: Callable[[Result], Any] = _main
  if towers:
    end = lambda result: two_towers.unit(_main(result))  # noqa: E731
  elif isinstance(model, OwlViT):
    end = _boxes
  resampled, part = baking.resampled(whole), vit_part(whole)
  channels = (own[part] if part else own)["embedding"]["kernel"].shape[2]
  shape = (*image_hw, channels)
  shared = {n: a for n, a in trees.flatten(own).items() if n not in resampled}
  parts = {"weights.npz": _npz(shared)}
  given = _outputs(whole, image_hw, sizes)
  for size in dict.fromkeys(sizes):
    fixed, baked, args = baking.bake_whole(whole, own, image_hw=image_hw, **size_args(size))
    flat = trees.flatten(baked)
    program = _program(fixed, end, flat, (shape, np.float32), platforms, args)
    parts[f"{size_text(size)}/embedding.npz"] = _npz({n: flat[n] for n in resampled if n in flat})
    parts[f"{size_text(size)}/program.mlirbc"] = program.mlir_module_serialized
  if towers:
    text, flat = model.parts["text"], trees.flatten(params["text"])
    program = _program(text, end, flat, ((text.max_length,), np.int32), platforms)
    parts["text/weights.npz"] = _npz(flat)
    parts["text/program.mlirbc"] = program.mlir_module_serialized
    record = record | scalars(model, params)
  described = (
    record
    | given
    | {
      "sizes": [size_text(size) for size in dict.fromkeys(sizes)],
      "image_size": list(image_hw),
      "image_shape": list(shape),
      "platforms": list(platforms),
      "calling_convention_version": program.calling_convention_version,
      "jax": jax.__version__,
      "sha256": {name: hashlib.sha256(part).hexdigest() for name, part in parts.items()},
    }
  )
  _write(out, parts | {"record.json": json.dumps(described, allow_nan=False).encode()})


def scalars(model: TwoTowers, params: Params) -> Json:
  """Returns what a record says of texts and of the products of embeddings.

  "text_length": tokens of a text; "scale" and "bias" (0 where there is none): the similarity is
  `scale * image @ text + bias`.
  """
  bias = float(params["b"][0]) if "b" in params else 0.0
  length = model.parts["text"].max_length
  return {"text_length": length, "scale": float(np.exp(params["t"][0])), "bias": bias}


def _outputs(model: Any, image_hw: tuple[int, int], sizes: Sequence[SeqHw]) -> Json:
  """What a record says of the format, and of the shape of what a program gives; "boxes" by size and by name."""
  if isinstance(model, Segmenter):
    return {"format": FORMAT_OF_PIXELS, "outputs": [*image_hw, model.num_classes]}
  if not isinstance(model, OwlViT):
    return {"format": FORMAT, "outputs": model.num_classes or model.num_features}
  k, boxes = model.num_classes, {}
  for size in sizes:
    h, w = model.grid(image_hw, **size_args(size)).grid_hw
    boxes[str(size_text(size))] = {"pred_boxes": [h * w, 4], "class_logits": [h * w, k]}
  return {"format": FORMAT_OF_BOXES, "outputs": k, "boxes": boxes}


def _main(result: Result) -> jax.Array:
  return result[0].astype(np.float32)


def _boxes(result: Result) -> dict[str, jax.Array]:
  return {name: result[1][name].astype(np.float32) for name in BOXES}


def _check(out: pathlib.Path, platforms: Sequence[str]) -> None:
  for platform in platforms:
    if platform not in PLATFORMS:
      raise errors.unknown("platform", platform, PLATFORMS)
  if out.suffix != ".zip":
    raise errors.UserError(f"{out}: an artifact is a .zip; give a name that ends so.")
  if out.exists():
    raise errors.UserError(f"{out} is there already; remove it or give another name.")


def _program(
  model: FlexiViT | TextTower | Segmenter | OwlViT,
  end: Callable[[Result], Any],
  flat: Params,
  example: tuple[tuple[int, ...], type],
  platforms: Sequence[str],
  size: SizeArgs | None = None,
) -> export.Exported:
  """The forward pass, of a FlexiViT at its own patch size, of arrays by name and a batch of any size.

  Args:
    model: what runs.
    end: of what it gives.
    flat: its parameters by name.
    example: shape and dtype of one input, without the axis of the batch.
    platforms: where it is to run.
    size: static arguments of the model.
  """

  def forward(flat: Params, x: jax.Array) -> Any:
    return end(model.apply({"params": trees.unflatten(flat)}, x, **(size or {})))

  arrays = {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in flat.items()}
  shape, dtype = example
  x = jax.ShapeDtypeStruct((*export.symbolic_shape("n"), *shape), dtype)
  # Every argument is kept, used or not: the loader knows their names, not what the model does with them.
  return export.export(jax.jit(forward, keep_unused=True), platforms=platforms)(arrays, x)


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
