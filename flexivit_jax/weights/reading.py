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
from flexivit_jax.weights import (
  big_vision,
  files,
  registry,
  timm_names,
  transformers_config,
  transformers_folder,
  transformers_names,
)
from flexivit_jax.weights.transformers_folder import Normalisation

Size = tuple[int, int]


class Source(NamedTuple):
  """What a file holds: parameters (a tree of NumPy arrays), the fields of their FlexiViT, and the record.

  `normalisation` is that of the input, where something beside the arrays says it; it is not yet folded in.
  """

  params: dict
  fields: dict[str, Any]
  record: dict[str, Any]
  normalisation: Normalisation | None = None


def load(
  path: str | os.PathLike[str],
  *,
  mean: Sequence[float] | None = None,
  std: Sequence[float] | None = None,
  flexify: tuple[Size, Size] | None = None,
  **fields: Any,
) -> tuple[FlexiViT, dict]:
  """Returns (model, params) of a file with weights, a run folder, one of its checkpoints, or a transformers folder.

  Files: `.npz` in big_vision's, the original ViT's or timm's names, `.safetensors` in timm's. The architecture is
  read from the arrays. Folders of Hugging Face's `transformers`: config.json and model.safetensors or its shards,
  of ViT, DeiT, DINOv2, CLIP and SigLIP; the architecture is read from config.json.

  Args:
    path: the file or folder; or a name of `registry.PUBLISHED`, e.g. "FlexiViT-B i1k", or the https:// address of a
      file, which is then fetched once.
    mean, std: of the input (pixels in [0, 1]) with which a timm or transformers model was trained, both or none;
      folded into the patch embedding, so that the model takes pixels in [-1, 1] as all models here. Not given: what
      preprocessor_config.json says, or 0.5.
    flexify: (patch_size, posemb_size) of the buffers that a fixed model becomes a FlexiViT with, e.g.
      ((32, 32), (7, 7)): kernel PI-resized, position grid zoomed with its corners in place, as the reference does
      when it starts from an older checkpoint.
    **fields: those of `FlexiViT` that arrays cannot tell (`num_heads`, `gelu`, `dtype`, `scan`, a rectangular
      `posemb_size`), or that are to differ.

  Raises:
    UserError: if the file is not one of these, cannot be fetched, or its arrays are not those of the model, all
      differences listed.
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
  "notes"; "folded_input" (mean and std) where these were folded in; of a file that was fetched "name" and "url".
  """
  file, published = registry.find(path)
  source = read(file, fields)
  if published is not None:
    source = _published(source, published, file)
  if mean is None and std is None and source.normalisation is not None:
    mean, std = source.normalisation
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


def load_into(path: str | os.PathLike[str], model: FlexiViT, **given: Any) -> dict:
  """Parameters of a file for a model of the same architecture, whose kernel and grid may be of another size.

  A kernel is then PI-resized and a grid zoomed with its corners in place, as with `flexify` in `load`.

  Args:
    path, given: as in `load`.
    model: says which size the buffers are to have, and whether blocks are stacked.

  Raises:
    UserError: see `load`; or the file's model computes something else, e.g. another GELU.
  """
  found, params = load(path, scan=model.scan, **given)
  sizes = model.patch_size, model.posemb_size
  if (found.patch_size, found.posemb_size) != sizes and model.posemb == "learn":
    found, params = load(path, scan=model.scan, flexify=sizes, **given)
  lines = [
    f"{name}: {getattr(found, name)!r} in the file, {getattr(model, name)!r} in the model"
    for name in _SAME_FUNCTION
    if getattr(found, name) != getattr(model, name)
  ]
  if lines:
    raise errors.UserError(f"{path} is of another model:\n  " + "\n  ".join(lines))
  check(model, params, str(path))
  return params


# What the shapes of the arrays do not tell apart.
_SAME_FUNCTION = ("gelu", "layer_norm_eps", "num_heads", "pool_type", "posemb", "registers")


def read(path: pathlib.Path, fields: Mapping[str, Any]) -> Source:
  """Reads a file or folder in any format; nothing is checked against a model yet.

  Raises:
    UserError: it is not there, or in no known format.
  """
  known = "expected an .npz file or a run folder, or .safetensors, or a folder of transformers"
  if not path.exists():
    raise errors.UserError(
      f"{path} does not exist; {known}, or a name that `flexivit inspect --list` prints."
      + errors.nearest(str(path), registry.PUBLISHED)
    )
  if path.is_dir() and transformers_folder.is_folder(path):
    return _transformers(path, fields)
  if path.is_dir():
    params, record = checkpoint.load_params(path)
    format_ = "checkpoint of a run"
  elif path.suffix in files.READERS:
    arrays, record = files.READERS[path.suffix](path)
    if not record:
      return _recognise(path, arrays, fields)
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


