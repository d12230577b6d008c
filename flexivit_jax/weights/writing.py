"""Weights out."""

import os
import pathlib
from typing import Any

import numpy as np

from flexivit_jax import errors, trees
from flexivit_jax.files import replacing
from flexivit_jax.models import FlexiViT, vit
from flexivit_jax.weights import files


def save_npz(
  path: str | os.PathLike[str], model: FlexiViT, params: dict, record: dict[str, Any]
) -> None:
  """Writes an .npz in big_vision's names ("params/..."), which `load` and big_vision's own loader read.

  The record, with the fields of the model, goes in as one more entry that big_vision does not look at. The file
  appears under its name only when it is complete.

  Raises:
    UserError: another suffix, or a file that is there already.
  """
  path = pathlib.Path(path)
  if path.suffix != ".npz":
    raise errors.UserError(f"{path}: only .npz can be written; give a name that ends so.")
  if path.exists():
    raise errors.UserError(f"{path} is there already; remove it or give another name.")
  flat = trees.flatten(vit.unstack_blocks(params))
  arrays = {f"params/{name}": np.asarray(array) for name, array in flat.items()}
  record = record | {"model": record["model"] | {"scan": False}}
  path.parent.mkdir(parents=True, exist_ok=True)
  arrays[files.RECORD] = files.encode(record | {"sealed": True})
  with replacing(path) as part:
    with part.open("wb") as file:
      np.savez(file, allow_pickle=False, **arrays)
    files.seal(part)
