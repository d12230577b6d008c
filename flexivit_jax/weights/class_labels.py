"""Names of classes as files beside weights have them."""

import math

from flexivit_jax.trees import Json


def in_order(where: str, given: object, classes: int) -> tuple[list[str] | None, list[str]]:
  """Returns the names in the order of the logits, or None and a note that says why there are none.

  Args:
    where: e.g. "label_names of vit/config.json".
    given: a list of names, or names by number; nothing (None, empty) says nothing.
    classes: how many the model has.
  """
  if not given or not classes:
    return None, []
  if isinstance(given, dict):
    given = _listed(given)
  if not isinstance(given, list) or not all(isinstance(name, str) for name in given):
    return None, [f"{where} is not used: expected a name for each number from 0 to {classes - 1}."]
  if len(given) != classes:
    return None, [
      f"{where} is not used: it has {len(given)} names, and the model {classes} classes."
    ]
  return given, []


def is_number(value: object) -> bool:
  """Whether a value of a JSON file is a finite number; true and false are none."""
  return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _listed(given: Json) -> list[object] | None:
  """Names by number as a list, None where numbers are missing."""
  numbers = [str(i) for i in range(len(given))]
  return [given[n] for n in numbers] if set(numbers) == given.keys() else None
