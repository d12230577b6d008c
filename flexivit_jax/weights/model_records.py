"""What a record says of its model: the name in `MODELS`, and the fields from which it is built again."""

import dataclasses
import pathlib
from collections.abc import Iterable
from typing import Any, cast

from flexivit_jax import errors
from flexivit_jax.models import MODELS, UNNAMED, FlexiViT, Model, text as text_model, vit_part
from flexivit_jax.trees import Json
from flexivit_jax.weights import layouts

TWO_TOWERS = "two_towers"
IMAGE_ALONE = "The image tower of two towers; the text tower is left out."
# Fields of the class of a part, and what has those of no other: "parts" of a model are of these classes.
_FIELDS = {"FlexiViT": layouts.FIELDS, "TextTower": text_model.FIELDS}


def name_of(record: Json) -> str:
  """Returns the name of a record's model; "flexivit" where it has none.

  Raises:
    UserError: a name that no model has.
  """
  model = record.get("model")
  name = model.get("name", "flexivit") if isinstance(model, dict) else "flexivit"
  if name not in MODELS:
    raise errors.unknown("model of a record", str(name), MODELS)
  return name


def is_two_towers(record: Json) -> bool:
  """Tells whether a record is of a model of two towers."""
  return name_of(record) == TWO_TOWERS


def parts_of(name: str) -> dict[str, str]:
  """Returns the class of each part of a model by the name of its parameters; {} of a model without parts."""
  return getattr(MODELS[name], "PARTS", {})


def left_out(name: str) -> str:
  """Returns the note on weights of which only the FlexiViT is read."""
  return (
    IMAGE_ALONE if name == TWO_TOWERS else f"The {vit_part(MODELS[name])} of {named(name)} alone."
  )


def named(name: str) -> str:
  """Returns what a model is called in a sentence: "two towers", "a segmenter", "an owl_vit"."""
  article = "an" if name[0] in "aeiou" else "a"
  return "two towers" if name == TWO_TOWERS else f"{article} {name}"


def of_record(path: pathlib.Path, record: Json) -> Any:
  """Returns the model of parts (`Model`, with `parts`) in a record; one that lies in a file may hold anything.

  Raises:
    UserError: an unknown field, or a value that no model can have.
  """
  name = name_of(record)
  made, parts = MODELS[name], parts_of(name)
  optional = {f.name for f in _fields(made) if f.default is None}  # such as a detector's text tower
  values = {k: tuple(v) if isinstance(v, list) else v for k, v in record["model"].items()}
  values.pop("name", None)
  _check_names(path, values, {f.name for f in _fields(made)} | {*UNNAMED} - {"parent", "name"})
  for part, kind in parts.items():
    if values.get(part) is None and part in optional:
      continue
    if not isinstance(values.get(part), dict):
      raise errors.UserError(f"{path}: its record does not say what {part} it is of.")
    if kind == "FlexiViT":
      values[part] = layouts.fields_of_record(path, {"model": values[part]})
    else:
      _check_names(path, values[part], _FIELDS[kind])
  try:
    return made(**values)
  except TypeError as e:
    raise errors.UserError(f"{path}: its record is of no {name}: {e}") from e


def _check_names(path: pathlib.Path, values: Iterable[str], known: Iterable[str]) -> None:
  for name in values:
    if name not in known:
      raise errors.unknown(f"field of the record in {path}:", name, known)


def record_of(model: Model) -> Json:
  """Returns the fields of a model of parts, JSON-able, from which it can be built again."""
  name = next(name for name, made in MODELS.items() if isinstance(model, cast(type, made)))
  parts: Any = getattr(model, "parts", {})
  # The parts take the dtype of the whole.
  values = {
    part: layouts.json_fields(module, {*_FIELDS[parts_of(name)[part]]} - {"dtype"})
    for part, module in parts.items()
  }
  others = [f.name for f in _fields(type(model)) if f.name not in values]
  return {"name": name, **values, **layouts.json_fields(model, others)}


def fields_of(vit: FlexiViT) -> Json:
  """Returns all fields of the FlexiViT of a model but the dtype, which is that of the whole."""
  return {name: getattr(vit, name) for name in layouts.FIELDS if name != "dtype"}


def _fields(made: Any) -> list[dataclasses.Field]:
  return [f for f in dataclasses.fields(made) if f.name not in UNNAMED]
