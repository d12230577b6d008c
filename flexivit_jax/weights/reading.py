"""Weights in: one function for the files that hold them."""

import dataclasses
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flexivit_jax import checkpoint, errors, resize, trees
from flexivit_jax.models import FlexiViT, vit
from flexivit_jax.weights import big_vision, files, foreign, timm_folder, timm_names

Size = tuple[int, int]
POSITIONS = {"learn": "grid; the class token has none", "sincos2d": "sine-cosine"}
READERS = files.READERS | dict.fromkeys((".pth", ".pt", ".bin"), foreign.read_torch)


class Source(NamedTuple):
  """What a file holds: parameters (a tree of NumPy arrays), the fields of their FlexiViT, and the record."""

  params: dict
  fields: dict[str, Any]
  record: dict[str, Any]
  normalised: timm_folder.Normalised | None = (
    None  # (mean, std) of the input, where the source says it
  )


def load(
  path: str | os.PathLike[str],
  *,
  mean: Sequence[float] | None = None,
  std: Sequence[float] | None = None,
  flexify: tuple[Size, Size] | None = None,
  **fields: Any,
) -> tuple[FlexiViT, dict]:
  """Returns (model, params) of a file with weights, a run folder, or one of its checkpoints.

  Files: `.npz` in big_vision's, the original ViT's or timm's names, `.safetensors` and PyTorch's `.pth`, `.pt` and
  `.bin` in timm's; a folder as timm writes it. The architecture is read from the arrays.

  Args:
    path: the file or folder.
    mean, std: of the input (pixels in [0, 1]) with which a timm model was trained, both or none; folded into the
      patch embedding, so that the model takes pixels in [-1, 1] as all models here. Not given: what the folder says,
      or 0.5.
    flexify: (patch_size, posemb_size) of the buffers that a fixed model becomes a FlexiViT with, e.g.
      ((32, 32), (7, 7)): kernel PI-resized, position grid zoomed with its corners in place, as the reference does
      when it starts from an older checkpoint.
    **fields: those of `FlexiViT` that arrays cannot tell (`num_heads`, `gelu`, `dtype`, `scan`, a rectangular
      `posemb_size`), or that are to differ.

  Raises:
    UserError: if the file is not one of these, or its arrays are not those of the model, all differences listed.
  """
  model, params, _ = load_with_record(path, mean=mean, std=std, flexify=flexify, **fields)
  return model, params


def load_with_record(
  path: str | os.PathLike[str],
  *,
  mean: Sequence[float] | None = None,
  std: Sequence[float] | None = None,
  flexify: tuple[Size, Size] | None = None,
  **fields: Any,
) -> tuple[FlexiViT, dict, dict[str, Any]]:
  """As `load`, and a JSON-able record of what the arrays do not say; a run's also says what it was trained on.

  Keys: "format" (of this file), "source" (file and format that the weights came from), "model" (all fields),
  "position", "image_size" (pixels, None where any will do), "native_patch_size", "native_grid",
  "notes".
  """
  source = read(pathlib.Path(path), fields)
  if mean is None and std is None and source.normalised:
    mean, std = source.normalised
  if mean is not None or std is not None:
    source = _fold_input(source, mean, std)
  if flexify is not None:
    source = _flexify(source, *flexify)
  model = FlexiViT(**{**source.fields, **fields})
  layout = vit.stack_blocks if model.scan else vit.unstack_blocks
  params = layout(source.params) if "Transformer" in source.params else source.params
  check(model, params, str(path))
  record = source.record | {"model": _fields_of(model)}
  return model, jax.tree.map(jnp.asarray, params), record


def read(path: pathlib.Path, fields: Mapping[str, Any]) -> Source:
  """Reads a file or folder in any format; nothing is checked against a model yet.

  Raises:
    UserError: it is not there, or in no known format.
  """
  known = (
    "expected an .npz file or a run folder, .safetensors, .pth, or a folder with timm's config.json"
  )
  if not path.exists():
    raise errors.UserError(f"{path} does not exist; {known}.")
  if path.is_dir() and (config := timm_folder.find(path)):
    return _read_timm_folder(path, config, fields)
  if path.is_dir():
    params, record = checkpoint.load_params(path)
    format_ = "checkpoint of a run"
  elif path.suffix in READERS:
    arrays, record = READERS[path.suffix](path)
    if not record.keys() - {"notes"}:
      return _recognise(path, arrays, fields, record.get("notes", []))
    params, format_ = _plain(arrays), "npz in big_vision's names, written by flexivit"
  else:
    raise errors.UserError(f"{path}: {known}.")
  found = _known_fields(path, record)
  return Source(
    params, found, _describe(path, format_, FlexiViT(**found)) | record | {"format": format_}
  )


def check(model: FlexiViT, params: dict, what: str) -> None:
  """Raises a UserError that lists every array that is missing, extra, or of another shape or dtype."""
  kernel = params.get("embedding", {}).get("kernel")
  channels = kernel.shape[2] if kernel is not None and kernel.ndim == 4 else 3
  image = jax.ShapeDtypeStruct((1, *model.patch_size, channels), jnp.float32)
  expected = jax.eval_shape(model.init, jax.random.key(0), image)["params"]
  lines = trees.diff(expected, params, max_lines=10**6)
  if lines:
    raise errors.UserError(f"{what} does not fit the model flexivit:\n  " + "\n  ".join(lines))


