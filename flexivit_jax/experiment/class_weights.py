"""Class weights: the factors of the examples' losses, from `objective.class_weights`."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from flexivit_jax import data, errors
from flexivit_jax.data import class_names
from flexivit_jax.data.balanced import labels_of

_KEY = "class_weights"

# "balanced", a number for each class, or numbers by name or number of the class.
# Of the user, so of any type; `resolve` checks it.
Setting = Any


def resolve(setting: Setting, source: data.Source, num_classes: int) -> tuple[float, ...]:
  """Returns a weight for each class of the model.

  Args:
    setting: "balanced": n / (c * n_k) for class k with n_k of the n labels, where c classes have any; the mean over
      all labels is 1, and a class without images weighs 1. Or a number for each class. Or numbers by name or number
      of the class, and 1 for those that are not named.
    source: the training images.
    num_classes: of the model.

  Raises:
    UserError: a class that does not exist, another number of weights than classes, one that is negative or not finite.
  """
  if setting == "balanced":
    weights = balanced(source, num_classes)
  elif isinstance(setting, Mapping):
    weights = _by_name(setting, source, num_classes)
  else:
    weights = list(setting)
    if len(weights) != num_classes:
      raise errors.UserError(
        f"{_KEY} has {len(weights)} numbers, the model {num_classes} classes; expected one for each, or numbers by"
        " name, {'cat': 2.0}."
      )
  for k, weight in enumerate(weights):
    if not _is_number(weight) or not 0 <= weight < math.inf:
      raise errors.UserError(
        f"{_KEY} of class {_name(source, k)} is {weight!r}; expected a finite number >= 0."
      )
  if not any(weights):
    raise errors.UserError(f"{_KEY} are all 0, so that nothing would be learned.")
  return tuple(map(float, weights))


def balanced(source: data.Source, num_classes: int) -> list[float]:
  """See `resolve`; 1 for a class without images."""
  labels = labels_of(source)
  flat = [k for label in labels for k in (label if isinstance(label, tuple) else (label,))]
  count = np.bincount(np.asarray(flat, np.int64), minlength=num_classes)
  present = count > 0
  return np.where(present, len(flat) / (present.sum() * np.maximum(count, 1)), 1.0).tolist()


def note(weights: Sequence[float], source: data.Source) -> str:
  """Returns a line with the three largest and the three smallest weights."""
  order = sorted(range(len(weights)), key=lambda k: -weights[k])
  shown = order if len(order) <= 6 else [*order[:3], *order[-3:]]
  parts = [f"{_name(source, k)} {weights[k]:.3g}" for k in shown]
  if len(order) > len(shown):
    parts.insert(3, "...")
  return f"class weights: {', '.join(parts)}"


def _by_name(
  weights_of: Mapping[Setting, Setting], source: data.Source, num_classes: int
) -> list[Setting]:
  names = source.class_names or ()
  numbers = {class_names.plain(name): k for k, name in enumerate(names)}
  weights: list[Setting] = [1.0] * num_classes
  chosen: dict[int, Setting] = {}
  for key, weight in weights_of.items():
    k = numbers.get(class_names.plain(str(key)))
    if k is None and str(key).isdecimal() and int(key) < num_classes:
      k = int(key)
    if k is None:
      expected = names or [f"0..{num_classes - 1}"]
      raise errors.unknown(f"class in {_KEY}", key, expected[:50])
    if k in chosen:
      raise errors.UserError(
        f"{_KEY} names the class {_name(source, k)} twice: {chosen[k]!r}, {key!r}."
      )
    chosen[k], weights[k] = key, weight
  return weights


def _is_number(value: object) -> bool:
  return isinstance(value, int | float) and not isinstance(value, bool)


def _name(source: data.Source, k: int) -> str:
  names = source.class_names or ()
  return repr(names[k]) if k < len(names) else str(k)
