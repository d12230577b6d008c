"""Names of classes as files beside weights have them."""

import math

from flexivit_jax.trees import Json


def in_order(where: str, names: object, classes: int) -> tuple[list[str] | None, list[str]]:
  """Returns the names in the order of the logits, or None and a note that says why there are none.

  Args:
    where: e.g. "label_names of vit/config.json".
    names: a list of names, or names by number; nothing (None, empty) says nothing.
    classes: how many the model has.
  """
  if not names or not classes:
    return None, []
  if isinstance(names, dict):
    names = _listed(names)
  if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
    return None, [f"{where} is not used: expected a name for each number from 0 to {classes - 1}."]
  if len(names) != classes:
    return None, [
      f"{where} is not used: it has {len(names)} names, and the model {classes} classes."
    ]
  return names, []


def is_number(value: object) -> bool:
  """Tells whether a value of a JSON file is a finite number; true and false are none."""
  return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _listed(names: Json) -> list[object] | None:
  """Names by number as a list, None where numbers are missing."""
  numbers = [str(i) for i in range(len(names))]
  return [names[n] for n in numbers] if set(numbers) == names.keys() else None