def _published(source: Source, published: registry.Published, file: pathlib.Path) -> Source:
  """Checks what a file that was fetched holds, and adds to the record where it came from."""
  registry.check(published, FlexiViT(**source.fields), file)
  notes = [*source.record.get("notes", []), *filter(None, [published.note])]
  name = source.record.get("name") or published.name
  origin = {"name": name, "url": published.url, "notes": notes}
  return source._replace(record=source.record | origin)


def _recognise(path: pathlib.Path, arrays: files.Arrays, fields: Mapping[str, Any]) -> Source:
  """Tells by their names whose arrays these are."""
  kind, fixed, notes = path.suffix[1:], True, list[str]()
  if timm_names.is_timm(arrays):
    flat, found, notes = timm_names.convert(arrays, fields)
    params, format_ = trees.unflatten(flat), f"{kind} in timm's names"
  elif big_vision.ORIGINAL_POSITION in arrays:
    params = trees.unflatten(big_vision.from_original(arrays, fields.get("posemb_size")))
    found, format_ = big_vision.infer_fields(params, fields), f"{kind} in the original ViT's names"
  elif path.suffix == ".safetensors" and transformers_folder.is_folder(path.parent):
    raise errors.UserError(
      f"{path} is one file of a folder of transformers, whose config.json says what model it is;"
      f" give the folder, {path.parent}."
    )
  else:
    params, fixed = _plain(arrays), False
    found, format_ = big_vision.infer_fields(params, fields), f"{kind} in big_vision's names"
  record = _describe(path, format_, FlexiViT(**{**found, **fields})) | {"notes": notes}
  if fixed:
    sides = zip(record["native_patch_size"], record["native_grid"], strict=True)
    record["image_size"] = [patch * cells for patch, cells in sides]
  return Source(params, found, record)


def _transformers(path: pathlib.Path, fields: Mapping[str, Any]) -> Source:
  """A folder of Hugging Face's transformers."""
  config = transformers_folder.read_config(path)
  spec = transformers_config.spec(config)  # before the arrays: those of another model may be large
  normalisation = transformers_folder.read_normalisation(path)
  flat, found, notes = transformers_names.convert(spec, transformers_folder.read_arrays(path))
  model = FlexiViT(**{**found, **fields})
  record = _describe(path.resolve(), f"transformers folder, {config['model_type']}", model)
  if normalisation is None:
    notes.append(
      "No preprocessor_config.json says the input's mean and std; unless they are given (mean, std"
      " or --mean, --std), pixels are taken to be in [-1, 1]."
    )
  sides = zip(record["native_patch_size"], record["native_grid"], strict=True)
  record |= {"notes": notes, "image_size": [patch * cells for patch, cells in sides]}
  if names := transformers_config.class_names(config, model.num_classes):
    record["class_names"] = names
  return Source(trees.unflatten(flat), found, record, normalisation)


def _plain(arrays: files.Arrays) -> dict:
  """Tree of arrays named "params/head/bias" or "head/bias"."""
  prefixed = {n.removeprefix("params/"): a for n, a in arrays.items() if n.startswith("params/")}
  return trees.unflatten(prefixed or arrays)


def _describe(path: pathlib.Path, format_: str, model: FlexiViT) -> dict[str, Any]:
  position = {"learn": "grid; the class token has none", "sincos2d": "sine-cosine"}[model.posemb]
  return {
    "format": format_,
    "source": {"file": path.name, "format": format_},
    "position": position,
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
    kind = tuple if name == "kernel_moment" else type(getattr(FlexiViT(), name))
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
  if not any(project in source.record["source"]["format"] for project in ("timm", "transformers")):
    raise errors.UserError(
      "mean and std are for files in timm's names and folders of transformers; others take [-1, 1]."
    )
  if "folded_input" in source.record:
    raise errors.UserError(
      f"mean and std are folded into this file already: {source.record['folded_input']}."
    )
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
  record = source.record | {"flexified_from": was}
  return source._replace(params=params, fields=fields | operators, record=record)
