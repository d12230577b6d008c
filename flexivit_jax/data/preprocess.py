"""Preprocessing strings such as `decode|resize(240)|flip_lr|value_range(-1,1)|keep('image')`.

An operation is a plain function. Its first parameter says what it gets: `image`, the value of one
key, or `record`, the whole dict. A function with `rng` is random; the generator belongs to the
example, so a draw depends on nothing else. Images stay uint8 until `value_range`.
"""

import ast
import inspect
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, Shaped

from flexivit_jax.data import images
from flexivit_jax.data.randaug import randaug
from flexivit_jax.errors import UserError, nearest, unknown

Image = Shaped[np.ndarray, "h w c"]
Example = dict[str, Any]  # "image", "label" and so on; values of any kind
Resized = Shaped[np.ndarray, "_ _ c"]  # Of another size, with the same channels.
PixelSize = int | tuple[int, int] | list[int]


def decode(
  image: bytes | Image, max_pixels: int = 2**26, *, exif: bool | None = None, bits: int = 16
) -> Image:
  """Encoded file -> RGB uint8 [h, w, 3]; an array passes through. See `images.decode_image`.

  Args:
    exif: rotates the image as its EXIF data say; None: if the source holds own photos, see `Source.upright`.
    bits: significant bits of grey values in files of 16 bits, 8 to 16.
  """
  if isinstance(image, np.ndarray):
    return image
  return images.decode_image(image, max_pixels=max_pixels, exif=bool(exif), bits=_bits(bits))


def _bits(bits: int) -> int:
  if not 8 <= bits <= 16:
    raise UserError(f"bits={bits}; expected 8 to 16, of the grey values in files of 16 bits.")
  return bits


def resize(image: Image, size: PixelSize, method: str = "linear") -> Resized:
  """Resizes both sides to `size` (an int squashes to a square). See `images.resize_image`."""
  return images.resize_image(image, _hw(size), method)


def resize_small(
  image: Image, size: int, method: str = "area", rounding: str = "nearest"
) -> Resized:
  """Resizes the shorter side to `size` pixels and keeps the aspect ratio.

  Args:
    size: pixels.
    method: see `images.resize_image`.
    rounding: of the longer side: "nearest", or "down" as torchvision's `Resize` and transformers do.
  """
  h, w = image.shape[:2]
  if _choice(rounding, "rounding", ("nearest", "down")) == "down":
    long = int(size * max(h, w) / min(h, w))
    return images.resize_image(image, (size, long) if h <= w else (long, size), method)
  factor = size / min(h, w)
  return images.resize_image(image, (round(h * factor), round(w * factor)), method)


def resize_keep(image: Image, size: PixelSize, fit: str = "cover", method: str = "area") -> Resized:
  """Resizes to `size` and keeps the aspect ratio (sides are rounded), as timm's `ResizeKeepRatio` does.

  Args:
    size: pixels.
    fit: "cover": no side is shorter than `size`; "contain": none is longer.
    method: see `images.resize_image`.
  """
  ratios = [n / m for n, m in zip(image.shape[:2], _hw(size), strict=True)]
  ratio = min(ratios) if _choice(fit, "fit", ("cover", "contain")) == "cover" else max(ratios)
  h, w = (max(1, round(n / ratio)) for n in image.shape[:2])
  return images.resize_image(image, (h, w), method)


