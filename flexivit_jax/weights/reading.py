"""Weights in: `load` turns any file or folder that holds weights into a model and its parameters."""

import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flexivit_jax import errors, resize, trees
from flexivit_jax.models import FlexiViT, vit
from flexivit_jax.sizes import Size
from flexivit_jax.trees import Json, Params
from flexivit_jax.weights import formats, layouts, registry, torch_layout
from flexivit_jax.weights.layouts import Weights


def load(
  path: str | os.PathLike[str],
  *,
  mean: Sequence[float] | None = None,
  std: Sequence[float] | None = None,
  flexify: tuple[Size, Size] | None = None,
  ema: bool = False,
  **fields: Any,
) -> tuple[FlexiViT, Params]:
  """Returns (model, params) of a file with weights, a run folder, one of its checkpoints, or a published name.

  Files: `.npz`, `.safetensors`, and PyTorch's `.pth`, `.pt`, `.bin`, `.pth.tar` and `.ckpt`, in the names of
  big_vision, the original ViT, timm, OpenCLIP or torchvision: the architecture is read from the arrays. Folders: of
  timm, and of Hugging Face's `transformers` (ViT, DeiT, DINOv2, CLIP, SigLIP): it is read from config.json. What
  training tools put around weights is taken off, with a note (`wrappers.unwrap`).

  Args:
    path: the file or folder; or a name of `registry.PUBLISHED`, e.g. "FlexiViT-B i1k", or the https:// address of a
      file, which is then fetched once.
    mean, std: of the input (pixels in [0, 1]) with which a timm or transformers model was trained, both or none;
      folded into the patch embedding, so that the model takes pixels in [-1, 1] as all models here. Not given: what
      the folder says, or 0.5.
    flexify: (patch_size, posemb_size) of the buffers that a fixed model becomes a FlexiViT with, e.g.
      ((32, 32), (7, 7)): kernel PI-resized, position grid zoomed with its corners in place, as the reference does
      when it starts from an older checkpoint.
    ema: of a file that has the raw weights and their exponential moving average, take the average.
    **fields: those of `FlexiViT` that arrays cannot tell (`num_heads`, `gelu`, `dtype`, `scan`, a rectangular
      `posemb_size`), or that are to differ.

  Raises:
    UserError: if the file is not one of these, cannot be fetched, or its arrays are not those of the model, all
      differences listed.
  """
  options: Json = dict(mean=mean, std=std, flexify=flexify, ema=ema)
  model, params, _ = load_with_record(path, **options, **fields)
  return model, params


def load_with_record(
  path: str | os.PathLike[str],
  *,
  mean: Sequence[float] | None = None,
  std: Sequence[float] | None = None,
  flexify: tuple[Size, Size] | None = None,
  ema: bool = False,
  finite: bool = True,
  **fields: Any,
) -> tuple[FlexiViT, Params, Json]:
  """Does what `load` does, and returns a record of what the arrays do not tell; a run's also tells its data.

  Keys: "format" (of this file), "source" (file and format that the weights came from), "model" (all fields),
  "position", "image_size" (pixels, None where any will do), "native_patch_size", "native_grid",
  "notes"; "projection" (True) where the head is one to a space of texts, as CLIP's, and no classifier;
  "folded_input" (mean and std) where these were folded in; "input" (mean, std and "from", what says them) of
  timm's and transformers'; "pp" (how an image is prepared) and "class_names" where a file beside the weights, or a run,
  says them; of a file that was fetched "name" and "url".
  """
  file, published = registry.find(path)
  weights = formats.read(file, fields, ema=ema)
  if finite:
    check_finite(weights.params, str(path))
  if published is not None:
    weights = _published(weights, published, file)
  weights = _say_input(weights, mean, std)
  if mean is None and std is None and weights.normalisation:
    mean, std = weights.normalisation
  if mean is not None or std is not None:
    weights = _fold_input(weights, mean, std)
  if flexify is not None:
    weights = _flexify(weights, *flexify)
    # What the caller says of sizes is of the file.
    fields = {k: v for k, v in fields.items() if k not in ("patch_size", "posemb_size")}
  model = FlexiViT(**weights.fields | fields)
  layout = vit.stack_blocks if model.scan is True else vit.unstack_blocks
  params = layout(weights.params) if "Transformer" in weights.params else weights.params
  check(model, params, str(path))
  record = weights.record | {"model": layouts.json_fields(model, layouts.FIELDS)}
  return model, jax.tree.map(jnp.asarray, params), record


