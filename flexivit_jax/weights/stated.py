"""How images are prepared for weights: what files beside these state, as a preprocessing string for any size."""

import math
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from flexivit_jax import errors
from flexivit_jax.sizes import Size
from flexivit_jax.trees import Json

USUAL_SIDE = 240  # of FlexiViT's paper
FILTERS = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")  # Pillow's number of each
_PAIRS = ("hw", "to", "crop_pct")
# The filter of Pillow that is next to a method of `data.images.resize_image`.
_NEXT = {"linear": "bilinear", "area": "box", "cubic": "bicubic"} | {f"pil_{f}": f for f in FILTERS}


class Stated(NamedTuple):
  """What a file states of the preparation of an image: it is resized, then the centre is cut out.

  Attributes:
    hw: pixels (h, w) that the model gets.
    resize: "squash": to `to`; "shorter": the shorter side to `to[0]`; "cover" and "contain": as `data`'s `resize_keep`;
      "pad": made a square with `fill` below or on the right, then as "squash".
    to: pixels (h, w) of the resize.
    crop_pct: `hw / to` as it is stated, by which `to` is found for another `hw`.
    method: as in `data.images.resize_image`.
    half: how an odd margin is divided, as `data`'s `central_crop` has it.
    fill: what is put around an image that is smaller than `hw`.
    source: the file, as it is to be shown.
  """

  hw: Size
  resize: str
  to: Size
  crop_pct: tuple[float, float]
  method: str
  half: str
  fill: int | list[int]
  source: str

  def at(self, hw: Size) -> "Stated":
    """Returns the same for images of another size: `to` is `floor(hw / crop_pct)`, as in timm."""
    if hw == self.hw:
      return self
    to = math.floor(hw[0] / self.crop_pct[0]), math.floor(hw[1] / self.crop_pct[1])
    return self._replace(hw=hw, to=to)

  def operations(self) -> str:
    """Returns the part of the preprocessing string between `decode` and `value_range`."""
    to, method = _shown(self.to), f"method={self.method!r}"
    first = {
      "squash": f"resize({to}, {method})",
      "shorter": f"resize_small({self.to[0]}, {method}, rounding='down')",
      "cover": f"resize_keep({to}, 'cover', {method})",
      "contain": f"resize_keep({to}, 'contain', {method})",
      "pad": f"pad('square', fill={self.fill})|resize({to}, {method})",
    }[self.resize]
    if self.resize in ("squash", "pad") and self.to == self.hw:
      return first
    return f"{first}|central_crop({_shown(self.hw)}, {self.half!r}, fill={self.fill})"

  def pp(self) -> str:
    """Returns the whole preprocessing string."""
    return f"decode|{self.operations()}|value_range(-1, 1)"

  def words(self) -> str:
    """Returns a line for people: how images are prepared, and which file says so."""
    crop = (
      "" if self.resize in ("squash", "pad") and self.to == self.hw else f", centre {_by(self.hw)}"
    )
    how = {
      "squash": f"squashed to {_by(self.to)}",
      "shorter": f"shorter side to {self.to[0]}",
      "cover": f"resized to cover {_by(self.to)}",
      "contain": f"resized into {_by(self.to)}",
      "pad": f"padded to a square, resized to {_by(self.to)}",
    }[self.resize]
    return f"{how} pixels, {_NEXT[self.method]}{crop} ({self.source})"

  def one_crop_pct(self) -> float:
    """Returns the number from which timm computes `to`, by `floor(hw / crop_pct)`."""
    hw, to, pct = self.hw[0], self.to[0], self.crop_pct[0]
    return pct if math.floor(hw / pct) == to else hw / (to + 0.5)

  @property
  def filter(self) -> str:
    """Returns Pillow's name of the filter, or of the nearest one."""
    return _NEXT[self.method]


