"""Preprocessing strings such as `decode|resize(240)|flip_lr|value_range(-1,1)|keep('image')`.

An operation is a plain function. Its first parameter says what it gets and gives:

- `image`: the value of one key; it returns the new one, of the same size, and touches no boxes.
- `hw`: the size of an image, (height, width); it returns where to look, see `geometry`. The image,
  and the boxes, the mask and the origin of the example, follow.
- `encoded`: the bytes of a file; it returns the image.
- `record`: the whole dict; it returns a new one.

A function with `rng` is random; the generator belongs to the example, so a draw depends on nothing
else. A function of `hw` with `mask` is given the mask of the image, None if it has none. A function with `class_names`
or `num_classes` is given those of the data, see `Preprocess.of_classes`; one with `tile` a function that returns
another example, after the operations before it. Images stay uint8 until `value_range`.
"""

import ast
import functools
import inspect
import os
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32

from flexivit_jax.data import (
  annotations,
  boxes,
  geometry,
  images,
  mosaic,
  queries,
  text as text_lib,
)
from flexivit_jax.data.annotations import Example
from flexivit_jax.data.geometry import Image
from flexivit_jax.data.photometric import photometric_distortion
from flexivit_jax.data.randaug import randaug
from flexivit_jax.errors import UserError, nearest, unknown


def decode(
  encoded: bytes | Image, max_pixels: int = 2**26, *, exif: bool | None = None, bits: int = 16
) -> Image:
  """Encoded file -> RGB uint8 [h, w, 3]; an array passes through. See `images.decode_image`.

  A mask is decoded too, and boxes and mask are checked against the image, see `annotations.opened`.

  Args:
    exif: rotates the image as its EXIF data say; None: if the source holds own photos, see `Source.upright`.
    bits: significant bits of grey values in files of 16 bits, 8 to 16.
  """
  if isinstance(encoded, np.ndarray):
    return encoded
  return images.decode_image(encoded, max_pixels=max_pixels, exif=bool(exif), bits=bits)


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


def first_caption(record: Example) -> Example:
  """Puts the first of the "captions" of an example under "caption"."""
  return record | {"caption": _captions(record)[0]}


def random_caption(record: Example, *, rng: np.random.Generator) -> Example:
  """Puts one of the "captions" of an example under "caption", each with the same probability."""
  captions = _captions(record)
  return record | {"caption": captions[int(rng.integers(len(captions)))]}


def tokenize(
  record: Example,
  path: str,
  *,
  length: int,
  pad: str | int,
  end: str | int | None,
  lower: bool = False,
  key: str = "caption",
) -> Example:
  """Text under `key` -> "tokens" int32 [length]; see `text.load` for the arguments.

  Errors: a text without words.
  """
  tokens = queries.load_tokens(path, length, pad, end, lower)
  return record | {"tokens": tokens.encode([_get(record, key)])[0]}


def tokenize_all(
  record: Example,
  path: str,
  *,
  length: int,
  pad: str | int,
  end: str | int | None,
  lower: bool = False,
  captions: int = 5,
) -> Example:
  """All "captions" -> "texts" int32 [captions, length], and "texts_mask" float32 [captions], 0 for rows of padding.

  Errors: more captions than rows; a caption without words.
  """
  tokens, texts = queries.load_tokens(path, length, pad, end, lower), _captions(record)
  if len(texts) > captions:
    raise UserError(f"{len(texts)} captions; expected at most {captions}, which is captions= here.")
  rows = np.full((captions, length), tokens.pad, np.int32)
  rows[: len(texts)] = tokens.encode(texts)
  mask = (np.arange(captions) < len(texts)).astype(np.float32)
  return record | {"texts": rows, "texts_mask": mask}


def _captions(record: Example) -> tuple[str, ...]:
  captions = _get(record, "captions")
  if not captions:
    raise UserError("no caption; expected at least one.")
  return captions


def copy(record: Example, inkey: str, outkey: str) -> Example:
  """Copies the value of `inkey` to `outkey`."""
  return record | {outkey: _get(record, inkey)}


def keep(record: Example, *keys: str) -> Example:
  """Keeps only these keys; raises a UserError if one is missing, or if boxes of a crowd would look like others."""
  if "boxes" in keys and "box_crowd" not in keys:
    crowds = int(np.count_nonzero(record.get("box_crowd", ())))
    if crowds:
      raise UserError(
        f"{crowds} of its boxes stand{'s' * (crowds == 1)} for a crowd, and would be taken for objects;"
        " write without_crowd() before pad_boxes, or keep 'box_crowd', too."
      )
  return {key: _get(record, key) for key in keys}


