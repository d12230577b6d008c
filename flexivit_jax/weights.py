"""Weights in: one function for the files that hold them."""

import math
import os
import pathlib
import zipfile
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from flexivit_jax import checkpoint, errors, trees
from flexivit_jax.models import MODELS, FlexiViT, vit


def load(path: str | os.PathLike[str], **fields: Any) -> tuple[FlexiViT, dict]:
  """Returns (model, params) of a big_vision `.npz`, a run folder, or one of its checkpoints.

  The architecture of an .npz is read from the arrays. `fields` are those of `FlexiViT` that arrays cannot tell
  (`gelu`, `dtype`, `scan`, a rectangular `posemb_size`), or that are to differ.

  Raises:
    UserError: if the file is not one of these, or its arrays are not those of the model, all differences listed.
  """
  model, params, _ = load_with_record(path, **fields)
  return model, params


def load_with_record(
  path: str | os.PathLike[str], **fields: Any
) -> tuple[FlexiViT, dict, dict[str, Any]]:
  """As `load`, and the record that our own checkpoints carry (empty for others)."""
  file = pathlib.Path(path)
  if not file.exists():
    raise errors.UserError(f"{file} does not exist; expected an .npz file or a run folder.")
  if file.is_dir():
    params, record = checkpoint.load_params(file)
    known = {k: tuple(v) if isinstance(v, list) else v for k, v in record["model"].items()}
    known.pop("name")
  elif file.suffix == ".npz":
    params, record = read_npz(file), {}
    known = infer_fields(params, fields)
  else:
    raise errors.UserError(f"{file}: expected an .npz file or a run folder.")
  model = FlexiViT(**{**known, **fields})
  params = vit.stack_blocks(params) if model.scan else vit.unstack_blocks(params)
  check(model, params, str(file))
  return model, jax.tree.map(jnp.asarray, params), record


def read_npz(path: pathlib.Path) -> dict:
  """Returns the parameters in an .npz with names like "params/head/bias" (or without "params/") as float32 arrays.

  An optimizer's arrays ("opt/...") are left out; bfloat16, which npz stores as raw bytes, is widened.

  Raises:
    UserError: not an .npz, or an array of Python objects (which would have to be unpickled).
  """
  if not zipfile.is_zipfile(path):
    raise errors.UserError(
      f"{path} cannot be read as .npz: it is no zip archive, or only part of one."
    )
  try:
    with np.load(path, allow_pickle=False) as archive:
      arrays = {
        name: _as_float32(archive[name])
        for name in archive.files
        if not name.startswith(("opt/", "chrono"))
      }
  except (zipfile.BadZipFile, zlib.error, ValueError, OSError) as e:
    raise errors.UserError(f"{path} cannot be read as .npz: {e}") from e
  prefixed = {
    name.removeprefix("params/"): a for name, a in arrays.items() if name.startswith("params/")
  }
  return trees.unflatten(prefixed or arrays)


def infer_fields(params: dict, fields: dict[str, Any]) -> dict[str, Any]:
  """Returns the fields of the FlexiViT that parameters with big_vision's names belong to.

  Raises:
    UserError: if an array that tells the architecture is missing.
  """
  flat = trees.flatten(vit.unstack_blocks(params) if "Transformer" in params else params)
  block = "Transformer/encoderblock_0"
  query, dense = (
    f"{block}/MultiHeadDotProductAttention_0/query/kernel",
    f"{block}/MlpBlock_0/Dense_0/kernel",
  )
  missing = [name for name in ("embedding/kernel", query, dense) if name not in flat]
  if missing:
    hints = "".join(f"{name}.{errors.nearest(name, flat)} " for name in missing)
    raise errors.UserError(
      f"These are not the parameters of a FlexiViT or ViT in big_vision's names; missing {hints}"
    )
  *patch_size, _, width = flat["embedding/kernel"].shape
  blocks = {name.split("/")[1] for name in flat if name.startswith("Transformer/encoderblock_")}
  found = dict(
    patch_size=tuple(patch_size),
    width=width,
    depth=len(blocks),
    mlp_dim=flat[dense].shape[1],
    num_heads=flat[query].shape[1],
    pool_type="tok" if "cls" in flat else "map" if "MAPHead_0/probe" in flat else "gap",
    num_classes=flat["head/bias"].shape[0] if "head/bias" in flat else 0,
  )
  if "pos_embedding" not in flat:
    return found | {"posemb": "sincos2d"}
  cells = flat["pos_embedding"].shape[1]
  side = math.isqrt(cells)
  if side * side != cells and "posemb_size" not in fields:
    raise errors.UserError(
      f"The position grid has {cells} cells, which is no square; give posemb_size=(h, w)."
    )
  return found | {"posemb_size": (side, side)}


def check(model: FlexiViT, params: dict, what: str) -> None:
  """Raises a UserError that lists every array that is missing, extra, or of another shape or dtype."""
  image = jax.ShapeDtypeStruct(
    (1, *model.patch_size, params["embedding"]["kernel"].shape[2]), jnp.float32
  )
  expected = jax.eval_shape(model.init, jax.random.key(0), image)["params"]
  lines = trees.diff(expected, params)
  if lines:
    raise errors.UserError(f"{what} does not fit the model {MODEL_NAME}:\n  " + "\n  ".join(lines))


MODEL_NAME = next(name for name, model in MODELS.items() if model is FlexiViT)


def _as_float32(array: np.ndarray) -> np.ndarray:
  if array.dtype.kind == "V" and array.dtype.itemsize == 2:
    array = array.view(ml_dtypes.bfloat16)
  return array.astype(np.float32) if array.dtype != np.float32 else array