def central_crop(
  image: Image, size: PixelSize, half: str = "down", fill: int | list[int] | None = None
) -> Resized:
  """Cuts the central `size`.

  Args:
    size: pixels.
    half: how an odd margin is divided. "down": the smaller half is above or left; "even": rounded to even, as in
      torchvision's `CenterCrop` and timm.
    fill: the value, or one for each channel, that pads an image that is too small; None: it is an error.
  """
  hw = _hw(size)
  if fill is not None:
    image = images.pad_to(image, hw, fill)
  hw = _fitting(image, hw)
  margins = [n - m for n, m in zip(image.shape[:2], hw, strict=True)]
  even = _choice(half, "half", ("down", "even")) == "even"
  top, left = (round(n / 2) if even else n // 2 for n in margins)
  return images.crop(image, top, left, hw)


def crop_border(image: Image, pixels: int) -> Resized:
  """Cuts `pixels` off each of the four sides."""
  h, w = image.shape[:2]
  if pixels < 0 or 2 * pixels >= min(h, w):
    raise UserError(f"Cannot cut {pixels} off each side of {(h, w)} pixels; expected 0 or more.")
  return images.crop(image, pixels, pixels, (h - 2 * pixels, w - 2 * pixels))


def random_crop(
  image: Image, size: PixelSize, padding: int = 0, *, rng: np.random.Generator
) -> Resized:
  """Adds `padding` black pixels on each side, then cuts `size` at a uniform position."""
  if padding:
    image = images.pad_image(image, padding)
  hw = _fitting(image, size)
  top, left = (int(rng.integers(n - m + 1)) for n, m in zip(image.shape[:2], hw, strict=True))
  return images.crop(image, top, left, hw)


def inception_crop(
  image: Image,
  size: PixelSize | None = None,
  area_min: float = 5,
  area_max: float = 100,
  ratio_min: float = 0.75,
  ratio_max: float = 1.33,
  method: str = "linear",
  *,
  rng: np.random.Generator,
) -> Resized:
  """Cuts a box of random area and aspect ratio and resizes it to `size` (None: not).

  Args:
    size: pixels of the result.
    area_min, area_max: of the box, percent of the image.
    ratio_min, ratio_max: width / height of the box.

  Distribution: that of `tf.image.sample_distorted_bounding_box`, the reference's: the ratio is
  uniform, then the height is uniform among those that the area allows; the whole image after 100
  failures (an image more extreme than the ratios allow).
  """
  areas, ratios = (area_min, area_max), (ratio_min, ratio_max)
  top, left, *box = _inception_box((image.shape[0], image.shape[1]), areas, ratios, rng)
  cut = images.crop(image, top, left, (box[0], box[1]))
  return cut if size is None else images.resize_image(cut, _hw(size), method)


def decode_inception_crop(
  image: bytes | Image,
  size: PixelSize,
  area_min: float = 5,
  area_max: float = 100,
  ratio_min: float = 0.75,
  ratio_max: float = 1.33,
  method: str = "linear",
  max_pixels: int = 2**26,
  *,
  exif: bool | None = None,
  bits: int = 16,
  rng: np.random.Generator,
) -> Resized:
  """`decode|inception_crop(size)` with the same boxes; a JPEG much larger than the result is not decoded in full.

  Where a box has two (four, eight) times the pixels of `size` a side, the file is decoded at half (a quarter, an
  eighth) of its size, which is faster, and its pixels are means: less aliasing than "linear" has. Elsewhere the result
  is that of the two operations, to the bit. See `images.decode_crop`.
  """
  areas, ratios = (area_min, area_max), (ratio_min, ratio_max)
  if isinstance(image, np.ndarray):
    return inception_crop(image, size, *areas, *ratios, method, rng=rng)
  cut = images.decode_crop(
    image,
    lambda hw: _inception_box(hw, areas, ratios, rng),
    _hw(size),
    max_pixels=max_pixels,
    exif=bool(exif),
    bits=_bits(bits),
  )
  return images.resize_image(cut, _hw(size), method)


def _inception_box(
  hw: tuple[int, int],
  areas: tuple[float, float],
  ratios: tuple[float, float],
  rng: np.random.Generator,
) -> tuple[int, int, int, int]:
  """Draws (top, left, height, width) in an image of `hw` pixels."""
  area = (areas[0] / 100 * hw[0] * hw[1], areas[1] / 100 * hw[0] * hw[1])
  boxes = (_draw_box(hw, area, rng.uniform(*ratios), rng) for _ in range(100))
  box = next(filter(None, boxes), hw)
  top, left = (int(rng.integers(n - m + 1)) for n, m in zip(hw, box, strict=True))
  return top, left, box[0], box[1]


def _draw_box(
  hw: tuple[int, ...], area: tuple[float, float], ratio: float, rng: np.random.Generator
) -> tuple[int, int] | None:
  """Draws (height, width) with width / height = `ratio` and an area in range; None: none fits."""
  low = round((area[0] / ratio) ** 0.5)
  high = min(round((area[1] / ratio) ** 0.5), hw[0], int((hw[1] + 0.499) / ratio))
  height = int(rng.integers(min(low, high), high + 1))
  width = round(height * ratio)
  fits = 0 < height <= hw[0] and 0 < width <= hw[1]
  # Rounding to pixels may leave the range by less than one row or column; that is no failure.
  return (height, width) if fits and height * width + max(height, width) >= area[0] else None


def flip_lr(image: Image, *, rng: np.random.Generator) -> Image:
  """Mirrors left and right with probability one half."""
  return image[:, ::-1] if rng.random() < 0.5 else image


def value_range(
  image: Image, vmin: float = -1.0, vmax: float = 1.0
) -> Float32[np.ndarray, "h w c"]:
  """Maps uint8 0..255 to float32 vmin..vmax.

  Errors: an image that is not uint8, which is one that has been here before: write `key=` in the
  `resize` and the `value_range` of a second size (the reference's i21k distillation did not).
  """
  if image.dtype != np.uint8:
    raise UserError(f"value_range expects uint8, got {image.dtype}; was it applied twice?")
  out = image.astype(np.float32)
  out /= np.float32(255)  # These three, in this order, give the reference's float32 numbers.
  out *= np.float32(vmax - vmin)
  out += np.float32(vmin)
  return out


def onehot(
  record: Example,
  depth: int,
  key: str = "label",
  key_result: str = "labels",
  on: float = 1.0,
  off: float = 0.0,
) -> Example:
  """Converts the class index `key` into float32 [depth] `key_result`; raises a UserError out of range.

  In a config, `onehot()` counts the classes, see `counted`.
  """
  label = _get(record, key)
  if np.ndim(label):
    raise UserError(f"onehot({depth}) of {label}: not one label; use multihot({depth}).")
  label = int(label)
  if not 0 <= label < depth:
    raise UserError(f"Label {label} is outside onehot({depth}); expected 0..{depth - 1}.")
  vector = np.full(depth, off, np.float32)
  vector[label] = on
  return record | {key_result: vector}


def multihot(
  record: Example, depth: int, key: str = "label", key_result: str = "labels"
) -> Example:
  """Class indices under `key`, any number of them -> float32 [depth] of zeros and ones under `key_result`.

  No index gives zeros, which the evaluator's `skip_unlabelled` leaves out. Errors when one is out of range.
  """
  labels = np.atleast_1d(np.asarray(_get(record, key), np.int64))
  if labels.size and not 0 <= labels.min() <= labels.max() < depth:
    raise UserError(
      f"Labels {labels.tolist()} are outside multihot({depth}); expected 0..{depth - 1}."
    )
  vector = np.zeros(depth, np.float32)
  vector[labels] = 1.0
  return record | {key_result: vector}


def copy(record: Example, inkey: str, outkey: str) -> Example:
  """Copies the value of `inkey` to `outkey`."""
  return record | {outkey: _get(record, inkey)}


def keep(record: Example, *keys: str) -> Example:
  """Keeps only these keys; raises a UserError if one is missing."""
  return {key: _get(record, key) for key in keys}


OPS: dict[str, Callable[..., Any]] = {
  "decode": decode,
  "resize": resize,
  "resize_small": resize_small,
  "resize_keep": resize_keep,
  "central_crop": central_crop,
  "crop_border": crop_border,
  "random_crop": random_crop,
  "inception_crop": inception_crop,
  "decode_inception_crop": decode_inception_crop,
  "flip_lr": flip_lr,
  "randaug": randaug,
  "value_range": value_range,
  "onehot": onehot,
  "multihot": multihot,
  "copy": copy,
  "keep": keep,
}


class Op(NamedTuple):
  """One step: `function(value or record, *args, **kwargs)`, read from and written to keys."""

  text: str
  function: Callable[..., Any]
  args: tuple[object, ...]
  kwargs: dict[str, Any]
  inkey: str | None  # None: the function gets and returns the whole record.
  outkey: str | None
  random: bool


class Preprocess(NamedTuple):
  """A parsed string. `random` says whether any operation draws from `rng`."""

  text: str
  ops: tuple[Op, ...]
  random: bool

  def divide(self) -> tuple["Preprocess", "Preprocess"]:
    """Returns the deterministic first part, whose results are integers, and the rest.

    The first part ends before the first operation that is random or makes floats, which take four times the memory.
    """
    ends = (i for i, op in enumerate(self.ops) if op.random or op.function is value_range)
    end = next(ends, len(self.ops))
    return self._replace(ops=self.ops[:end], random=False), self._replace(ops=self.ops[end:])

  def upright(self) -> "Preprocess":
    """Returns the same for own photos: images are rotated as their EXIF data say, unless `exif=False` is written."""

    def turning(op: Op) -> Op:
      decodes = op.function in (decode, decode_inception_crop)
      return op._replace(kwargs={"exif": True, **op.kwargs}) if decodes else op

    return self._replace(ops=tuple(map(turning, self.ops)))

  def __call__(self, record: Example, rng: np.random.Generator | None) -> Example:
    """Returns a new record; `rng` may be None where `random` is False.

    Errors: what an operation raises, with a note that names the operation.
    """
    record = dict(record)
    for op in self.ops:
      try:
        record = _apply(op, record, rng)
      except Exception as error:
        error.add_note(f"in {op.text}")
        raise
    return record


def parse(pp: str) -> Preprocess:
  """Parses `op|op(args)|...`; arguments are Python literals, nothing is evaluated.

  Operations on an image take `key=` (read and write there), or `inkey=` and `outkey=`; all three
  are "image" when not given, each by itself, as in big_vision.

  Raises:
    UserError: syntax, an unknown operation, a missing or unknown argument; names the nearest.
  """
  ops = tuple(_parse_op(node) for node in _split(pp))
  return Preprocess(pp, ops, any(op.random for op in ops))


def counted(pp: str, num_classes: int) -> str:
  """Returns the string with the number of classes of the data in `onehot()`."""
  return re.sub(r"\bonehot\(\s*\)", f"onehot({num_classes})", pp)


def _apply(op: Op, record: Example, rng: np.random.Generator | None) -> Example:
  draws = {"rng": rng} if op.random else {}
  value = record if op.inkey is None else _get(record, op.inkey)
  result = op.function(value, *op.args, **op.kwargs, **draws)
  if op.outkey is None:
    return result
  record[op.outkey] = result
  return record


def _split(pp: str) -> list[ast.expr]:
  """Returns the operations between bars; Python parses `a|b|c` as `(a|b)|c`, so bars in strings are safe."""
  try:
    node = ast.parse(pp.replace("\n", " ").strip(), mode="eval").body
  except SyntaxError as error:
    raise UserError(f"Cannot read pp string {pp!r}: {error.msg} at {error.offset}.") from None
  nodes = []
  while isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
    nodes.append(node.right)
    node = node.left
  return [node, *reversed(nodes)]


def _parse_op(node: ast.expr) -> Op:
  text = ast.unparse(node)
  call = node if isinstance(node, ast.Call) else ast.Call(node, [], [])
  if not isinstance(call.func, ast.Name):
    raise UserError(
      f"Cannot read {text!r} in a pp string; expected e.g. 'flip_lr' or 'resize(24)'."
    )
  name = call.func.id
  if name not in OPS:
    raise unknown("preprocessing operation", name, OPS)
  args = tuple(_literal(arg, text) for arg in call.args)
  kwargs = {k.arg: _literal(k.value, text) for k in call.keywords if k.arg is not None}
  if len(kwargs) < len(call.keywords):
    raise UserError(f"Cannot read {text!r} in a pp string: no ** there.")
  return _make_op(text, OPS[name], args, kwargs)


def _literal(node: ast.expr, text: str) -> object:
  try:
    return ast.literal_eval(node)
  except ValueError:
    bad = ast.unparse(node)
    raise UserError(f"Argument {bad!r} of {text!r} is not a literal (number, string).") from None


def _make_op(
  text: str, function: Callable[..., Any], args: tuple[object, ...], kwargs: dict[str, Any]
) -> Op:
  first, *rest = inspect.signature(function).parameters.values()
  known = [p.name for p in rest if p.name != "rng" and p.kind is not p.VAR_POSITIONAL]
  inkey = outkey = None
  if first.name == "image":
    key = kwargs.pop("key", "image")
    inkey, outkey = kwargs.pop("inkey", key), kwargs.pop("outkey", key)
    known = [*known, "key", "inkey", "outkey"]
  for name in kwargs:
    if name not in known:
      raise UserError(f"{text}: no argument {name!r}; known: {known}.{nearest(name, known)}")
  op_random = "rng" in [p.name for p in rest]
  try:
    inspect.signature(function).bind(None, *args, **kwargs, **({"rng": None} if op_random else {}))
  except TypeError as error:
    raise UserError(f"{text}: {error}; arguments: {known}.") from None
  return Op(text, function, args, kwargs, inkey, outkey, op_random)


def _get(record: Example, key: str) -> Any:
  if key not in record:
    raise unknown("key of an example", key, record)
  return record[key]


def _hw(size: PixelSize) -> tuple[int, int]:
  return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _choice(value: str, what: str, choices: tuple[str, ...]) -> str:
  if value not in choices:
    raise unknown(what, value, choices)
  return value


def _fitting(image: Image, size: PixelSize) -> tuple[int, int]:
  hw = _hw(size)
  if hw[0] > image.shape[0] or hw[1] > image.shape[1]:
    raise UserError(f"Cannot crop {hw} out of {image.shape[:2]} pixels; resize first or pad.")
  return hw