OPS: dict[str, Callable[..., Any]] = {
  "decode": decode,
  "resize": geometry.resize,
  "resize_small": geometry.resize_small,
  "resize_keep": geometry.resize_keep,
  "pad": geometry.pad,
  "scale_jitter": geometry.scale_jitter,
  "central_crop": geometry.central_crop,
  "crop_border": geometry.crop_border,
  "random_crop": geometry.random_crop,
  "balanced_crop": geometry.balanced_crop,
  "inception_crop": geometry.inception_crop,
  "decode_inception_crop": geometry.decode_inception_crop,
  "flip_lr": geometry.flip_lr,
  "randaug": randaug,
  "photometric_distortion": photometric_distortion,
  "value_range": value_range,
  "onehot": onehot,
  "multihot": multihot,
  "origin": annotations.origin,
  "pad_boxes": annotations.pad_boxes,
  "relative_boxes": annotations.relative_boxes,
  "first_caption": first_caption,
  "random_caption": random_caption,
  "tokenize": tokenize,
  "tokenize_all": tokenize_all,
  "merge_boxes": boxes.merge_boxes,
  "without_crowd": boxes.without_crowd,
  "with_crowd": boxes.with_crowd,
  "mosaic": mosaic.mosaic,
  "sample_queries": queries.sample_queries,
  "federated": queries.federated,
  "query_tokens": queries.query_tokens,
  "query_vectors": queries.query_vectors,
  "copy": copy,
  "keep": keep,
}
_TOKENIZERS = (tokenize, tokenize_all, queries.query_tokens)
_OF_DATA = ("class_names", "num_classes")  # parameters that the data give


# Returns an example, drawn by the generator, after the operations of a `Preprocess`, see `stream`.
Others = Callable[["Preprocess", np.random.Generator], Example]


class Op(NamedTuple):
  """One step: `function(value or size or record, *args, **kwargs)`, read from and written to keys.

  Attributes:
    text: as it was written.
    function, args, kwargs: the call; the first argument is left out.
    first: the name of the first parameter, "image", "hw", "encoded" or "record".
    inkey, outkey: None where the function gets and returns the whole record.
    random: whether the function takes `rng`.
    looks: whether the function takes `mask`.
    blind: whether it moves pixels and does not say where to, so that boxes and mask cannot follow.
    min_area: the share of a box's area that has to be left, see `annotations.follow`.
    joins: whether the function takes `tile`.
    asks: those of `class_names` and `num_classes` that the function takes.
  """

  text: str
  function: Callable[..., Any]
  args: tuple[object, ...]
  kwargs: dict[str, Any]
  first: str
  inkey: str | None
  outkey: str | None
  random: bool
  looks: bool
  blind: bool
  min_area: float
  joins: bool = False
  asks: tuple[str, ...] = ()


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
      decodes = op.first == "encoded"
      return op._replace(kwargs={"exif": True, **op.kwargs}) if decodes else op

    return self._replace(ops=tuple(map(turning, self.ops)))

  def of_classes(self, class_names: tuple[str, ...] | None, num_classes: int) -> "Preprocess":
    """Returns the same for data with these classes.

    Raises:
      UserError: an operation that needs names, and there are none; arguments that do not fit the classes.
    """
    data = {"class_names": class_names or (), "num_classes": num_classes}

    def told(op: Op) -> Op:
      kwargs = {**op.kwargs, **{name: data[name] for name in op.asks}}
      if op.function in queries.CHECKS:
        queries.CHECKS[op.function](*op.args, **kwargs)
      return op._replace(kwargs=kwargs)

    return self._replace(ops=tuple(map(told, self.ops)))

  def __call__(
    self, record: Example, rng: np.random.Generator | None, others: Others | None = None
  ) -> Example:
    """Returns a new record.

    Args:
      record: an example.
      rng: of the example; may be None where `random` is False.
      others: gives other examples to operations that join several; None: there are no others.

    Errors: what an operation raises, with a note that names the operation.
    """
    record = dict(record)
    for i, op in enumerate(self.ops):
      given: Example = {"rng": rng} if op.random else {}
      if op.joins:
        given["tile"] = functools.partial(_tile, self._replace(ops=self.ops[:i]), rng, others)
      try:
        record = _apply(op, record, given)
      except Exception as error:
        error.add_note(f"in {op.text}")
        raise
    return record


def parse(pp: str) -> Preprocess:
  """Parses `op|op(args)|...`; arguments are Python literals, nothing is evaluated.

  Operations on an image take `key=` (read and write there), or `inkey=` and `outkey=`; all three
  are "image" when not given, each by itself, as in big_vision. Boxes and mask belong to "image":
  what is written to another key leaves them alone. Geometric operations take `min_area=`, see
  `annotations.follow`.

  Raises:
    UserError: syntax, an unknown operation, a missing or unknown argument; names the nearest.
  """
  ops = tuple(_parse_op(node) for node in _split(pp))
  _check_order(ops)
  return Preprocess(pp, ops, any(op.random for op in ops))