def load_into(
  path: str | os.PathLike[str],
  model: FlexiViT,
  *,
  new_head: bool = False,
  accept: Callable[[FlexiViT, Json], None] = lambda model, record: None,
  **options: Any,
) -> dict:
  """Returns the parameters of a file for a model of the same architecture, at the model's kernel and grid size.

  A kernel is then PI-resized and a grid zoomed with its corners in place, as with `flexify` in `load`.

  Args:
    path, options: as in `load`.
    model: says which size the buffers are to have, and whether blocks are stacked.
    new_head: leave the file's head away, if it has one, and return all but the head. A file of "tok" then fits a model
      of "tok+gap", and the reverse: they differ in the head alone.
    accept: is given the file's own model, if it is of this architecture, and its record; may raise a UserError.

  Raises:
    OtherModel: the file's model is of another shape, or computes something else, e.g. another GELU.
    UserError: see `load`.
  """
  source, params, record = load_with_record(path, scan=model.scan, **options)
  pools_alike = new_head and {source.pool_type, model.pool_type} <= _WITH_CLASS_TOKEN
  _check_same(path, source, model, [n for n in _SAME if not (n == "pool_type" and pools_alike)])
  if note := _resized_otherwise(path, source, model):
    record = record | {"notes": [*(record.get("notes") or []), note]}
  accept(source, record)
  if model.num_classes and not source.num_classes and not new_head:
    raise errors.UserError(
      f"{path} has no head, and the model has {model.num_classes} classes; give new_head=True (in a config"
      " init.new_head=True), by which the model's own head is a new one."
    )
  if not new_head:
    _check_same(path, source, model, ("num_classes",))
  sizes = model.patch_size, model.posemb_size
  if (source.patch_size, source.posemb_size) != sizes and model.posemb == "learn":
    source, params = load(path, scan=model.scan, flexify=sizes, **options)
  if new_head:
    params, model = {k: v for k, v in params.items() if k != "head"}, model.clone(num_classes=0)
  check(model, params, str(path))
  return params


def not_finite(params: Params) -> list[str]:
  """Returns the names of arrays that hold a number that is not finite."""
  flat = trees.flatten(params)
  return [
    name
    for name, a in flat.items()
    if a.dtype.kind in "fV" and not np.isfinite(np.asarray(a)).all()
  ]


def check_finite(params: Params, what: str) -> None:
  """Raises a UserError that names the arrays which hold NaN or infinity: nothing computed with them means anything."""
  if names := not_finite(params):
    shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    raise errors.UserError(
      f"{what} has numbers that are not finite in {len(names)} arrays: {shown}. Take an earlier checkpoint, or save the"
      " weights again."
    )


def native_side(path: str | os.PathLike[str]) -> int:
  """Returns the pixels per side of a model's own images; 240, as in the paper, where it takes any size.

  Raises:
    UserError: see `load`; images that are not square.
  """
  _, _, record = load_with_record(path)
  h, w, *_ = record.get("image_size") or record.get("image_shape") or (240, 240)
  if h != w:
    raise errors.UserError(
      f"{path} is for images of {h}x{w} pixels, which are not square; give res=, pixels a side."
    )
  return h


def _check_same(
  path: str | os.PathLike[str], source: FlexiViT, model: FlexiViT, names: Sequence[str]
) -> None:
  """Raises an OtherModel that lists the fields in which a file's model differs from the one that is to be filled."""
  lines = [
    f"{name}: {getattr(source, name)!r} in the file, {getattr(model, name)!r} in the model"
    for name in names
    if getattr(source, name) != getattr(model, name)
  ]
  if lines:
    raise OtherModel(f"{path} is of another model:\n  " + "\n  ".join(lines))


_RESIZED = ("kernel_resize", "kernel_operator", "grid_operator")


def _resized_otherwise(
  path: str | os.PathLike[str], source: FlexiViT, model: FlexiViT
) -> str | None:
  """Returns a note if the file's model resizes kernel or positions in another way than `model` does, else None."""
  differ = [n for n in _RESIZED if getattr(source, n) != getattr(model, n)]
  if not differ:
    return None
  theirs, ours = (", ".join(f"{n}={getattr(m, n)!r}" for n in differ) for m in (source, model))
  return (
    f"{path} resizes with {theirs}, this model with {ours}: at other patch sizes they give different outputs."
    " Fine-tuning makes up for that; for a frozen part put the file's values into the config."
  )


class OtherModel(errors.UserError):
  """A file holds another model than the one that is to be filled."""


