"""Certificates: what a model and what was made of it give on the same inputs, at several patch sizes.

That is logits; of two towers, both embeddings and their scaled products, the similarity; of a detector,
boxes and logits.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int

from flexivit_jax.models import OwlViT, TextTower, TwoTowers
from flexivit_jax.sizes import SeqHw, Size, size_args, size_text
from flexivit_jax.trees import Json, Params

_TOLERANCE = 1e-4  # of the largest logit; float32 sums in another order differ by less
_EMBEDDINGS = 1e-5  # of vectors of length 1


@dataclasses.dataclass(frozen=True)
class _Scores:
  """Scores [n, ..., k] at one patch size and their largest difference."""

  seqhw: SeqHw
  source: Float[np.ndarray, "n *x k"]
  target: Float[np.ndarray, "n *x k"]

  @property
  def difference(self) -> float:
    """Returns the largest difference between source and target."""
    return float(np.abs(self.source - self.target).max())

  @property
  def limit(self) -> float:
    """Returns the largest difference that rounding can explain."""
    return _limit(self.source)

  @property
  def is_close(self) -> bool:
    """Tells whether rounding can explain the difference; it cannot explain NaN."""
    return self.difference <= self.limit


class Row(_Scores):
  """Logits [n, k]."""

  def words(self) -> str:
    """Returns the difference, for people."""
    return f"largest difference of the logits {self.difference:.1e}"

  def entries(self) -> Json:
    """Returns what the certificate holds."""
    return {
      "largest_difference": self.difference,
      "source_logits": self.source.tolist(),
      "target_logits": self.target.tolist(),
    }


class Embeddings(NamedTuple):
  """Unit vectors of images and texts, and the similarity: their products, scaled, with the bias."""

  image: Float[np.ndarray, "n e"]
  text: Float[np.ndarray, "m e"]
  similarity: Float[np.ndarray, "n m"]


@dataclasses.dataclass(frozen=True)
class _Outputs:
  """Several arrays by name, `Embeddings` or `Boxes`, at one patch size."""

  seqhw: SeqHw
  source: Any
  target: Any

  @property
  def differences(self) -> dict[str, float]:
    """Returns the largest difference of each array."""
    pairs = zip(self.source._fields, self.source, self.target, strict=True)
    return {name: float(np.abs(a - b).max()) for name, a, b in pairs}

  @property
  def difference(self) -> float:
    """Returns the largest of all."""
    return max(self.differences.values())


class TowersRow(_Outputs):
  """Embeddings at one patch size."""

  @property
  def limit(self) -> float:
    """Returns the largest difference of embeddings that rounding can explain."""
    return _EMBEDDINGS

  @property
  def is_close(self) -> bool:
    """Tells whether rounding can explain all differences; it cannot explain NaN."""
    similarity = _limit(self.source.similarity)
    limits = {"image": _EMBEDDINGS, "text": _EMBEDDINGS, "similarity": similarity}
    return all(self.differences[name] <= limit for name, limit in limits.items())

  def words(self) -> str:
    """Returns the differences, for people."""
    shown = ", ".join(f"{name} {value:.1e}" for name, value in self.differences.items())
    return f"largest differences: {shown}"

  def entries(self) -> Json:
    """Returns what the certificate holds."""
    both = {"source": self.source, "target": self.target}
    arrays = {
      f"{side}_{name}": array.tolist()
      for side, e in both.items()
      for name, array in e._asdict().items()
    }
    return {"largest_differences": self.differences, **arrays}


class PixelsRow(_Scores):
  """Scores of every pixel, [n, h, w, k]."""

  def words(self) -> str:
    """Returns the difference, for people."""
    return f"largest difference of the pixels' logits {self.difference:.1e}, {self.same:.4%} of the classes the same"

  @property
  def same(self) -> float:
    """Returns the share of the pixels that have the same class."""
    return float((self.source.argmax(-1) == self.target.argmax(-1)).mean())

  def entries(self) -> Json:
    """Returns what the certificate holds; the scores themselves would be as large as the weights."""
    return {"largest_difference": self.difference, "pixels_of_the_same_class": self.same}


class Boxes(NamedTuple):
  """What a detector gives: (cx, cy, w, h) in shares of the image, and the logits of the classes."""

  pred_boxes: Float[np.ndarray, "n l 4"]
  class_logits: Float[np.ndarray, "n l k"]


class BoxesRow(_Outputs):
  """Boxes and their logits at one patch size."""

  @property
  def limit(self) -> float:
    """Returns the largest difference of logits that rounding can explain; of boxes it is `_EMBEDDINGS` times 10."""
    return _limit(self.source.class_logits)

  @property
  def is_close(self) -> bool:
    """Tells whether rounding can explain both differences; it cannot explain NaN."""
    of_boxes, of_logits = self.differences.values()
    return of_boxes <= 10 * _EMBEDDINGS and of_logits <= self.limit

  def words(self) -> str:
    """Returns the differences, for people."""
    of_boxes, of_logits = self.differences.values()
    return f"largest difference of the boxes {of_boxes:.1e} of the image, of their logits {of_logits:.1e}"

  def entries(self) -> Json:
    """Returns what the certificate holds; boxes themselves would be many at fine sizes."""
    return {"largest_differences": self.differences}


AnyRow = Row | TowersRow | PixelsRow | BoxesRow


def row_of(seqhw: SeqHw, source: Any, target: Any) -> AnyRow:
  """Returns the row for what a model gives: logits, scores of every pixel, `Embeddings` or `Boxes`."""
  if isinstance(source, Embeddings):
    return TowersRow(seqhw, source, Embeddings(*target))
  if isinstance(source, Boxes):
    return BoxesRow(seqhw, source, Boxes(*target))
  return (PixelsRow if source.ndim == 4 else Row)(seqhw, source, target)


def _limit(source: np.ndarray) -> float:
  return _TOLERANCE * max(1.0, float(np.abs(source).max()))


def path_of(out: pathlib.Path) -> pathlib.Path:
  """Returns OUT.certificate.json, beside the file that it is about."""
  return out.with_name(f"{out.stem}.certificate.json")


def write(
  out: pathlib.Path,
  source: pathlib.Path,
  rows: Sequence[AnyRow],
  record: Json,
  hw: tuple[int, int],
) -> None:
  """Writes the certificate of `out`, made of `source`, beside it; the tokenizer, which may be large, stays out."""
  record = {k: v for k, v in record.items() if k != "text"}
  certificate = {
    # A published name may have a slash in it.
    "source": source.name if source.exists() else str(source),
    "target": out.name,
    "record": record,
    "images": f"2 seeded ones of {hw[0]}x{hw[1]} pixels: smooth colours and noise",
    "rows": [{"seqhw": size_text(row.seqhw), **row.entries()} for row in rows],
  }
  if any(isinstance(row, TowersRow) for row in rows):
    certificate["texts"] = "3 seeded ones of random tokens"
  path_of(out).write_text(json.dumps(certificate) + "\n")


def image_hw(record: Json, image_size: int | None) -> Size:
  """Returns pixels (h, w): a square of `image_size`, else what the record says, else 240."""
  if image_size:
    return image_size, image_size
  h, w, *_ = record.get("image_size") or record.get("image_shape") or (240, 240)
  return h, w


def images(hw: tuple[int, int], channels: int) -> Float[np.ndarray, "2 h w c"]:
  """Returns smooth colours with noise on top, in [-1, 1]: they have structure at every patch size."""
  rng = np.random.default_rng(0)
  y, x = (np.linspace(0, 1, side) for side in hw)
  phase, turns = rng.uniform(0, 6.3, (2, channels)), rng.uniform(1, 9, (2, 2, channels))
  wave = np.sin(
    turns[0][:, None, None] * y[None, :, None, None]
    + turns[1][:, None, None] * x[None, None, :, None]
    + phase[:, None, None]
  )
  return (0.7 * wave + 0.3 * rng.uniform(-1, 1, wave.shape)).astype(np.float32)


def logits(
  model: Any, params: Params, image: Float[np.ndarray, "n h w c"], seqhw: SeqHw | None
) -> Float[np.ndarray, "n ..."]:
  """Runs a FlexiViT or a Segmenter in full precision; without `seqhw` at its own patch size."""
  size = {} if seqhw is None else size_args(seqhw)
  with jax.default_matmul_precision("highest"):
    return np.asarray(jax.jit(lambda p, x: model.apply({"params": p}, x, **size)[0])(params, image))


def boxes(
  model: OwlViT, params: Params, image: Float[np.ndarray, "n h w c"], seqhw: SeqHw | None
) -> Boxes:
  """Runs a detector in full precision; without `seqhw` at its own patch size.

  One that takes queries has three random ones.
  """
  size = {} if seqhw is None else size_args(seqhw)
  asked = None
  if model.open and model.text is None:
    asked = np.random.default_rng(0).normal(size=(3, model.query_length)).astype(np.float32)
  elif model.open:
    asked = np.maximum(texts(model.parts["text"]), 1)  # one that begins with 0 is padding
  queries = () if asked is None else (np.tile(asked, (len(image), 1, 1)),)
  run = jax.jit(lambda p, *inputs: model.apply({"params": p}, *inputs, **size)[1])
  with jax.default_matmul_precision("highest"):
    out = run(params, image, *queries)
  return Boxes(*(np.asarray(out[name], np.float32) for name in Boxes._fields))


def texts(tower: TextTower) -> Int[np.ndarray, "3 l"]:
  """Returns random tokens; where the first end token is pooled, it stands at the end and twice before."""
  rng, length = np.random.default_rng(0), tower.max_length
  tokens = rng.integers(0, tower.vocab_size, (3, length))
  if tower.eos_token is not None:
    tokens[tokens == tower.eos_token] = (tower.eos_token + 1) % tower.vocab_size
    tokens[np.arange(3), [length - 1, length // 2, length // 3]] = tower.eos_token
  return tokens.astype(np.int32)


def embeddings(
  model: TwoTowers,
  params: Params,
  image: Float[np.ndarray, "n h w c"],
  tokens: Int[np.ndarray, "m l"],
  seqhw: SeqHw | None,
) -> Embeddings:
  """Runs both towers in full precision; without `seqhw` at the image tower's own patch size."""
  size = () if seqhw is None else tuple(size_args(seqhw).items())
  with jax.default_matmul_precision("highest"):
    images_, texts_ = (
      np.asarray(_encoder(model, "image", size)(params, image)),
      np.asarray(_encoder(model, "tokens", ())(params, tokens)),
    )
  return Embeddings(images_, texts_, similarity(params, images_, texts_))


@functools.lru_cache(maxsize=16)
def _encoder(model: TwoTowers, name: str, size: tuple[tuple[str, Any], ...]) -> Callable[..., Any]:
  """Returns the program of one tower; texts have the same one at all sizes."""
  return jax.jit(lambda p, x: model.apply({"params": p}, **{name: x}, **dict(size))[0])


def similarity(
  params: Params, image: Float[np.ndarray, "n e"], text: Float[np.ndarray, "m e"]
) -> Float[np.ndarray, "n m"]:
  """Returns the products of all images with all texts, scaled, with the bias if there is one."""
  products = np.exp(np.asarray(params["t"])) * (np.asarray(image) @ np.asarray(text).T)
  return products + np.asarray(params["b"]) if "b" in params else products
