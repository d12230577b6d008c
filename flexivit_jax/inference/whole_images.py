"""How images are prepared so that nothing of them is cut off: each pixel, or each object, has an answer."""

import os
import pathlib
import stat
from typing import Any

import numpy as np
from jaxtyping import Float32, UInt8

from flexivit_jax import data, weights
from flexivit_jax.data import annotations, images
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


def is_sized(record: Json) -> bool:
  """Tells whether weights say to which size images are brought, rather than to take them as they are."""
  pp = record.get("pp")
  return "images" in record or any(
    op.first == "hw" or op.function in _SIZED for op in (data.parse(pp).ops if pp else ())
  )


def uncut(record: Json, image_size: int | None) -> tuple[str, list[str]]:
  """Returns a preprocessing that shows the model all of an image, and notes on what differs from its own.

  That is the weights' own, without what cuts an image or draws; where that gave the image its size, it is fitted into
  this size, and padded below and on the right. Weights that say nothing get `image_size` pixels a side in this way, and
  so do those of a run whose evaluation takes images at the size that they have: by default that of its training.

  Raises:
    UserError: `image_size` where the weights say to which size images are brought.
  """
  size = image_size or record.get("image_size") or record.get("image_shape")
  hw = (size, size) if isinstance(size, int) else (*(size or (weights.stated.USUAL_SIDE,) * 2),)
  if not (record.get("pp") or "images" in record):
    return "|".join(["decode", *_fitted(hw[:2]), "value_range(-1, 1)"]), []
  as_they_are = not is_sized(record)
  ops = data.parse(weights.preparation(record, None if as_they_are else image_size)).ops
  decoded = ["decode"]
  moved: list[str] = []
  others: list[str] = []
  left_out: list[str] = []
  for op in ops:
    if (op.inkey, op.outkey) != ("image", "image"):
      continue
    if op.random or op.function in _CUTS:
      left_out.append(op.text)
      size = op.args[0] if op.args else op.kwargs.get("size")
      moved = _fitted(size) if size and op.function in _SIZED else moved
    elif op.first == "encoded":
      decoded = [op.text]
    else:
      (moved if op.first == "hw" else others).append(op.text)
  if as_they_are and size:
    moved = _fitted(hw[:2])
    why = "" if image_size else ", as large as in training; --image_size gives another size"
    note = f"Images are fitted into {hw[0]}x{hw[1]} pixels and padded below and on the right{why}."
    return "|".join([*decoded, *moved, *others]), [note]
  note = f"{', '.join(left_out)} of its preprocessing is left out: an object may be anywhere"
  instead = f"; images are prepared by {'|'.join(moved)}" if moved else ""
  return "|".join([*decoded, *moved, *others]), [f"{note}{instead}."] if left_out else []


_SIZED = [data.OPS[n] for n in ("central_crop", "random_crop", "inception_crop", "decode_inception_crop")]  # fmt: skip
_CUTS = [*_SIZED, data.OPS["crop_border"], data.OPS["balanced_crop"]]


def _fitted(size: Any) -> list[str]:
  side = size if isinstance(size, int) else tuple(size)
  return [f"resize_keep({side}, 'contain')", f"pad({side}, fill=0)"]


def origin(pp: str, path: str) -> Float32[np.ndarray, "6"]:
  """Returns the window of a file's image that a preprocessing shows, see `annotations`; decodes no pixel.

  Args:
    pp: of `uncut`.
    path: the file.

  Raises:
    OSError, UserError, SyntaxError, ValueError: the file has gone, or is no image.
  """
  return origin_of(pp, pathlib.Path(path).read_bytes())


def origin_of(pp: str, encoded: bytes) -> Float32[np.ndarray, "6"]:
  """The same of the bytes of a file."""
  ops = data.parse(pp).upright().ops
  exif = next(op.kwargs["exif"] for op in ops if op.first == "encoded")
  hw = images.header_hw(encoded, exif=exif)
  record = annotations.origin({"image": np.broadcast_to(np.uint8(0), (*hw, 1))})
  del record["image"]
  for op in ops:
    if op.first == "hw":
      affine = op.function(hw, *op.args, **op.kwargs)
      record, hw = annotations.follow(record, hw, affine, op.min_area), affine.hw
  return record["origin"]


def pixels(path: str) -> UInt8[np.ndarray, "h w 3"] | None:
  """Returns the pixels, upright, of a file that was read a moment ago; None where it has gone."""
  try:
    if not stat.S_ISREG(os.stat(path).st_mode):
      return None
    content = pathlib.Path(path).read_bytes()
    return images.decode_image(content, max_pixels=_MAX_PIXELS, exif=True)
  except Exception:  # what was an image a moment ago
    return None
