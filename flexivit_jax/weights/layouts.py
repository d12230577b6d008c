"""Arrays in any names as the weights of a FlexiViT: whose names they are, and the record of what arrays do not tell."""

import dataclasses
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from flexivit_jax import errors, trees
from flexivit_jax.models import UNNAMED, FlexiViT, attention
from flexivit_jax.trees import Arrays, Json, Params
from flexivit_jax.weights import bare, big_vision, other_models, segmenter
from flexivit_jax.weights.big_vision import Converted, Fields
from flexivit_jax.weights.timm import names as timm_names

POSITIONS = {"learn": "grid; the class token has none", "sincos2d": "sine-cosine"}
FIELDS = [f.name for f in dataclasses.fields(FlexiViT) if f.name not in UNNAMED]


class Weights(NamedTuple):
  """What a file or folder holds.

  Attributes:
    params: a tree of NumPy arrays by big_vision's names.
    fields: those of the FlexiViT that the arrays and the files beside them tell.
    record: see `reading.load_with_record`.
    normalisation: (mean, std) of the input, where a file beside the arrays states it; it is not folded in yet.
    takes_normalisation: the caller may give mean and std: the model was trained on pixels normalised with its own.
  """

  params: Params
  fields: Fields
  record: Json
  normalisation: tuple[Sequence[float], Sequence[float]] | None = None
  takes_normalisation: bool = False


class Layout(NamedTuple):
  """Whose names arrays have.

  `convert(arrays, fields)` gives big_vision's names and the fields of the FlexiViT. `one_size`: the model was trained
  on images of one size. `takes_normalisation`: see `Weights`.
  """

  name: str
  recognises: Callable[[Arrays], bool]
  convert: Callable[[Arrays, Fields], Converted]
  one_size: bool
  takes_normalisation: bool


LAYOUTS = (
  Layout("timm's names", timm_names.is_timm, timm_names.convert, True, True),
  Layout(
    "the original ViT's names",
    big_vision.is_original,
    big_vision.convert_original,
    True,
    False,
  ),
  Layout("big_vision's names", lambda arrays: True, big_vision.convert, False, False),
)


def of_arrays(path: pathlib.Path, content: bare.Content, fields: Fields) -> Weights:
  """Returns the arrays of a file as weights; the first layout that recognises their names converts them.

  Raises:
    UserError: a model that no FlexiViT can be, or arrays that do not fit each other.
  """
  arrays = content.arrays
  if reason := other_models.layout(arrays):
    raise errors.UserError(f"{path}: {reason}")
  if reason := other_models.feature(arrays):
    raise errors.UserError(other_models.refusal(f"The model in {path}", reason))
  layout = next(layout for layout in LAYOUTS if layout.recognises(arrays))
  variant = content.variant or segmenter.Variant({}, None, {}, [])
  fields = variant.fields | fields
  try:
    converted = layout.convert(arrays, fields)
  except errors.UserError as e:
    if not content.is_open_clip:
      raise
    problem = str(e).partition(" Did you mean")[0].rstrip(".")  # the nearest name would be timm's
    raise errors.UserError(
      f"{path}: OpenCLIP's image tower is incomplete, or no plain ViT, by its names in timm's form: {problem}. Give"
      " timm's folder of the model (vit_*_clip_*) or that of transformers (clip)."
    ) from e
  model = FlexiViT(**converted.fields | fields)
  record = describe(path, f"{path.suffix[1:]} in {layout.name}", model, one_size=layout.one_size)
  record["notes"] = [*content.notes, *converted.notes]
  record |= variant.record
  record |= {"projection": True} if content.is_open_clip and model.num_classes else {}
  params = trees.unflatten(converted.flat)
  return Weights(
    params,
    converted.fields | variant.fields,
    record,
    variant.normalisation,
    layout.takes_normalisation,
  )


def describe(path: pathlib.Path, format_: str, model: FlexiViT, *, one_size: bool = False) -> Json:
  """Returns the beginning of a record: see `reading.load_with_record`.

  Args:
    path: the file or folder.
    format_: what it is, for people.
    model: of the arrays.
    one_size: the model was trained on images of one size, that of its kernel and grid.
  """
  sides = zip(model.patch_size, model.posemb_size, strict=True)
  return {
    "format": format_,
    "source": {"file": path.name, "format": format_},
    "position": POSITIONS[model.posemb],
    "image_size": [patch * cells for patch, cells in sides] if one_size else None,
    "native_patch_size": list(model.patch_size),
    "native_grid": list(model.posemb_size),
    "notes": [],
  }


def json_fields(model: Any, names: Iterable[str]) -> Json:
  """Returns fields of a module as a record holds them."""
  values = {name: getattr(model, name) for name in names}
  return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


def input_record(mean: Sequence[float], std: Sequence[float], where: str) -> Json:
  """Returns what a record says of the input: with which mean and std, and what says so."""
  return {"mean": list(mean), "std": list(std), "from": where}


def has_input(record: Json) -> bool:
  """Tells whether a record of ours is of weights that were trained on pixels normalised with a mean and std."""
  return "input" in record or "folded_input" in record


def fields_of_record(path: pathlib.Path, record: Json) -> Fields:
  """Returns the fields of the model in a record; one that lies in a file may hold anything.

  A form of attention that is a kernel for the devices of that time is left to "auto": the numbers are the same.

  Raises:
    UserError: no fields, an unknown one, or a value of another type.
  """
  values = record.get("model")
  if not isinstance(values, dict):
    raise errors.UserError(f"{path}: its record does not say what model it is of.")
  values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if k != "name"}
  for name, value in values.items():
    if name not in FIELDS:
      raise errors.unknown(f"field of the record in {path}:", name, FIELDS)
    kind = tuple if name == "kernel_moment" else type(getattr(FlexiViT(), name))
    if value is not None and not isinstance(value, (int, float) if kind is float else kind):
      raise errors.UserError(f"{path}: its record has {name}={value!r}; expected {kind.__name__}.")
  form = values.get("attention") or ""
  if ":" in form or form in attention.KERNELS:
    del values["attention"]
  return values
