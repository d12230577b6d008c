"""Named inputs and outputs: the shapes that objectives and models state, and that examples are checked against."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from flexivit_jax.errors import UserError, nearest

NO_CLASS = -1  # of a pixel in a mask: it counts for no class, whatever number it has in files

Dim = int | str


class Spec(NamedTuple):
  """The array of one example: its shape, and whether it holds floats or integers.

  Attributes:
    shape: for each axis its length, or a name. A name stands for one length wherever it occurs: an image of
      `("h", "w", 3)` and a mask of `("h", "w")` are equally large. "classes" is the model's number of them.
    kind: "float", "int" (signed or not) or "any".
  """

  shape: tuple[Dim, ...]
  kind: str = "float"


Specs = Mapping[str, Spec]
Shapes = Mapping[str, tuple[int, ...]]
"""Of one example, by the name of the array: without the axis of the batch."""

KINDS = {"float": "f", "int": "iu", "any": "biuf"}  # of `numpy.dtype.kind`


def spec(shape: str, kind: str = "float") -> Spec:
  """Returns the spec of a shape such as "h w 3" (axes apart by blanks; "" is a scalar).

  Raises:
    ValueError: an unknown kind.
  """
  if kind not in KINDS:
    raise ValueError(f"kind={kind!r}; expected one of {list(KINDS)}.")
  return Spec(tuple(int(d) if d.isdecimal() else d for d in shape.split()), kind)


def image(key: str = "image") -> Spec:
  """Returns the spec of an image in the batch; each key has a size of its own."""
  return spec("h w c") if key == "image" else spec(f"h_{key} w_{key} c")


def merge(*all_specs: Specs) -> dict[str, Spec]:
  """Returns the specs of all, the last one's where several state a name."""
  return {name: one for specs in all_specs for name, one in specs.items()}


def check(
  arrays: Mapping[str, Any],
  specs: Specs,
  lengths: Mapping[str, int] | None = None,
  *,
  where: str = "input.pp",
) -> dict[str, int]:
  """Compares the arrays of one example with their specs; returns the lengths of all named axes.

  Args:
    arrays: by name; anything with `shape` and `dtype`. Others than those in `specs` are ignored.
    specs: what is expected.
    lengths: of names that are known beforehand.
    where: what made the arrays, for errors.

  Raises:
    UserError: an array that is missing, of another shape or kind; axes of one name and two lengths.
  """
  known = dict(lengths or {})
  origin = dict.fromkeys(known, "the model")
  for name, (shape, kind) in specs.items():
    wanted = f"[{', '.join(_shown(d, known, origin) for d in shape)}] under the key {name!r}"
    if name not in arrays:
      raise UserError(
        f"{where} gives no {name!r}; expected {wanted}. It gives {_named(arrays)}; make it in pp, and `keep` it."
        f"{nearest(name, arrays)}"
      )
    got = tuple(arrays[name].shape)
    fits = len(got) == len(shape) and all(
      known.get(d, n) == n if isinstance(d, str) else d == n
      for d, n in zip(shape, got, strict=True)
    )
    if not fits:
      raise UserError(f"{where} gives {name!r} of shape {list(got)}; expected {wanted}.")
    if np.dtype(arrays[name].dtype).kind not in KINDS[kind]:
      advice = " `value_range` makes floats of an image." if kind == "float" else ""
      raise UserError(
        f"{where} gives {name!r} of {arrays[name].dtype}; expected {kind} numbers, {wanted}.{advice}"
      )
    for d, n in zip(shape, got, strict=True):
      if isinstance(d, str) and d not in known:
        known[d], origin[d] = n, repr(name)
  return known


def _named(arrays: Mapping[str, Any]) -> list[str]:
  """Names that a pp may make; the others are the loader's own."""
  return sorted(name for name in arrays if not name.startswith("_"))


def _shown(d: Dim, known: Mapping[str, int], origin: Mapping[str, str]) -> str:
  return str(d) if d not in known else f"{d}={known[str(d)]} of {origin[str(d)]}"