def counted(pp: str, num_classes: int) -> str:
  """Returns the string with the number of classes of the data in `onehot()`."""
  return re.sub(r"\bonehot\(\s*\)", f"onehot({num_classes})", pp)


def tokens_of(pp: str) -> text_lib.Tokens | None:
  """Returns how the operations of a string make tokens of texts; None: they make none.

  Raises:
    UserError: two operations that do it in two ways; see `text.load`.
  """
  found = []
  for op in parse(counted(pp, 1)).ops:  # the classes are counted later
    if op.function in _TOKENIZERS:
      bound = inspect.signature(op.function).bind_partial(None, *op.args, **op.kwargs)
      bound.apply_defaults()
      names = inspect.signature(queries.load_tokens).parameters
      found.append(queries.load_tokens(*(bound.arguments[name] for name in names)))
  if any(one != found[0] for one in found):
    raise UserError(f"{pp!r} makes tokens in two ways; expected one.")
  return found[0] if found else None


def image_operations(pp: str) -> tuple[list[str], list[str]]:
  """Returns the operations of a string that can change an image, as they are written; and those of them that draw."""
  of_texts = (
    first_caption, random_caption, *_TOKENIZERS, queries.sample_queries, queries.query_vectors,
    queries.federated, keep,
  )  # fmt: skip
  ops = [op for op in parse(counted(pp, 1)).ops if op.function not in of_texts]
  return [op.text for op in ops], [op.text for op in ops if op.random]


def without_files(pp: str, query_length: int = 0) -> str:
  """Returns the string without files that are not here, to plan by: shapes are the same.

  Bytes are in the place of tokenizers, random vectors in that of vectors of names.

  Args:
    pp: the string.
    query_length: of vectors of names.
  """
  pp = pp.replace("\n", " ").strip()
  for node in _split(pp):
    name = getattr(getattr(node, "func", None), "id", None)
    if name == "query_vectors" and query_length:
      path = _parse_op(node).args or (_parse_op(node).kwargs.get("path"),)
      if isinstance(path[0], str) and not os.path.exists(path[0]):
        random = f"query_vectors('{queries.RANDOM}{query_length}')"
        pp = pp.replace(ast.get_source_segment(pp, node) or "", random)
      continue
    if OPS.get(name or "") not in _TOKENIZERS:
      continue
    op = _parse_op(node)
    bound = inspect.signature(op.function).bind_partial(None, *op.args, **op.kwargs)
    path = bound.arguments["path"]
    if path != text_lib.BYTES and not os.path.exists(path):
      kept = {k: v for k, v in op.kwargs.items() if k not in ("path", "pad", "end")}
      options = {"path": text_lib.BYTES, "pad": text_lib.PAD, "end": text_lib.END, **kept}
      arguments = ", ".join(f"{k}={v!r}" for k, v in options.items())
      pp = pp.replace(ast.get_source_segment(pp, node) or "", f"{name}({arguments})")
  return pp


def _tile(before: Preprocess, rng: np.random.Generator, others: Others | None) -> Example:
  if others is None:
    raise UserError("Here are no other examples to join; expected a data set.")
  return others(before, rng)


def _apply(op: Op, record: Example, given: Example) -> Example:
  kwargs = {**op.kwargs, **given}
  if any(name not in kwargs for name in op.asks):
    raise UserError(f"{op.text} asks for the classes of the data; expected Preprocess.of_classes.")
  if op.inkey is None:
    return op.function(record, *op.args, **kwargs)
  value = _get(record, op.inkey)
  image: Any
  hw = affine = None
  if op.first == "hw":
    hw = _size(value)
    if op.looks:
      kwargs["mask"] = _mask_of(op, record)
    affine = op.function(hw, *op.args, **kwargs)
    image = geometry.look(value, affine)
  else:
    image = op.function(value, *op.args, **kwargs)
    if isinstance(image, geometry.Seen):
      image, hw, affine = image
  # These belong to "image". An image under another key has a size of its own, and leaves them alone.
  if op.outkey == "image" and not record.keys().isdisjoint(("boxes", "mask", "origin")):
    record = _follow(op, record, value, image, hw, affine)
  record[op.outkey] = image
  return record


def _mask_of(op: Op, record: Example) -> Any:
  """Returns the mask of the image that an operation moves, read; None: it has none."""
  if op.inkey != "image" or "mask" not in record:
    return None
  return annotations.read_mask(record)["mask"]


