"""How images are prepared so that nothing of them is cut off: each pixel, or each object, has an answer."""

import os
import pathlib
import stat

import numpy as np
from jaxtyping import UInt8

from flexivit_jax import data
from flexivit_jax.data import images
from flexivit_jax.trees import Json

_MAX_PIXELS = 2**28


def of_all_pixels(record: Json, image_size: int | None) -> tuple[str, list[str]]:
  """Returns a preprocessing that leaves every pixel in its place, and notes on what differs from the model's own.

  The shorter side gets `image_size` pixels; not given, those that the evaluation of the run gave it, by `short_side` or
  by an operation that resizes; where none did, as many as the images of training had.
  """
  stated = record.get("pp") or "decode|value_range(-1, 1)"
  ops = [op for op in data.parse(stated).ops if op.inkey == "image"]
  resizing = [data.OPS[name] for name in ("resize", "resize_small", "resize_keep")]
  others = [data.OPS[name] for name in ("decode", "value_range")]
  left_out = [op.text for op in ops if op.first == "hw" and op.function not in resizing]
  notes = [f"{', '.join(left_out)} of its preprocessing is left out: every pixel gets a class."]
  notes = notes if left_out else []
  side = image_size or record.get("short_side")
  if side is None and not any(op.function in resizing for op in ops):
    side = min((record.get("image_size") or record.get("image_shape") or [240, 240])[:2])
    notes.append(
      f"The shorter side of an image is resized to {side} pixels, as in training; --image_size gives another."
    )
  kept = [op for op in ops if op.function in (others if side else [*others, *resizing])]
  texts = [op.text for op in kept]
  if side:
    first = next((i for i, op in enumerate(kept) if op.first != "encoded"), len(kept))
    texts.insert(first, f"resize_small({side})")
  return "|".join(texts), notes


def pixels(path: str) -> UInt8[np.ndarray, "h w 3"] | None:
  """Returns the pixels, upright, of a file that was read a moment ago; None where it has gone."""
  try:
    if not stat.S_ISREG(os.stat(path).st_mode):
      return None
    content = pathlib.Path(path).read_bytes()
    return images.decode_image(content, max_pixels=_MAX_PIXELS, exif=True)
  except Exception:  # what was an image a moment ago
    return None
