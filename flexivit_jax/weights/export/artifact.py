"""Runs what `flexivit export` wrote: `load_artifact("vit.zip").predict(image, 15)`.

Stands alone, to be copied into your own project: needs jax and numpy, nothing of flexivit_jax. Unpickles nothing.
"""

import dataclasses
import functools
import hashlib
import io
import json
import pathlib
import zipfile
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

# Of images, of every pixel, of boxes.
FORMATS = ("flexivit artifact 1", "flexivit artifact 2", "flexivit artifact 3")
Size = int | tuple[int, ...]  # tokens per side, or (per column, per row)


class Artifact(NamedTuple):
  """The record, and for each size a function from images [n, h, w, c] to logits [n, k], of a Segmenter [n, h, w, k].

  Of two towers the functions give embeddings of length 1, and `text` those of tokens [m, l]; else it is None. The
  similarity is `record["scale"] * image @ text.T + record["bias"]`; `record["text"]` describes the tokenizer.

  Of a detector the functions give a dict: "pred_boxes" [n, l, 4], (cx, cy, w, h) in shares of the image, and
  "class_logits" [n, l, k], of each class by itself (sigmoid), for l tokens.
  """

  record: dict[str, Any]
  programs: dict[Size, Callable[[Any], Any]]
  text: Callable[[Any], Any] | None = None

  @property
  def sizes(self) -> tuple[Size, ...]:
    """Tokens per side, or (per column, per row), that `predict` takes."""
    return tuple(self.programs)

  def predict(self, image: Any, size: Size) -> Any:
    """Logits of images [n, h, w, c] in [-1, 1]; ValueError for another size, or shape or kind of image."""
    if size not in self.programs:
      raise ValueError(f"size={size} is not in this artifact; it has {self.sizes}.")
    image, shape = np.asarray(image), self.record["image_shape"]
    if [*image.shape[1:]] != shape or image.dtype.kind in "biu":  # bytes are not in [-1, 1]
      got = f"{[*image.shape[1:]]}, {image.dtype}"
      raise ValueError(f"Expected floats of shape {shape}, got {got}.")
    return jax.tree.map(np.asarray, self.programs[size](image.astype(np.float32)))

  def encode(self, tokens: Any) -> np.ndarray:
    """Embeddings [m, e] of texts, tokens [m, l]; ValueError for texts of another length, or no text tower."""
    if self.text is None:
      raise ValueError("This artifact has no text tower.")
    tokens, length = np.asarray(tokens), self.record["text_length"]
    if tokens.ndim != 2 or tokens.shape[1] != length or tokens.dtype.kind not in "iu":
      raise ValueError(f"Expected tokens [m, {length}], got {tokens.dtype} {[*tokens.shape]}.")
    return np.asarray(self.text(tokens.astype(np.int32)))


def load_artifact(path: Any) -> Artifact:
  """Reads an artifact and checks its sha256 and each part's; ValueError for a file that is damaged or too new."""
  errors = zipfile.BadZipFile, EOFError, LookupError, OSError, RuntimeError, TypeError, ValueError
  try:
    whole = is_sealed(path)
    with zipfile.ZipFile(path) as file:  # its parts are not compressed, so reading does not expand
      parts = {i.filename: file.read(i) for i in file.infolist() if i.compress_type == 0}
    record = json.loads(parts["record.json"])
    if record["format"] not in FORMATS:
      raise ValueError(f"its format is {record['format']!r}, none of {FORMATS}")
  except errors as e:
    raise ValueError(f"{path} cannot be read; copy or export it again: {e}") from e
  for name, digest in record["sha256"].items():
    if hashlib.sha256(parts.get(name, b"")).hexdigest() != digest:
      raise ValueError(f"{path}: {name} is damaged (wrong sha256); copy or export it again.")
  if not whole:  # but for what no part is made of, such as dates
    raise ValueError(f"{path} is damaged (wrong sha256); copy or export it again.")
  weights = _arrays(parts["weights.npz"])
  # "4x6" in the record is the size (4, 6).
  sizes = {s: s if isinstance(s, int) else tuple(map(int, s.split("x"))) for s in record["sizes"]}
  image = record["image_shape"], np.float32
  programs = {
    k: _program(parts, record, s, weights | _arrays(parts[f"{s}/embedding.npz"]), image)
    for s, k in sizes.items()
  }
  if "text/program.mlirbc" not in parts:
    return Artifact(record, programs)
  tokens = [record["text_length"]], np.int32
  text = _program(parts, record, "text", _arrays(parts["text/weights.npz"]), tokens)
  return Artifact(record, programs, text)


def is_sealed(path: Any) -> bool:
  """Tells whether the last 64 bytes of a file, a zip's comment, are the sha256 of those before."""
  content = memoryview(pathlib.Path(path).read_bytes())
  return hashlib.sha256(content[:-64]).hexdigest().encode() == content[-64:]


def _arrays(part: bytes) -> dict[str, jax.Array]:
  return {k: jnp.asarray(v) for k, v in np.load(io.BytesIO(part), allow_pickle=False).items()}


def _program(parts: Any, record: Any, name: Any, weights: Any, example: Any) -> Callable[..., Any]:
  """The StableHLO of one program in place of that of an empty function with the same signature."""
  # Of one input `example` is (shape, dtype).
  x = jax.ShapeDtypeStruct((*export.symbolic_shape("n"), *example[0]), example[1])
  outputs = record.get("boxes", {}).get(str(name)) or record["outputs"]  # k, [h, w, k], or a dict
  shapes = jax.tree.map(np.ravel, outputs, is_leaf=lambda v: isinstance(v, list))
  zeros = lambda w, x: jax.tree.map(lambda s: jnp.zeros((x.shape[0], *s)), shapes)  # noqa: E731
  empty = export.export(jax.jit(zeros, keep_unused=True), platforms=record["platforms"])
  module: dict[str, Any] = {"mlir_module_serialized": parts[f"{name}/program.mlirbc"]}
  module["calling_convention_version"] = record["calling_convention_version"]
  exported = dataclasses.replace(empty(weights, x), **module)
  try:
    exported.mlir_module()
  except jax.errors.JaxRuntimeError as e:
    raise ValueError(f"Made with jax {record['jax']}, not readable by {jax.__version__}.") from e
  return functools.partial(jax.jit(exported.call), weights)