def _follow(
  op: Op,
  record: Example,
  value: Any,
  image: Any,
  hw: geometry.ImageSize | None,
  affine: geometry.Affine | None,
) -> Example:
  """Returns the example with boxes and mask as they are after an operation that made `image` of `value`."""
  if op.blind:
    raise UserError(
      f"{op.text} may rotate, shear and shift the image, and boxes and mask do not follow; write geometry=False"
      " for its operations on colours alone."
    )
  if op.first == "hw" and op.inkey != "image":
    raise UserError(
      f"{op.text} puts another image under 'image', to which the boxes and the mask belong; expected"
      f" outkey={op.inkey!r}, or `keep` without 'boxes' and 'mask' before it."
    )
  if op.first == "image" and _size(image) != _size(record["image"]):
    raise UserError(
      f"{op.text} gives {_size(image)} pixels for {_size(record['image'])}, and does not say where boxes and mask"
      " go; a function of `hw` does, see `geometry`."
    )
  if op.first == "encoded":
    record = annotations.opened(record, hw or _size(image), _orientation(op, value))
  return record if affine is None else annotations.follow(record, hw, affine, op.min_area)


def _size(image: Any) -> geometry.ImageSize:
  if not isinstance(image, np.ndarray) or image.ndim != 3:
    got = (
      "an encoded file" if isinstance(image, bytes) else f"{type(image).__name__} {np.shape(image)}"
    )
    raise UserError(f"got {got}; expected an image [h, w, c]. `decode` makes one of a file.")
  return image.shape[0], image.shape[1]


def _orientation(op: Op, encoded: Any) -> int:
  """Returns the EXIF orientation that decoding undid."""
  if not op.kwargs.get("exif") or not isinstance(encoded, bytes):
    return 1
  return images.orientation(encoded)


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
  given = {p.name: None for p in rest if p.name in ("rng", "mask", "tile", *_OF_DATA)}
  known = [p.name for p in rest if p.name not in given and p.kind is not p.VAR_POSITIONAL]
  moves = first.name == "hw" or function is geometry.decode_inception_crop
  inkey = outkey = None
  if first.name != "record":
    key = kwargs.pop("key", "image")
    inkey, outkey = kwargs.pop("inkey", key), kwargs.pop("outkey", key)
    known = [*known, "key", "inkey", "outkey"]
    for name in (inkey, outkey):
      if name in ("boxes", "mask"):
        raise UserError(f"{text}: {name!r} is no image; boxes and mask follow the key 'image'.")
  min_area = kwargs.pop("min_area", annotations.MIN_AREA) if moves else annotations.MIN_AREA
  if not isinstance(min_area, int | float) or not 0 <= min_area <= 1:
    raise UserError(f"{text}: min_area={min_area!r}; expected a share of a box's area, 0 to 1.")
  known += ["min_area"] * moves
  for name in kwargs:
    if name not in known:
      raise UserError(f"{text}: no argument {name!r}; known: {known}.{nearest(name, known)}")
  try:
    bound = inspect.signature(function).bind(None, *args, **kwargs, **given)
  except TypeError as error:
    raise UserError(f"{text}: {error}; arguments: {known}.") from None
  bound.apply_defaults()
  blind = bool(bound.arguments.get("geometry"))
  drawn, looks = "rng" in given, "mask" in given
  joins, asks = "tile" in given, tuple(name for name in _OF_DATA if name in given)
  return Op(
    text, function, args, kwargs, first.name, inkey, outkey, drawn, looks, blind, min_area, joins,
    asks,
  )  # fmt: skip


def _check_order(ops: tuple[Op, ...]) -> None:
  """Raises a UserError where an operation would take relative boxes for pixels, or padded rows for boxes; or the image
  for the decoded one.
  """
  last = moved = None
  begun = False
  for op in ops:
    if begun and op.function is mosaic.mosaic:
      raise UserError(f"{op.text} joins images, and origin() asks for one; leave one of them out.")
    if begun and op.function is geometry.flip_lr and op.outkey == "image":
      raise UserError(
        f"{op.text} mirrors an image whose origin is asked for; leave one of them out."
      )
    if op.function is annotations.origin and moved:
      raise UserError(
        f"origin() stands after {moved.text}, which shows another image than the file's; it stands right after decode."
      )
    begun = begun or op.function is annotations.origin
    joins = op.function is mosaic.mosaic
    sees = op.first == "hw" or op.function is geometry.decode_inception_crop
    if joins or (op.outkey == "image" and sees):
      moved = op
    pads, divides = (op.function is f for f in (annotations.pad_boxes, annotations.relative_boxes))
    moves = joins or (op.outkey == "image" and op.first in ("hw", "encoded"))
    padded = last is not None and last.function is annotations.pad_boxes
    if last and (moves or pads or (divides and not padded)):
      raise UserError(
        f"{last.text} stands before {op.text}, which expects boxes in pixels and none but real ones; the order is:"
        " operations on images, pad_boxes, relative_boxes."
      )
    last = op if pads or divides else last


def _get(record: Example, key: str) -> Any:
  if key not in record:
    raise unknown("key of an example", key, record)
  return record[key]