def _recognise(
  path: pathlib.Path, arrays: files.Arrays, fields: Mapping[str, Any], notes: Sequence[str] = ()
) -> Source:
  """Tells by their names whose arrays these are."""
  kind, fixed, notes = path.suffix[1:], True, list(notes)
  if timm_names.is_timm(arrays):
    flat, found, more = timm_names.convert(arrays, fields)
    notes += more
    params, format_ = trees.unflatten(flat), f"{kind} in timm's names"
  elif big_vision.ORIGINAL_POSITION in arrays:
    params = trees.unflatten(big_vision.from_original(arrays, fields.get("posemb_size")))
    found, format_ = big_vision.infer_fields(params, fields), f"{kind} in the original ViT's names"
  else:
    params, fixed = _plain(arrays), False
    found, format_ = big_vision.infer_fields(params, fields), f"{kind} in big_vision's names"
  record = _describe(path, format_, FlexiViT(**{**found, **fields})) | {"notes": notes}
  if fixed:
    sides = zip(record["native_patch_size"], record["native_grid"], strict=True)
    record["image_size"] = [patch * cells for patch, cells in sides]
  return Source(params, found, record)


def _read_timm_folder(
  folder: pathlib.Path, config: Mapping[str, Any], fields: Mapping[str, Any]
) -> Source:
  """The weights with what the config says, and the rest of the fields where `save_timm` wrote them down."""
  path = timm_folder.weights_file(folder)
  arrays, inside = READERS[path.suffix](path)
  told = timm_folder.told(folder, config, arrays)
  source = _recognise(path, arrays, {**told.fields, **fields}, inside.get("notes", []))
  format_ = f"folder with {source.record['format']}"
  record = source.record | {"format": format_, "source": {"file": folder.name, "format": format_}}
  own, notes = timm_folder.own_record(folder, path)
  if own:
    found = _known_fields(folder, own) | told.fields
    return Source(source.params, found, record | {"notes": []} | own | {"format": format_})
  record["notes"] += notes
  return Source(source.params, source.fields | told.fields, record, told.normalised)


def _plain(arrays: files.Arrays) -> dict:
  """Tree of arrays named "params/head/bias" or "head/bias"."""
  prefixed = {n.removeprefix("params/"): a for n, a in arrays.items() if n.startswith("params/")}
  return trees.unflatten(prefixed or arrays)


def _describe(path: pathlib.Path, format_: str, model: FlexiViT) -> dict[str, Any]:
  return {
    "format": format_,
    "source": {"file": path.name, "format": format_},
    "position": POSITIONS[model.posemb],
    "image_size": None,
    "native_patch_size": list(model.patch_size),
    "native_grid": list(model.posemb_size),
    "notes": [],
  }


def _known_fields(path: pathlib.Path, record: dict[str, Any]) -> dict[str, Any]:
  """Fields of the model in a record; one from a file may hold anything."""
  given = record.get("model")
  if not isinstance(given, dict):
    raise errors.UserError(f"{path}: its record does not say what model it is of.")
  given = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items() if k != "name"}
  for name, value in given.items():
    if name not in _FIELDS:
      raise errors.unknown(f"field of the record in {path}:", name, _FIELDS)
    kind = type(getattr(FlexiViT(), name))
    if value is not None and not isinstance(value, (int, float) if kind is float else kind):
      raise errors.UserError(f"{path}: its record has {name}={value!r}; expected {kind.__name__}.")
  return given


_FIELDS = [f.name for f in dataclasses.fields(FlexiViT) if f.name not in ("parent", "name")]


def _fields_of(model: FlexiViT) -> dict[str, Any]:
  values = {name: getattr(model, name) for name in _FIELDS}
  return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


def _fold_input(source: Source, mean: Any, std: Any) -> Source:
  if mean is None or std is None:
    raise errors.UserError("Give both mean and std of the input, or none.")
  if "timm" not in source.record["source"]["format"]:
    raise errors.UserError("mean and std are for files in timm's names; others take [-1, 1].")
  flat = timm_names.fold_input(trees.flatten(source.params), mean, std)
  folded = {"folded_input": {"mean": list(mean), "std": list(std)}}
  return source._replace(params=trees.unflatten(flat), record=source.record | folded)


def _flexify(source: Source, patch_size: Size, posemb_size: Size) -> Source:
  kernel = source.params["embedding"]["kernel"]
  if "pos_embedding" not in source.params:
    raise errors.UserError("flexify: the model has no learned positions to resize.")
  if any(new < old for new, old in zip(patch_size, kernel.shape[:2], strict=True)):
    raise errors.UserError(
      f"flexify: a buffer of {patch_size} would lose detail of the kernel of {kernel.shape[:2]};"
      " give one that is not smaller."
    )
  fields = source.fields | {"patch_size": tuple(patch_size), "posemb_size": tuple(posemb_size)}
  old = source.fields["posemb_size"]
  grid = np.asarray(source.params["pos_embedding"]).reshape(*old, -1)
  zoomed = resize.zoom_grid(grid, posemb_size).reshape(1, -1, grid.shape[-1])
  embedding = source.params["embedding"] | {"kernel": resize.pi_resize(kernel, patch_size)}
  params = source.params | {"embedding": embedding, "pos_embedding": zoomed}
  operators = {"kernel_operator": "linear", "grid_operator": "linear_antialias"}
  was = {"patch_size": list(kernel.shape[:2]), "grid": list(old)}
  return Source(params, fields | operators, source.record | {"flexified_from": was})
