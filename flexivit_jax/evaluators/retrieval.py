"""Retrieval at every patch size: the images to a caption, the captions to an image, among all of a data set.

Protocol (big_vision, evaluators/proj/image_text/image_text_retrieval.py; the Karpathy splits of COCO and Flickr30k):
every caption looks for its image, once each; an image has found if any of its own captions is among the first k.
The rank of what belongs to a query is 1 + the number of others that are more alike + half of those that are equally so:
the order of the data plays no part, and a model that gives the same vector for everything finds nothing.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, final

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool, Float, Integer, Shaped

from flexivit_jax import errors, heartbeat
from flexivit_jax.evaluators import embedding, resampling
from flexivit_jax.evaluators.base import Batches, Report, Row, silent
from flexivit_jax.evaluators.metrics import Metric
from flexivit_jax.evaluators.per_size import sizes_of
from flexivit_jax.models import Model
from flexivit_jax.sizes import SeqHw, SizeKey, size_name
from flexivit_jax.trees import Params

FIRST = (1, 5, 10)
DIRECTIONS = {"i2t": "image to text", "t2i": "text to image"}
METRICS = tuple(
  Metric(f"{way}_r{k}", "max", "bootstrap", "%", f"{way[0]}→{way[2]} R@{k}", f"{title} recall@{k}")
  for way, title in DIRECTIONS.items()
  for k in FIRST
)
BLOCK = 2**23  # similarities that are in memory at once: 64 MiB


class Ranks(NamedTuple):
  """For each query how many that do not belong to it are more alike than what does, and how many equally so."""

  above: Integer[np.ndarray, "q"]
  equal: Integer[np.ndarray, "q"]

  def found(self, k: int, share: float = 0.5) -> Float[np.ndarray, "q"]:
    """1 where it is among the first k, else 0; so great a share of the equal ones goes before it."""
    return (1 + self.above + share * self.equal <= k).astype(np.float64)


class Embedded(NamedTuple):
  """A data set: which image each caption is of, and what is the same image or the same caption.

  `image_of` [m] are the images of the m captions, in order; `same_text` [m] and `same_image` [n] the first caption of
  these tokens, the first image of these pixels.
  """

  text: Float[np.ndarray, "m e"]
  image_of: Integer[np.ndarray, "m"]
  same_text: Integer[np.ndarray, "m"]
  same_image: Integer[np.ndarray, "n"]


def ranks(
  queries: Float[np.ndarray, "q e"],
  candidates: Float[np.ndarray, "c e"],
  own: Integer[np.ndarray, "q k"],
) -> Ranks:
  """Returns where the best of its own candidates stands for each query.

  Products are float64, `BLOCK` at a time. Equal candidates have equal products: each vector is multiplied once,
  wherever in the data it stands.

  Args:
    queries: any vectors.
    candidates: any vectors.
    own: the candidates that belong to each query, -1 for none; one or more.
  """
  distinct, place, number = np.unique(
    candidates.astype(np.float64) + 0.0, axis=0, return_inverse=True, return_counts=True
  )
  place, number = place.reshape(-1), number.astype(np.float64)
  above, equal = (np.zeros(len(queries), np.int64) for _ in range(2))
  rows = max(1, BLOCK // len(distinct))
  for start in range(0, len(queries), rows):
    part = slice(start, start + rows)
    alike = queries[part].astype(np.float64) @ distinct.T
    theirs = np.take_along_axis(alike, place[own[part]], axis=1)
    theirs = np.where(own[part] >= 0, theirs, -np.inf)
    best = theirs.max(axis=1, keepdims=True)
    above[part] = _count(alike > best, number)
    equal[part] = _count(alike == best, number) - (theirs == best).sum(axis=1)
    heartbeat.beat()
  return Ranks(above, equal)


def _count(
  chosen: Bool[np.ndarray, "q c"], number: Float[np.ndarray, "c"]
) -> Float[np.ndarray, "q"]:
  """Returns how many are chosen in each row, where each column stands for a number of them."""
  if (number == 1).all():  # seven times as fast
    return np.count_nonzero(chosen, axis=1).astype(np.float64)
  return chosen @ number


def both_ways(
  image: Float[np.ndarray, "n e"],
  text: Float[np.ndarray, "m e"],
  image_of: Integer[np.ndarray, "m"],
) -> dict[str, Ranks]:
  """Returns the ranks by direction; of "i2t" one an image, of "t2i" one a caption."""
  captions = [np.flatnonzero(image_of == i) for i in range(len(image))]
  own = np.full((len(image), max(map(len, captions))), -1)
  for row, mine in zip(own, captions, strict=True):
    row[: len(mine)] = mine
  return {"i2t": ranks(image, text, own), "t2i": ranks(text, image, image_of[:, None])}


def per_image(
  found: Mapping[str, Ranks], image_of: Integer[np.ndarray, "m"], share: float = 0.5
) -> dict[str, Float[np.ndarray, "n 2"]]:
  """Returns by metric what each image adds: the queries that found, and all queries."""
  n = len(found["i2t"].above)
  values = {}
  for way, place in found.items():
    of = np.arange(n) if way == "i2t" else image_of
    for k in FIRST:
      hits = np.bincount(of, place.found(k, share), minlength=n)
      values[f"{way}_r{k}"] = np.stack([hits, np.bincount(of, minlength=n)], axis=1)
  return values


def _ratio(means: Float[np.ndarray, "r 2"]) -> Float[np.ndarray, "r"]:
  return means[:, 0] / means[:, 1]


@final
class Retrieval:
  """The evaluator; see `retrieval`."""

  def __init__(self, model: Model, batches: Batches, mesh: Mesh | None, sizes: list):
    embedding.check_texts(model)
    self._model, self._batches, self._mesh = model, batches, mesh
    self._images = embedding.images(model, batches, mesh, sizes)
    self._texts: embedding.Texts | None = None

  def check(self) -> None:
    """See `Evaluator.check`."""
    first = next(iter(self._batches))
    self._example = _texts_of(first)
    self._images.batches = [first]
    self._images.check()

  def compile(self, params: Params, report: Report = silent) -> None:
    """See `Evaluator.compile`; the text tower has one program, of which `report` is not told."""
    self.check()
    self._texts = embedding.Texts(self._model, self._mesh, params, self._example)
    self._images.compile(params, report)

  def run(self, params: Params) -> list[Row]:
    """Returns for each size the metrics, "captions" (how many), "n" (images), and "intervals".

    Where ties decide, also each metric that they change with what belongs to a query before all that is equal
    ("i2t_r1_optimistic") and behind it ("i2t_r1_pessimistic").

    Raises:
      UserError: fewer than two images, an image without a caption, embeddings that are not finite.
    """
    if self._texts is None:
      self.compile(params)
    data, images = self._embed(params)
    rows, values, differ = [], {}, set()
    for size in tuple(images):
      image = images.pop(size)[data.same_image]
      found = both_ways(image, data.text, data.image_of)
      values[size] = per_image(found, data.image_of)
      ties = {
        f"{name}_{side}": value
        for side, share in (("optimistic", 0.0), ("pessimistic", 1.0))
        for name, value in _whole(per_image(found, data.image_of, share)).items()
      }
      row = _whole(values[size])
      names = (name for name in row if len({ties[f"{name}_{s}"] for s in _SIDES}) > 1)
      differ |= set(names)
      rows.append((self._images.names(self._images.sizes[size]), row, ties))
    ends = resampling.rows(values, dict.fromkeys((m.name for m in METRICS), _ratio))
    counts = {"captions": len(data.image_of), "n": len(data.same_image)}
    shown = [f"{name}_{side}" for name in row if name in differ for side in _SIDES]
    return [
      {**names, **row, **{k: ties[k] for k in shown}, **counts, "intervals": end["intervals"]}
      for (names, row, ties), end in zip(rows, ends.values(), strict=True)
    ]

  def costs(self, params: Params, repeats: int = 5) -> list[Row]:
    """Returns what the image tower costs at each size; see `PerSize.costs`."""
    return self._images.costs(params, repeats)

  def _embed(self, params: Params) -> tuple[Embedded, dict[SizeKey, Float[np.ndarray, "n e"]]]:
    """Makes one pass over the data; returns its texts, and the images' embeddings at each size."""
    texts: list[dict[str, jax.Array]] = []

    def batches() -> Iterator[Mapping[str, np.ndarray]]:
      for batch in self._batches:
        texts.append(self._texts(params, _texts_of(batch)))
        yield batch

    parts: dict[SizeKey, list[np.ndarray]] = {size: [] for size in self._images.sizes}
    for outputs in self._images.outputs(params, batches()):
      for size, output in jax.device_get(outputs).items():
        parts[size].append(_finite(size_name(dict(size)), output["image"][output["_mask"] > 0]))
    images = {size: np.concatenate(parts.pop(size)) for size in tuple(parts)}
    return _data([jax.device_get(batch) for batch in texts]), images