_SAME = (
  "width", "depth", "mlp_dim", "num_heads", "pool_type", "posemb", "registers", "pre_norm", "gelu", "layer_norm_eps",
)  # fmt: skip
_WITH_CLASS_TOKEN = {"tok", "tok+gap"}


def check(model: FlexiViT, params: Params, what: str) -> None:
  """Raises a UserError that lists every array that is missing, extra, or of another shape or dtype."""
  kernel = params.get("embedding", {}).get("kernel")
  channels = kernel.shape[2] if kernel is not None and kernel.ndim == 4 else 3
  image = jax.ShapeDtypeStruct((1, *model.patch_size, channels), jnp.float32)
  expected = jax.eval_shape(model.init, jax.random.key(0), image)["params"]
  lines = trees.diff(expected, params, max_lines=10**6)
  if lines:
    raise errors.UserError(f"{what} does not fit the model flexivit:\n  " + "\n  ".join(lines))


def _published(weights: Weights, published: registry.Published, file: pathlib.Path) -> Weights:
  """Checks what a fetched file holds, and adds to the record where it came from."""
  registry.check(published, FlexiViT(**weights.fields), file)
  notes = [*weights.record.get("notes", []), *filter(None, [published.note])]
  name = weights.record.get("name") or published.name
  origin = {"name": name, "url": published.url, "notes": notes}
  return weights._replace(record=weights.record | origin)


def _fold_input(
  weights: Weights, mean: Sequence[float] | None, std: Sequence[float] | None
) -> Weights:
  if mean is None or std is None:
    raise errors.UserError("Give both mean and std of the input, or none.")
  if not weights.takes_normalisation:
    raise errors.UserError(
      "mean and std are for files in timm's names and folders of transformers; others take [-1, 1]."
    )
  if "folded_input" in weights.record:
    raise errors.UserError(
      f"mean and std are folded into this file already: {weights.record['folded_input']}."
    )
  flat = torch_layout.fold_input(trees.flatten(weights.params), mean, std)
  folded = {"folded_input": {"mean": list(mean), "std": list(std)}}
  return weights._replace(params=trees.unflatten(flat), record=weights.record | folded)


def _say_input(
  weights: Weights, mean: Sequence[float] | None, std: Sequence[float] | None
) -> Weights:
  """Puts the mean and std of the input into the record, and a note where they are only assumed."""
  record = weights.record
  if mean is not None and std is not None:
    input_ = layouts.input_record(mean, std, "given")
    return weights._replace(record=record | {"input": input_})
  if not weights.takes_normalisation or "input" in record or "folded_input" in record:
    return weights
  half = [0.5] * weights.params["embedding"]["kernel"].shape[2]
  file = record["source"]["file"]
  note = (
    f"Nothing beside {file} says the input's mean and std: 0.5 and 0.5 are assumed. If it was trained with others, read"
    f" {file} with --mean and --std (in Python mean=, std=; to train from it --config.init.mean=, --config.init.std=)."
  )
  input_ = layouts.input_record(half, half, "assumed")
  return weights._replace(record=record | {"input": input_, "notes": [*record["notes"], note]})


def _flexify(weights: Weights, patch_size: Size, posemb_size: Size) -> Weights:
  """Makes a fixed model a FlexiViT: kernel PI-resized, position grid zoomed with its corners in place."""
  kernel = weights.params["embedding"]["kernel"]
  if "pos_embedding" not in weights.params:
    raise errors.UserError("flexify: the model has no learned positions to resize.")
  if any(new < old for new, old in zip(patch_size, kernel.shape[:2], strict=True)):
    raise errors.UserError(
      f"flexify: a buffer of {patch_size} would lose detail of the kernel of {kernel.shape[:2]};"
      " give one that is not smaller."
    )
  fields = weights.fields | {"patch_size": tuple(patch_size), "posemb_size": tuple(posemb_size)}
  old = weights.fields["posemb_size"]
  grid = np.asarray(weights.params["pos_embedding"]).reshape(*old, -1)
  zoomed = resize.zoom_grid(grid, posemb_size).reshape(1, -1, grid.shape[-1])
  embedding = weights.params["embedding"] | {"kernel": resize.pi_resize(kernel, patch_size)}
  params = weights.params | {"embedding": embedding, "pos_embedding": zoomed}
  operators = {"kernel_operator": "linear", "grid_operator": "linear_antialias"}
  was = {"patch_size": list(kernel.shape[:2]), "grid": list(old)}
  record = weights.record | {"flexified_from": was}
  return weights._replace(params=params, fields=fields | operators, record=record)
