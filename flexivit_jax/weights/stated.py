"""How images are prepared for weights: what files beside these state, as a preprocessing string for any size."""

import sys
from collections.abc import Mapping
from typing import Any

from flexivit_jax import errors

USUAL_SIDE = 240  # of FlexiViT's paper


def preparation(record: Mapping[str, Any], image_size: int | None = None) -> str:
  """Returns the preprocessing string of one image for weights with this record; it ends in `value_range(-1, 1)`.

  Args:
    record: of `load_with_record`.
    image_size: pixels a side that are wanted; default: those of the model, or 240 where it has none of its own.

  Raises:
    UserError: another size than that of a run, whose own string holds.
  """
  pp = record.get("pp")
  if pp and image_size:
    raise errors.UserError(
      f"--image_size={image_size}: {record['source']['file']} says how to prepare its images; leave it out."
    )
  side = image_size or (record.get("image_size") or [USUAL_SIDE])[0]
  return pp or f"decode|resize({side})|value_range(-1, 1)"


def print_notes(record: Mapping[str, Any]) -> None:
  """Prints each note of a record to stderr, once."""
  for note in dict.fromkeys(record.get("notes") or []):
    print(f"note: {note}", file=sys.stderr)
