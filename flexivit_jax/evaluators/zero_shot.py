"""Zero-shot classification at every patch size: the classes are texts, an image is of the one that is most like it.

Each class is put into each template, each sentence embedded and divided by its length; the mean over the templates,
divided by its length again, stands for the class (CLIP, arXiv 2103.00020; big_vision,
evaluators/proj/image_text/discriminative_classifier.py). Texts are embedded once for all sizes.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, final

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Float32

from flexivit_jax import errors, heartbeat
from flexivit_jax.data import label_maps, prompts
from flexivit_jax.data.text import Tokens
from flexivit_jax.devices import sharding
from flexivit_jax.evaluators import embedding, metrics
from flexivit_jax.evaluators.base import Batches, Report, Row, silent
from flexivit_jax.evaluators.classification import scores
from flexivit_jax.evaluators.per_size import PerSize, sizes_of
from flexivit_jax.evaluators.sums import Sums, masked_sums
from flexivit_jax.models import Model
from flexivit_jax.objectives.base import Batch
from flexivit_jax.sizes import SeqHw
from flexivit_jax.trees import Params

METRICS = (metrics.TOP1, metrics.TOP5)
ROWS = 256  # texts that are embedded at a time


class Classes(NamedTuple):
  """Which texts compete, and which of them the labels are.

  Attributes:
    texts: of the candidates.
    columns: the classes of the labels that are scored, by the number of classes that labels may have.
    place: their places among the texts.
    label_map: whose classes they are; None: the labels' own.
    only: whether images of other classes are left out.
  """

  texts: tuple[str, ...]
  columns: dict[int, tuple[int, ...]]
  place: tuple[int, ...]
  label_map: label_maps.LabelMap | None
  only: bool


def eval_step(
  params: Params,
  batch: Batch,
  *,
  model: Model,
  classes: Classes,
  skip_unlabelled: bool,
  **size: Any,
) -> Sums:
  """Masked sums over one batch of top1 and top5; `params` are the model's and the texts' embeddings [k, e]."""
  _, out = model.apply({"params": params["model"]}, batch["image"], **size)
  alike = jnp.matmul(out["image"], params["texts"].T, precision=jax.lax.Precision.HIGHEST)
  labels, mask = batch["labels"], batch["_mask"]
  if skip_unlabelled:
    mask = mask * (labels > 0).any(axis=-1)
  chosen = labels[:, np.asarray(classes.columns[labels.shape[-1]])]
  if classes.only:
    mask = mask * (chosen > 0).any(axis=-1)
  labels = jnp.zeros(alike.shape, labels.dtype).at[:, np.asarray(classes.place)].max(chosen)
  found = scores(alike, labels, "softmax_xent")
  return masked_sums({metric.name: found[metric.name] for metric in METRICS}, mask)


@final
class ZeroShot:
  """The evaluator; see `zero_shot`."""

  def __init__(
    self,
    model: Model,
    mesh: Mesh | None,
    scored: PerSize,
    classes: Classes,
    templates: Sequence[str],
    tokens: Tokens | None,
  ):
    self._model, self._mesh, self._scored = model, mesh, scored
    self._classes, self._templates, self._tokens = classes, templates, tokens
    self._program: embedding.Texts | None = None

  def check(self) -> None:
    """See `Evaluator.check`; labels have to be of as many classes as there are names."""
    self._scored.check()

  def compile(self, params: Params, report: Report = silent) -> None:
    """See `Evaluator.compile`; the text tower has one program, of which `report` is not told.

    Raises:
      UserError: it is not known how texts become tokens.
    """
    if self._tokens is None:
      raise errors.UserError(
        "Zero-shot classification needs the tokenizer of the text tower. A run has it from tokenize(...) in input.pp, a"
        " checkpoint from its run; this one has none."
      )
    n = min(ROWS, len(self._classes.texts))
    self._rows = -(-n // self._mesh.size) * self._mesh.size
    sentences = (prompts.sentence(t, x) for t in self._templates for x in self._classes.texts)
    self._cut = sum(self._tokens.full_length(one) > self._tokens.length for one in sentences)
    first = self._tokens.encode([prompts.sentence(self._templates[0], self._classes.texts[0])])
    example = np.zeros((self._rows // jax.process_count(), first.shape[1]), np.int32)
    self._program = embedding.Texts(self._model, self._mesh, params, {"texts": example})
    spec = jax.ShapeDtypeStruct(self._shape, jnp.float32, sharding=sharding.replicated(self._mesh))
    self._scored.compile({"model": params, "texts": spec}, report)

  def run(self, params: Params) -> list[Row]:
    """Returns for each size {"seqhw", "top1", "top5", "n"}; accuracies are fractions.

    Where sentences are longer than the text tower takes, also "sentences_cut", how many.
    """
    if self._program is None:
      self.compile(params)
    self._last = self.classifier(params)
    rows = self._scored.run({"model": params, "texts": self._last})
    return [row | ({"sentences_cut": self._cut} if self._cut else {}) for row in rows]

  def costs(self, params: Params, repeats: int = 5) -> list[Row]:
    """Returns what the image tower costs at each size, once the classes are known; see `PerSize.costs`."""
    return self._scored.costs({"model": params, "texts": self._last}, repeats)

  @property
  def _shape(self) -> tuple[int, int]:
    return len(self._classes.texts), int(self._model.outputs["text"].shape[0])

  def classifier(self, params: Params) -> Float32[Array, "k e"]:
    """Returns what stands for each candidate, on every device.

    Raises:
      UserError: embeddings that are not finite.
    """
    total = np.zeros(self._shape)
    for template in self._templates:
      sentences = [prompts.sentence(template, text) for text in self._classes.texts]
      total += np.concatenate([*self._embed(params, sentences)])  # unit vectors
    made = np.float32(unit(total))
    if not np.isfinite(made).all():
      raise errors.UserError(
        "The text tower's embeddings of the classes are not finite; look at the checkpoint."
      )
    return jax.device_put(sharding.replicate(made, self._mesh), sharding.replicated(self._mesh))

  def _embed(self, params: Params, sentences: Sequence[str]) -> Iterator[Float[np.ndarray, "n e"]]:
    mine = self._rows // jax.process_count()
    begin = mine * jax.process_index()
    for start in range(0, len(sentences), self._rows):
      block = sentences[start : start + self._rows]
      tokens = self._tokens.encode(block)
      tokens = np.concatenate([tokens, tokens[:1].repeat(self._rows - len(block), axis=0)])
      found = self._program(params, {"texts": tokens[begin : begin + mine]})
      yield jax.device_get(found["embedded"])[: len(block)]
      heartbeat.beat()


def unit(vectors: Float[np.ndarray, "n e"]) -> Float[np.ndarray, "n e"]:
  """Vectors of length 1; one of zeros stays."""
  return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


def zero_shot(
  model: Model,
  batches: Batches,
  mesh: Mesh | None,
  *,
  class_names: Sequence[str] | None = None,
  tokens: Tokens | None = None,
  seqhw: Sequence[SeqHw] = (),
  stride: Sequence[int] = (),
  depth: Sequence[int] = (),
  names: str | Sequence[str] | None = None,
  templates: str | Sequence[str] = "one",
  canonical: bool = True,
  classes: str | Sequence[str] | None = None,
  candidates: str | Sequence[str] | None = None,
  label_map: str | None = None,
  skip_unlabelled: bool = False,
  same_names: bool = False,
) -> ZeroShot:
  """Evaluates two towers on labelled images whose classes are texts.

  An image is right if any of its labels is the candidate that is most like it (top1) or one of the five (top5).

  Args:
    model: two towers.
    batches: re-iterable, of "image", "labels" (one-hot or multi-hot) and "_mask".
    mesh: where it runs.
    class_names: of the data, in the order of the labels.
    tokens: how texts become tokens; without it nothing but `check` works.
    seqhw, stride, depth: sizes to evaluate, see `per_size.sizes_of`.
    names: of the classes of the labels, in their order: a list, or a file with one a line. Default: the data's own.
    templates: "name", "one" ("a photo of a {}."), "clip_best" (7), "clip_paper" (80), a file with one a line, or a
      list.
    canonical: take the first alias of each name ("tench" of "tench, Tinca tinca"), lower case, blanks for "_" and no
      punctuation, also in templates.
    classes: names of the classes that are scored, a list or a file; images of no such class are left out. Default: all.
    candidates: names that compete, a list or a file; all scored classes are among them, and others may be, seen in
      training or of no image. Default: all names; with `label_map` those that it keeps.
    label_map: a name in `label_maps.LABEL_MAPS`: only its classes are scored. The names are then those of all classes
      of a model (ImageNet-1k's 1000). An image none of whose labels stays is wrong.
    skip_unlabelled: leave images without any label out of the means and of "n", as ReaL labels ask; else they are
      wrong.
    same_names: classes may have the same name; the first of them is then the one that is found.

  Raises:
    UserError: a model that embeds no texts; no names; a name that is empty, twice, or not among the others.
  """
  embedding.check_texts(model)
  own = _names(names, class_names)
  text_of = functools.partial(prompts.class_texts, plain=canonical, repeated=same_names)
  chosen = _chosen(own, text_of, classes, candidates, label_map)
  made = prompts.templates(templates)
  made = tuple(map(prompts.canonical, made)) if canonical else made
  fn = functools.partial(eval_step, model=model, classes=chosen, skip_unlabelled=skip_unlabelled)
  scored = PerSize(
    fn,
    model,
    batches,
    mesh,
    sizes=sizes_of(seqhw, stride, depth),
    inputs=("image", "labels"),
    num_classes=len(own),
    label_map=chosen.label_map,
  )
  return ZeroShot(model, mesh, scored, chosen, made, tokens)


def _names(names: str | Sequence[str] | None, class_names: Sequence[str] | None) -> Sequence[str]:
  if names is not None:
    return prompts.listed(names, "names")
  if not class_names:
    raise errors.UserError(
      "The data name no classes; give names, a list or a file with one a line, in the order of the labels."
    )
  return class_names


def _chosen(
  names: Sequence[str],
  text_of: Callable[[Sequence[str]], tuple[str, ...]],
  classes: str | Sequence[str] | None,
  candidates: str | Sequence[str] | None,
  label_map: str | None,
) -> Classes:
  """Decides which classes are scored, and against which texts; see `zero_shot`."""
  texts = text_of(names)
  chosen = None if label_map is None else label_maps.label_map(label_map)
  if chosen is not None:
    if classes is not None:
      raise errors.UserError(
        f"Got classes and label_map={label_map!r}, which both say what is scored; give one."
      )
    if len(names) != chosen.model_classes:
      raise errors.UserError(
        f"label_map={label_map!r} is of {chosen.model_classes} classes, and there are {len(names)} names; give names of"
        " all of them, a list or a file."
      )
    scored, columns = chosen.columns, chosen.labels
  elif classes is not None:
    asked = text_of(prompts.listed(classes, "classes"))
    scored = tuple(_place(text, texts, "class", "names") for text in asked)
    columns = {len(names): scored}
  else:
    scored = tuple(range(len(names)))
    columns = {len(names): scored}
  if candidates is not None:
    rivals = text_of(prompts.listed(candidates, "candidates"))
    place = tuple(_place(texts[k], rivals, "scored class", "candidates") for k in scored)
  elif chosen is not None:
    rivals, place = tuple(texts[k] for k in scored), tuple(range(len(scored)))
  else:
    rivals, place = texts, scored
  return Classes(rivals, columns, place, chosen, only=classes is not None)


def _place(text: str, among: Sequence[str], kind: str, where: str) -> int:
  if text not in among:
    raise errors.UserError(
      f"The {kind} {text!r} is not among the {len(among)} {where}.{errors.nearest(text, among)} To score only some"
      " classes, give their names as classes."
    )
  return among.index(text)
