"""Detection at every patch size: average precision by the rules of COCO or of LVIS, on the images as they are in files.

A detection is a pair of a token's box and a class: a token may be of several classes, and nothing suppresses its
neighbours. The best pairs of each image are chosen on the device; the rest is done on the host. A score of objectness
(OWLv2) orders boxes that have no class; it has no part in these scores.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, final

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from flexivit_jax import errors
from flexivit_jax.data import prompts, queries as data_queries
from flexivit_jax.data.text import Tokens
from flexivit_jax.devices import sharding
from flexivit_jax.evaluators import average_precision, box_samples, found_boxes
from flexivit_jax.evaluators.average_precision import RULES
from flexivit_jax.evaluators.base import Batches, Report, Row, silent
from flexivit_jax.evaluators.box_samples import Labelled
from flexivit_jax.evaluators.found_boxes import Images
from flexivit_jax.evaluators.metrics import Metric
from flexivit_jax.evaluators.per_size import PerSize, of_this_process, sizes_of
from flexivit_jax.evaluators.queries import Queries
from flexivit_jax.models import Model
from flexivit_jax.models.owl_vit import with_queries
from flexivit_jax.objectives.base import Batch
from flexivit_jax.objectives.detection import corners
from flexivit_jax.sizes import SeqHw, SizeKey, size_label
from flexivit_jax.trees import Json, Params

METRICS = (
  Metric("ap", unit="%", label="AP", title="average precision"),
  Metric("ap50", unit="%", label="AP50", title="average precision at an overlap of 0.5"),
  Metric("ap75", unit="%", label="AP75", title="average precision at an overlap of 0.75"),
  Metric(
    "ceiling_recall",
    unit="%",
    label="ceiling",
    title="share of the boxes that there are tokens for",
    trained=False,
    ceiling_of="ap",
  ),
  Metric(
    "dropped_boxes",
    "min",
    label="dropped",
    title="boxes beyond the number of tokens",
    trained=False,
  ),
)
# Tokens that a box covers, by the end of the name of the metric.
TOKENS = {
  "below_1": (0.0, 1.0),
  "1_to_4": (1.0, 4.0),
  "4_to_16": (4.0, 16.0),
  "above_16": (16.0, average_precision.MOST_PIXELS),
}
_SIZES = ("small", "medium", "large")
_MOST = {"coco": 100, "lvis": 300}


def top_pairs(
  logits: Float[Array, "n t k"], boxes: Float[Array, "n t 4"], number: int
) -> dict[str, Array]:
  """Returns the best pairs of a token and a class of each image: "score", "label" [n, p] and "box" [n, p, 4].

  Args:
    logits: of the classes for each token; one that is not a number has the score 0.
    boxes: of the tokens, (cx, cy, w, h).
    number: of the pairs, p; fewer where there are no more.
  """
  n, t, k = logits.shape
  scores = jax.nn.sigmoid(jnp.where(jnp.isnan(logits), -jnp.inf, logits.astype(jnp.float32)))
  best, place = jax.lax.top_k(scores.reshape(n, t * k), min(number, t * k))
  token, label = place // k, place % k
  box = jnp.take_along_axis(corners(jnp.nan_to_num(boxes)), token[..., None], axis=1)
  return {"score": best, "label": label, "box": box}


def eval_step(
  params: Params,
  batch: Batch,
  *,
  model: Model,
  classes: tuple[int, ...] | None,
  pairs: int,
  mesh: Mesh,
  **size: Any,
) -> dict[str, Array]:
  """The best pairs of a batch, see `top_pairs`; `classes` are the logits that compete, None: all."""
  _, out = model.apply({"params": params}, batch["image"], **size)
  logits = out["class_logits"]
  if classes is not None:
    logits = logits[..., np.asarray(classes)]
  found = top_pairs(logits, out["pred_boxes"], pairs)
  return jax.lax.with_sharding_constraint(found, sharding.batch_split(mesh))


@final
class Detection:
  """The evaluator; see `detection`."""

  def __init__(
    self,
    model: Model,
    batches: Batches,
    mesh: Mesh | None,
    scored: PerSize,
    queries: Queries | None,
    *,
    classes: Sequence[int],
    num_classes: int,
    names: Sequence[str] | None,
    groups: Mapping[str, Sequence[int]],
    rules: str,
    samples: int,
  ):
    self._model, self._batches, self._mesh = model, batches, mesh
    self._scored, self._queries = scored, queries
    self._classes, self._num_classes, self._names = list(classes), num_classes, names
    self._groups, self._lvis, self._most = groups, rules == "lvis", _MOST[rules]
    self._number, self._samples = samples, list[box_samples.Sample]()
    self._params: Params | None = None
    self._compiled = False

  def check(self) -> None:
    """See `Evaluator.check`."""
    average_precision.pycocotools()
    self._checked(next(iter(self._batches)))
    self._scored.check()

  def compile(self, params: Params, report: Report = silent) -> None:
    """See `Evaluator.compile`; the program of queries is one, of which `report` is not told."""
    self.check()
    if self._queries is not None:
      self._queries.compile(params)
      params = self._fixed(params, np.zeros(self._queries.shape, np.float32))
    self._scored.compile(params, report)
    self._compiled = True

  def run(self, params: Params) -> list[Row]:
    """Returns for each size the metrics, and "n" (images).

    Also of areas in pixels "ap_small", "ap_medium", "ap_large", of areas in tokens "ap50_tokens_below_1", ..., of
    groups of classes "ap_NAME" and "ap50_NAME", each where there are such boxes; by class "class_ap" (None: no box) and
    "class_boxes"; and "samples", see `box_samples`.

    Raises:
      UserError: see `found_boxes.checked`; no box that counts.
    """
    if not self._compiled:
      self.compile(params)
    if self._queries is not None:
      params = self._fixed(params, self._queries.embedded(params))
    self._params = params
    self._samples.clear()
    images = found_boxes.of_all_processes(self._found(params))
    chosen = np.isin(images["box_labels"], self._classes) & images["box_mask"]
    rows = self._rows(images | {"box_mask": chosen})
    cut = self._queries.cut if self._queries else 0
    return [row | ({"sentences_cut": cut} if cut else {}) for row in rows]

  def costs(self, params: Params, repeats: int = 5) -> list[Row]:
    """Returns what an image costs at each size, once names are embedded; see `PerSize.costs`."""
    return self._scored.costs(self._params, repeats)

  def pictures(self) -> dict[str, bytes]:
    """Returns files of the first images of the latest run, see `box_samples`; rows name their own in "samples"."""
    made = (box_samples.files(i, one, self._names) for i, one in enumerate(self._samples))
    return {name: data for files in made for name, data in files.items()}

  def _checked(self, batch: Mapping[str, np.ndarray]) -> Images:
    return found_boxes.checked(batch, self._num_classes, federated=self._lvis)

  def _fixed(self, params: Params, embedded: np.ndarray) -> Params:
    """The parameters of the detector of which these queries are the classes."""
    _, fixed = with_queries(self._model, params, embedded)  # type: ignore[arg-type]
    whole = sharding.replicate(embedded[None], self._mesh)
    return fixed | {"queries": jax.device_put(whole, sharding.replicated(self._mesh))}

  def _found(self, params: Params) -> Iterator[Images]:
    """Yields the images of each batch of this process, with what is found at each size."""
    waiting: list[tuple[Mapping[str, np.ndarray], Images]] = []

    def batches() -> Iterator[Mapping[str, np.ndarray]]:
      for batch in self._batches:
        waiting.append((batch, self._checked(batch)))
        yield batch

    numbers = np.array(self._classes)
    for outputs in self._scored.outputs(params, batches()):
      batch, images = waiting.pop(0)
      for i, output in enumerate(outputs.values()):
        made = {f"{name}_{i}": of_this_process(array) for name, array in output.items()}
        images |= made | {f"label_{i}": numbers[made[f"label_{i}"]]}
      real = np.flatnonzero(batch["_mask"] > 0)
      for row in real[: self._number - len(self._samples)].tolist():
        self._samples.append(self._sample(batch["image"][row], images, row, list(outputs)))
      yield {name: array[real] for name, array in images.items()}

  def _sample(
    self, image: np.ndarray, images: Images, row: int, sizes: Sequence[SizeKey]
  ) -> box_samples.Sample:
    real = images["box_mask"][row] & np.isin(images["box_labels"][row], self._classes)
    true = Labelled(images["boxes"][row][real], images["box_labels"][row][real])
    found = {
      self._size_name(key): Labelled(*(images[f"{k}_{i}"][row] for k in ("box", "label", "score")))
      for i, key in enumerate(sizes)
    }
    return box_samples.Sample(image, images["origin"][row], true, found)

  def _size_name(self, key: SizeKey) -> str:
    return size_label(self._scored.names(self._scored.sizes[key]))

  def _rows(self, images: Images) -> list[Row]:
    true, n = found_boxes.true_boxes(images), len(images["origin"])
    counted = true.of(~true.crowd)
    if not len(counted.image):
      raise errors.UserError(f"No box of the {n} images counts, so there is no average precision.")
    boxes = np.bincount(counted.label, minlength=self._num_classes)
    rows = []
    for i, (key, size) in enumerate(self._scored.sizes.items()):
      gh, gw = self._scored.grid(size)
      found = found_boxes.found_boxes(images, i)
      beyond = np.maximum(np.bincount(counted.image, minlength=n) - gh * gw, 0).sum()
      row = self._scored.names(size) | self._precisions(images, true, found, gh * gw)
      row |= {
        "ceiling_recall": float(1 - beyond / len(counted.image)),
        "dropped_boxes": int(beyond),
        "n": n,
        "class_boxes": boxes.tolist(),
        "samples": [
          box_samples.name_of(k, self._size_name(key)) for k in range(len(self._samples))
        ],
      }
      rows.append(row)
    return rows

  def _precisions(
    self,
    images: Images,
    true: average_precision.Boxes,
    found: average_precision.Boxes,
    tokens: int,
  ) -> Json:
    lenient = None
    if self._lvis:
      true, found = average_precision.federated(true, found, images["neg_labels"] > 0)
      lenient = images["not_exhaustive"] > 0
    score = functools.partial(
      average_precision.precisions, true, found, self._classes, most=self._most, lenient=lenient
    )
    table, mean = score(), average_precision.mean
    whole = table[..., 0]
    made = {"ap": mean(whole), "ap50": mean(whole[0]), "ap75": mean(whole[5])}
    made |= {f"ap_{name}": mean(table[..., 1 + i]) for i, name in enumerate(_SIZES)}
    unit = found_boxes.pixels_of_a_token(images, tokens)
    of_tokens = score(ious=average_precision.IOUS[:1], areas=[*TOKENS.values()], unit=unit)
    made |= {f"ap50_tokens_{name}": mean(of_tokens[..., i]) for i, name in enumerate(TOKENS)}
    for name, group in self._groups.items():
      columns = [self._classes.index(k) for k in group if k in self._classes]
      made |= {
        f"ap_{name}": mean(whole[..., columns]),
        f"ap50_{name}": mean(whole[0][..., columns]),
      }
    of_class: list[float | None] = [None] * self._num_classes
    for i, k in enumerate(self._classes):
      of_class[k] = mean(whole[..., i])
    return {k: v for k, v in made.items() if v is not None} | {"class_ap": of_class}


def detection(
  model: Model,
  batches: Batches,
  mesh: Mesh | None,
  *,
  seqhw: Sequence[SeqHw] = (),
  depth: Sequence[int] = (),
  rules: str = "coco",
  pairs: int = 300,
  only: str | None = None,
  templates: str | Sequence[str] | None = None,
  canonical: bool = True,
  same_names: bool = False,
  vectors: str | None = None,
  samples: int = 4,
  class_names: Sequence[str] | None = None,
  class_groups: Mapping[str, Sequence[int]] | None = None,
  tokens: Tokens | None = None,
) -> Detection:
  """Average precision of a detector at each patch size, with what its grid can find at best.

  Boxes are compared in pixels of the file's image, which `origin()` in pp tells; areas in pixels are those of boxes
  there, where COCO's own files have the areas of masks. A model of queries is given the names of the classes.

  Args:
    model: gives "pred_boxes" and "class_logits".
    batches: re-iterable, see `found_boxes.checked`, and "image" and "_mask".
    mesh: where it runs.
    seqhw, depth: sizes to evaluate, see `per_size.sizes_of`.
    rules: "coco": the best 100 detections of a class in an image count, and boxes around crowds may be found or not.
      "lvis": the best 300; detections of a class count in images only that are known to have it or not ("neg_labels"),
      and where not all its objects have boxes ("not_exhaustive") only those that find one.
    pairs: of a token and a class, the best of an image, that are its detections.
    only: a group of classes: no others compete, and boxes of others do not count.
    templates: of names as queries, see `zero_shot`; default: "clip_best", as in OWL-ViT. Logits are averaged.
    canonical, same_names: as for `zero_shot`.
    vectors: file of the vectors of names, for a model that takes these: "names" [k] and "vectors" [k, d].
    samples: how many of the first images are kept to look at, see `box_samples`.
    class_names, class_groups: of the data.
    tokens: how names become tokens; without it a model with a text tower can be checked, and not run.

  Raises:
    UserError: a model that finds no boxes, or has no classes; options that do not fit it; an unknown group.
  """
  if missing := sorted({"pred_boxes", "class_logits"} - set(model.outputs)):
    raise errors.UserError(
      f"A {type(model).__name__} gives no {' and no '.join(missing)} (it gives {sorted(model.outputs)}); expected a"
      " detector, as model.name='owl_vit' is."
    )
  if rules not in RULES:
    raise errors.unknown("rules", rules, RULES)
  if pairs < 1 or samples < 0:
    raise errors.UserError(f"pairs={pairs}, samples={samples}; expected 1 or more, 0 or more.")
  is_open = "queries" in model.inputs
  for name, value in (("templates", templates), ("vectors", vectors)):
    if value is not None and not is_open:
      raise errors.UserError(
        f"{name}={value!r} of a detector whose queries are its classes; leave it out."
      )
  number = len(class_names or ()) if is_open else model.num_classes
  if number < 1:
    raise errors.UserError(
      "The data name no classes, which are the queries of this detector."
      if is_open
      else f"The model has {number} classes; expected 1 or more."
    )
  groups = dict(class_groups or {})
  if taken := {*groups} & {*_SIZES}:
    raise errors.UserError(f"Groups of classes are called {sorted(taken)}, as sizes of boxes are.")
  if only is not None and only not in groups:
    raise errors.unknown("group of classes", only, groups)
  classes = range(number) if only is None else sorted(groups[only])
  queries = None
  closed = model
  if is_open:
    names = [(class_names or ())[k] for k in classes]
    queries = _queries(model, mesh, names, templates, canonical, same_names, tokens, vectors)
    closed, _ = with_queries(model, {}, np.zeros(queries.shape, np.float32))  # type: ignore[arg-type]
  step = functools.partial(
    eval_step,
    model=closed,
    classes=None if is_open or only is None else tuple(classes),
    pairs=pairs,
    mesh=mesh,
  )
  scored = PerSize(step, closed, batches, mesh, sizes=sizes_of(seqhw, (), depth), inputs=("image",))
  return Detection(
    model,
    batches,
    mesh,
    scored,
    queries,
    classes=classes,
    num_classes=number,
    names=class_names,
    groups=groups,
    rules=rules,
    samples=samples,
  )


def _queries(
  model: Model,
  mesh: Mesh | None,
  names: Sequence[str],
  templates: str | Sequence[str] | None,
  canonical: bool,
  same_names: bool,
  tokens: Tokens | None,
  vectors: str | None,
) -> Queries:
  """Decides what the queries of an open vocabulary are."""
  if model.inputs["queries"].kind == "int":
    if vectors is not None:
      raise errors.UserError(
        f"vectors={vectors!r} of a detector with a text tower, which takes texts; leave it out."
      )
    texts = prompts.class_texts(names, plain=canonical, repeated=same_names)
    made = prompts.templates("clip_best" if templates is None else templates)
    made = tuple(map(prompts.canonical, made)) if canonical else made
    return Queries(model, mesh, texts, made, tokens, None)
  if vectors is None or templates is not None:
    raise errors.UserError(
      'This detector takes vectors of names: give vectors=, an .npz with "names" and "vectors", and no templates.'
    )
  return Queries(model, mesh, names, ("{}",), None, data_queries.vectors_of(vectors, tuple(names)))