def of_record(record: Json) -> Stated | None:
  """Returns what a record says of the preparation, or None where it says nothing that can be taken apart.

  That is "images", which `keep` writes, if "pp" still says the same; else "pp" itself, if it resizes and cuts the
  centre and nothing else.
  """
  pp, images = record.get("pp"), record.get("images")
  if isinstance(images, dict) and images.keys() == set(Stated._fields):
    try:
      values: Json = {k: tuple(v) if k in _PAIRS else v for k, v in images.items()}
      stated = Stated(**values)
      if pp == stated.pp():
        return stated
    except (LookupError, TypeError):  # a record that lies in a file may hold anything
      return None
  return of_pp(pp, str(record.get("source", {}).get("file"))) if isinstance(pp, str) else None


def keep(stated: Stated) -> Json:
  """Returns the entries of a record."""
  values = {k: list(v) if isinstance(v, tuple) else v for k, v in stated._asdict().items()}
  return {"pp": stated.pp(), "images": values}


def of_pp(pp: str, source: str) -> Stated | None:
  """Takes a preprocessing string apart; None where it does more than to resize and to cut the centre."""
  from flexivit_jax import data  # imports OpenCV, which `import flexivit_jax` does without

  ops_by_name = data.OPS
  others = [ops_by_name[name] for name in ("decode", "value_range", "onehot", "multihot", "keep")]
  try:
    ops = [op for op in data.parse(pp).ops if op.function not in others]
  except errors.UserError:
    return None  # of another version
  if any((op.inkey, op.outkey) != ("image", "image") for op in ops):
    return None
  names = [
    next(name for name, function in ops_by_name.items() if function is op.function) for op in ops
  ]
  arguments = [_arguments(op) for op in ops]
  if names == ["resize"]:
    arguments.append((arguments[0][0], {}))  # nothing is cut
  elif names not in (["resize", "central_crop"], ["resize_small", "central_crop"]):
    return None
  (size, more), (hw, cut) = arguments
  resize = "squash" if names[0] == "resize" else "shorter"
  default = "linear" if resize == "squash" else "area"
  hw, to = _pair(hw), _pair(size)
  return Stated(
    hw,
    resize,
    to,
    (hw[0] / to[0], hw[1] / to[1]),
    more.get("method", default),
    cut.get("half", "down"),
    cut.get("fill") or 0,
    source,
  )


def _arguments(op: Any) -> tuple[Any, Json]:
  """The size of an operation, and its other arguments by name; an image under another key has a size of its own."""
  names = ("size", "method") if "resize" in op.function.__name__ else ("size", "half", "fill")
  arguments = dict(zip(names, op.args, strict=False)) | op.kwargs
  return arguments.pop("size", None), arguments


def preparation(record: Json, image_size: int | Size | None = None) -> str:
  """Returns the preprocessing string of one image for weights with this record; it ends in `value_range(-1, 1)`.

  A run's may make labels, too. Weights that state nothing get squashed images.

  Args:
    record: of `load_with_record`.
    image_size: pixels that are wanted, of both sides or (h, w); default: those that a file beside the weights states,
      or those of the model, or 240 where it has none of its own.

  Raises:
    UserError: another size than that of a run, whose own string holds.
  """
  wanted = _pair(image_size) if image_size else None
  images = of_record(record) if "images" in record else None
  if images is not None:
    return images.at(wanted or images.hw).pp()
  pp = record.get("pp")
  if pp and wanted:
    raise errors.UserError(
      f"--image_size={_shown(wanted)}: {record['source']['file']} says how to prepare its images; leave it out."
    )
  h, w, *_ = wanted or record.get("image_size") or (USUAL_SIDE, USUAL_SIDE)
  return pp or f"decode|resize({_shown((h, w))})|value_range(-1, 1)"


def written_for(record: Json, hw: Size) -> Json:
  """Returns a record whose preparation is that of a model written for images of `hw`.

  A string that cannot be taken apart stays.
  """
  stated = of_record(record)
  if stated is None or stated.hw == hw:
    return dict(record)
  return {**record, **keep(stated.at(hw))}


def print_notes(record: Json) -> None:
  """Prints each note of a record to stderr, once."""
  for note in dict.fromkeys(record.get("notes") or []):
    print(f"note: {note}", file=sys.stderr)


def _pair(size: int | Sequence[int]) -> Size:
  return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _shown(size: Size) -> str:
  return str(size[0]) if size[0] == size[1] else str(size)


def _by(size: Size) -> str:
  return f"{size[0]}x{size[1]}"
