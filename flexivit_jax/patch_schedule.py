"""Which static arguments (e.g. `seqhw`) a step uses: a pure function of (seed, step, name).

NumPy only, no state: every host, and every resumed run, draws the same.
"""

import itertools
import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from flexivit_jax.errors import UserError, unknown

Size = int | tuple[int, ...]


class Choice(NamedTuple):
  """The values of one static argument and their probabilities, which sum to 1."""

  values: tuple[Size, ...]
  probs: tuple[float, ...]


Flexi = dict[str, Choice]


def parse(flexi: Mapping[str, Mapping[str, Any]]) -> Flexi:
  """Validates e.g. `{"seqhw": {"v": (5, 6, 8), "p": (1, 1, 2)}}`.

  `v` are the values: positive integers, or tuples of them (`grid_hw`). `p` are weights of any sum;
  left out, all values are equally likely. An empty mapping is a run with nothing to draw.

  Raises:
    UserError: no values, a repeated one, one that is no size; weights of another number, negative,
      not finite, or all zero; a key other than `v` and `p`.
  """
  return {name: _parse_choice(f"flexi.{name}", choice) for name, choice in flexi.items()}


def draw(flexi: Flexi, *, seed: int, step: int) -> dict[str, Size]:
  """Returns the value of each argument at one step; arguments are drawn independently.

  Raises:
    UserError: `seed` or `step` is negative.
  """
  if seed < 0 or step < 0:
    raise UserError(f"Got seed={seed}, step={step}; expected numbers >= 0.")
  return {name: _pick(choice, _uniform(seed, step, name)) for name, choice in flexi.items()}


def all_static(flexi: Flexi) -> list[dict[str, Size]]:
  """Returns every combination that `draw` can return, i.e. what there is to compile."""
  possible = [[v for v, p in zip(*choice, strict=True) if p > 0] for choice in flexi.values()]
  return [dict(zip(flexi, values, strict=True)) for values in itertools.product(*possible)]


def _uniform(seed: int, step: int, name: str) -> float:
  """Returns a number in [0, 1) with 53 random bits.

  From raw Philox bits, not `Generator.choice`: NumPy promises to keep the stream of a bit generator
  and of SeedSequence over versions, but not that of the distributions (NEP 19).
  """
  words = np.random.SeedSequence(seed, spawn_key=(step, zlib.crc32(name.encode())))
  return (int(np.random.Philox(words).random_raw()) >> 11) * 2.0**-53


def _pick(choice: Choice, u: float) -> Size:
  last = max(i for i, p in enumerate(choice.probs) if p > 0)
  # Rounding may leave the sum just below u; it must not reach a value of weight zero then.
  index = np.searchsorted(np.cumsum(choice.probs), u, side="right")
  return choice.values[min(int(index), last)]


def _parse_choice(key: str, choice: Mapping[str, Any]) -> Choice:
  for option in choice:
    if option not in ("v", "p"):
      raise unknown(f"key in {key}", option, ("v", "p"))
  values = _sequence(f"{key}.v", choice.get("v", ()))
  if not values:
    raise UserError(f"{key}.v is empty; give at least one value, e.g. v=(5, 6, 8).")
  values = tuple(_size(f"{key}.v", value) for value in values)
  twice = [value for i, value in enumerate(values) if value in values[:i]]
  if twice:
    raise UserError(f"{key}.v has {twice[0]} twice; use weights p to draw a value more often.")
  weights = _sequence(f"{key}.p", choice.get("p", (1.0,) * len(values)))
  return Choice(values, _probs(f"{key}.p", weights, len(values)))


def _sequence(key: str, values: Any) -> tuple[Any, ...]:
  if isinstance(values, str) or not isinstance(values, Sequence | np.ndarray):
    raise UserError(f"{key}={values!r}; expected a tuple, e.g. (5, 6, 8).")
  return tuple(values)


def _size(key: str, value: Any) -> Size:
  if isinstance(value, Sequence) and not isinstance(value, str) and len(value):
    return tuple(_int_size(key, v) for v in value)
  return _int_size(key, value)


def _int_size(key: str, value: Any) -> int:
  if isinstance(value, bool) or not isinstance(value, int | np.integer) or value <= 0:
    raise UserError(f"{key} has {value!r}; expected integers > 0, or tuples of them.")
  return int(value)


def _probs(key: str, weights: tuple[Any, ...], n: int) -> tuple[float, ...]:
  if len(weights) != n:
    raise UserError(f"{key} has {len(weights)} weights for {n} values; give one each, or no p.")
  if not all(math.isfinite(w) and w >= 0 for w in weights):
    raise UserError(f"{key}={weights}; expected finite weights >= 0.")
  total = float(sum(weights))
  if total == 0:
    raise UserError(f"{key}={weights}; expected at least one weight > 0.")
  return tuple(float(w) / total for w in weights)
