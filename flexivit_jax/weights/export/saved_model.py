"""A TensorFlow SavedModel of several patch sizes: a signature for each, the weights once.

Written where TensorFlow is installed, by JAX's own jax2tf; TensorFlow runs the same StableHLO as the artifact.
"""

import json
import pathlib
from collections.abc import Callable, Sequence

import jax
import numpy as np

from flexivit_jax import trees
from flexivit_jax.models import FlexiViT
from flexivit_jax.sizes import SeqHw, size_args, size_text
from flexivit_jax.trees import Json, Params
from flexivit_jax.weights import baking, folders
from flexivit_jax.weights.export import artifact, frameworks

FORMAT = "flexivit saved model 1"


def write(
  out: pathlib.Path,
  model: FlexiViT,
  params: Params,
  record: Json,
  *,
  image_hw: tuple[int, int],
  sizes: Sequence[SeqHw],
) -> None:
  """Writes a SavedModel for images of `image_hw`; it appears under its name only when it is complete.

  Args:
    out: a folder that is not there yet.
    model, params, record: what `weights.load_with_record` returns; the record goes into the folder.
    image_hw: pixels.
    sizes: tokens per side or (per column, per row), a signature each: `seqhw_08`, `seqhw_04x06`.

  Raises:
    UserError: a size that does not divide the image, a folder that is there, TensorFlow that is not.
  """
  sizes = tuple(dict.fromkeys(sizes))
  shape = (*image_hw, params["embedding"]["kernel"].shape[2])
  shared = {n: np.asarray(a) for n, a in trees.flatten(params).items() if n not in baking.RESAMPLED}
  programs = {}
  for size in sizes:
    fixed, baked = baking.bake(model, params, image_hw=image_hw, **size_args(size))
    flat = trees.flatten(baked)
    resampled = {n: np.asarray(flat[n]) for n in baking.RESAMPLED if n in flat}
    programs[name_of(size)] = (_forward(fixed), resampled)
  with folders.new(out) as part:
    frameworks.save_tensorflow(part, shared, programs, shape)
    described = record | {
      "format": FORMAT,
      "sizes": [size_text(size) for size in sizes],
      "image_size": list(image_hw),
      "image_shape": list(shape),
    }
    (part / folders.EXPORT_RECORD).write_text(
      json.dumps(described, indent=1, allow_nan=False) + "\n"
    )


def load(folder: pathlib.Path) -> artifact.Artifact:
  """Reads one back, to run in TensorFlow; as `artifact.load_artifact` for the other kind.

  Raises:
    UserError: no SavedModel of ours, a file that is missing or damaged, TensorFlow that is not there.
  """
  record = folders.read_export(folder, FORMAT)
  names = {size: name_of(size) for size in record["sizes"]}
  programs = frameworks.tensorflow_programs(folder, tuple(names.values()))
  return artifact.Artifact(record, {size: programs[name] for size, name in names.items()})


def name_of(size: SeqHw) -> str:
  """Returns the name of a size's signature: "seqhw_08", "seqhw_04x06"."""
  return "seqhw_" + "x".join(f"{n:02d}" for n in (size if isinstance(size, tuple) else (size,)))


def _forward(model: FlexiViT) -> Callable[[Params, jax.Array], jax.Array]:
  """The forward pass at the model's own patch size, of arrays by name."""
  return lambda flat, image: model.apply({"params": trees.unflatten(flat)}, image)[0]