_SIDES = ("optimistic", "pessimistic")


def _whole(values: Mapping[str, Float[np.ndarray, "n 2"]]) -> dict[str, float]:
  return {name: float(v[:, 0].sum() / v[:, 1].sum()) for name, v in values.items()}


def _texts_of(batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """What the text program takes of a batch, with 16 bytes that tell images apart."""
  keys = ("texts", "texts_mask", "_mask")
  if missing := sorted({*keys, "image"} - set(batch)):
    raise errors.UserError(
      f"Retrieval needs {missing} in its batches, they have {sorted(batch)}; its pp makes the captions' tokens and"
      " keeps them: keep('image', 'texts', 'texts_mask')."
    )
  made = {key: batch[key] for key in keys}
  if made["texts"].ndim != 3 or made["texts_mask"].shape != made["texts"].shape[:2]:
    raise errors.UserError(
      f"texts of shape {made['texts'].shape} and texts_mask of {made['texts_mask'].shape}; expected [n, captions,"
      " tokens] and [n, captions]."
    )
  digests = [hashlib.blake2b(x.tobytes(), digest_size=16).digest() for x in batch["image"]]
  return made | {"digest": np.frombuffer(b"".join(digests), np.int32).reshape(-1, 4)}


def _data(batches: Sequence[Mapping[str, np.ndarray]]) -> Embedded:
  """Joins the texts of all batches, without padding.

  Raises:
    UserError: see `Retrieval.run`.
  """
  real = np.concatenate([batch["_mask"] for batch in batches]) > 0
  joined = {k: np.concatenate([b[k] for b in batches])[real] for k in batches[0] if k != "_mask"}
  n, captions = len(joined["texts"]), joined["texts_mask"] > 0
  if n < 2:
    raise errors.UserError(f"Retrieval among {n} images; expected at least 2: mend data.")
  if lacking := np.flatnonzero(~captions.any(axis=1)).tolist():
    raise errors.UserError(
      f"{len(lacking)} of {n} images have no caption, e.g. number {lacking[0]} of the data; give each at least one."
    )
  first = _first(joined["texts"][captions])
  text = _finite("the text tower", joined["embedded"][captions])[first]
  image_of = np.nonzero(captions)[0]
  return Embedded(text, image_of, first, _first(joined["digest"]))


def _first(rows: Shaped[np.ndarray, "n d"]) -> Integer[np.ndarray, "n"]:
  """Returns for each row the number of the first that is the same."""
  _, first, same = np.unique(rows, axis=0, return_index=True, return_inverse=True)
  return first[same.reshape(-1)]


def _finite(of: str, embedded: Float[np.ndarray, "n e"]) -> Float[np.ndarray, "n e"]:
  if not np.isfinite(embedded).all():
    raise errors.UserError(
      f"Embeddings of {of} are not finite: nothing can be ranked by them; look at the checkpoint and the data."
    )
  return embedded


def retrieval(
  model: Model,
  batches: Batches,
  mesh: Mesh | None,
  *,
  seqhw: Sequence[SeqHw] = (),
  stride: Sequence[int] = (),
  depth: Sequence[int] = (),
) -> Retrieval:
  """Recall at 1, 5 and 10 from images to captions and from captions to images, at each patch size.

  Captions of the same tokens, and images of the same pixels, are equally alike to everything. Each image is decoded
  once for all sizes, each caption embedded once. The host holds the embeddings of all captions, and of all images at
  all sizes: for 5,000 images with 25,000 captions, of length 768, 77 MB and 15 MB a size.

  Args:
    model: two towers, whose outputs "image" and "text" are compared.
    batches: re-iterable, of "image", "texts" int [n, k, l], the tokens of k captions, "texts_mask" [n, k], 1 for a
      caption and 0 for none, and "_mask".
    mesh: where it runs.
    seqhw, stride, depth: sizes to evaluate, see `per_size.sizes_of`.

  Raises:
    UserError: a model that embeds no texts; later, see `Retrieval.run`.
  """
  return Retrieval(model, batches, mesh, sizes_of(seqhw, stride, depth))
