"""What a record says of a model of two towers."""

import pathlib
from collections.abc import Iterable

from flexivit_jax import errors
from flexivit_jax.models import TwoTowers, text as text_model
from flexivit_jax.trees import Json
from flexivit_jax.weights import layouts

NAME = "two_towers"  # in a record's "model", and in a config
IMAGE_ALONE = "The image tower of two towers; the text tower is left out."


def is_two_towers(record: Json) -> bool:
  """Tells whether a record is of a model of two towers."""
  model = record.get("model")
  return isinstance(model, dict) and model.get("name") == NAME


def of_record(path: pathlib.Path, record: Json) -> TwoTowers:
  """Returns the model of two towers in a record; one that lies in a file may hold anything.

  Raises:
    UserError: an unknown field, or a value that no model can have.
  """
  values = {k: v for k, v in record["model"].items() if k != "name"}
  _check_names(path, values, TwoTowers.__dataclass_fields__.keys() - {"parent", "name"})
  parts = [values.get(part) for part in TwoTowers.PARTS]
  if not all(isinstance(part, dict) for part in parts):
    raise errors.UserError(f"{path}: its record does not say what image and text tower it is of.")
  image = layouts.fields_of_record(path, {"model": parts[0]})
  _check_names(path, parts[1], text_model.FIELDS)
  try:
    return TwoTowers(**values | {"image": image})
  except TypeError as e:
    raise errors.UserError(f"{path}: its record is of no model of two towers: {e}") from e


def _check_names(path: pathlib.Path, values: Iterable[str], known: Iterable[str]) -> None:
  for name in values:
    if name not in known:
      raise errors.unknown(f"field of the record in {path}:", name, known)


def record_of(model: TwoTowers) -> Json:
  """Returns the fields of a model of two towers, JSON-able, from which it can be built again."""
  fields = {"image": layouts.FIELDS, "text": text_model.FIELDS}
  return {
    "name": NAME,
    # The towers take the dtype of the whole.
    **{k: layouts.json_fields(model.parts[k], set(fields[k]) - {"dtype"}) for k in fields},
    "temperature": model.temperature,
    "bias": model.bias,
    "dtype": model.dtype,
  }
