"""A cascade over images: all at a coarse size, those that it leaves unsure at finer ones, in dense batches.

The images that a stage passes on wait until they fill a batch of the next one, so that time falls and not only FLOPs.
Every batch of a stage has one shape and uses one program: an answer is to the bit that of `predict` at its size and
with its batch size, whatever the other images are.
"""

import collections
import functools
from collections.abc import Callable, Generator, Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Float32, Shaped

from flexivit_jax import errors, trees
from flexivit_jax.budget import cascade as rules
from flexivit_jax.budget.cascade import Cascade
from flexivit_jax.data.inputs import Input
from flexivit_jax.inference import predictions, predictor, programs, texts
from flexivit_jax.inference.predictions import Prediction
from flexivit_jax.running import distributed
from flexivit_jax.sizes import size_args

Run = Callable[[np.ndarray], Any]  # images [batch, h, w, c] -> outputs [batch, d]
Scores = Callable[[Shaped[np.ndarray, "n d"]], Float[np.ndarray, "n k"]]
_WAITS = 256  # batches of answers that wait, at most, for an image that waits for company


class Answer(NamedTuple):
  """What a cascade says of an image: the stage that answers, and the output of its program."""

  stage: int
  output: Shaped[np.ndarray, "d"]


Answered = Iterator[tuple[Hashable, Answer]]


class _Waiting(NamedTuple):
  """An image that waits for a stage, and its scores at the stage before."""

  key: Hashable
  image: Float32[np.ndarray, "h w c"]
  before: Float[np.ndarray, "k"] | None


class Flow:
  """Images on their way through the stages.

  Args:
    cascade: the rule.
    runs: what runs each stage.
    scores: outputs to scores, each row by itself; see `budget.cascade`.
    batch: images of a batch, of every stage.
  """

  def __init__(self, cascade: Cascade, runs: Sequence[Run], scores: Scores, batch: int):
    self._cascade, self._runs, self._scores, self._batch = cascade, runs, scores, batch
    self._queues: list[list[_Waiting]] = [[] for _ in runs]

  def put(self, key: Hashable, image: Float32[np.ndarray, "h w c"]) -> Answered:
    """Yields the answers that the image completes, by their keys, often none and in any order; use them all."""
    yield from self._put(0, _Waiting(key, image, None))

  def flush(self) -> Answered:
    """Yields the answers of all images that still wait."""
    for stage in range(len(self._runs)):
      if self._queues[stage]:
        yield from self._run(stage)

  def _put(self, stage: int, waiting: _Waiting) -> Answered:
    queue = self._queues[stage]
    if queue and queue[0].image.shape != waiting.image.shape:
      yield from self._run(stage)
    self._queues[stage].append(waiting)
    if len(self._queues[stage]) == self._batch:
      yield from self._run(stage)

  def _run(self, stage: int) -> Answered:
    rows, self._queues[stage] = self._queues[stage], []
    images = np.zeros((self._batch, *rows[0].image.shape), np.float32)
    images[: len(rows)] = [row.image for row in rows]
    outputs = np.asarray(self._runs[stage](images))[: len(rows)]
    if stage == len(self._runs) - 1:
      yield from ((row.key, Answer(stage, out)) for row, out in zip(rows, outputs, strict=True))
      return
    stops = ~np.isfinite(outputs).all(axis=1)  # an answer that whoever asks has to refuse
    going = np.flatnonzero(~stops)
    scores = self._scores(outputs[going])
    before = np.stack([rows[i].before for i in going]) if stage and len(going) else None
    stops[going] = self._cascade.stop(stage, scores, before)
    for i, row in enumerate(rows):
      if stops[i]:
        yield row.key, Answer(stage, outputs[i])
    for place, score in zip(going, scores, strict=True):
      if not stops[place]:
        yield from self._put(stage + 1, rows[place]._replace(before=score))


# --- scores ---


def of_probabilities(outputs: Shaped[np.ndarray, "n k"]) -> Float[np.ndarray, "n k"]:
  """Scores of a classifier's outputs, its probabilities."""
  return rules.of_probabilities(outputs)


def of_embeddings(
  among: texts.Names, outputs: Shaped[np.ndarray, "n e"]
) -> Float[np.ndarray, "n k"]:
  """Scores of an image tower's outputs: the products with the names, each row by itself."""
  scores = [among.scores(row) for row in outputs]
  return np.stack(scores) if scores else np.zeros((0, len(among.names)))


def check(
  cascade: Cascade, loaded: predictor.Loaded, among: texts.Names | None, templates: str = ""
) -> None:
  """Compares a cascade with what it is to run on.

  Args:
    cascade: the cascade.
    loaded: the model.
    among: the classes, where they are texts.
    templates: see `Cascade`.

  Raises:
    UserError: it was calibrated with other weights, classes, names or templates.
  """
  digest = trees.digest(loaded.params)
  again = "`flexivit cascade` makes one"
  if cascade.weights != digest:
    raise errors.UserError(
      f"The cascade was calibrated with other weights (sha256 {cascade.weights[:12] or 'unknown'};"
      f" {loaded.name} has {digest[:12]}); {again} for these."
    )
  if (among.names if among else ()) != cascade.names or (
    templates if among else ""
  ) != cascade.templates:
    of = (
      f"the names {','.join(cascade.names)}" if cascade.names else "the classes of the model's head"
    )
    with_templates = f" in the templates {cascade.templates}" if cascade.names else ""
    raise errors.UserError(
      f"The cascade was calibrated for {of}{with_templates}; {again} for others."
    )


# --- files ---


def outcomes(
  loaded: predictor.Loaded,
  cascade: Cascade,
  inputs: Sequence[Input],
  *,
  fn: programs.Fn = programs.probabilities,
  scores: Scores = of_probabilities,
  batch_size: int | None = None,
  way: programs.Way = programs.PLAIN,
) -> Generator[tuple[str, Answer | str], None, None]:
  """Yields (file, its answer, or why there is none) in the order of the inputs.

  Few images are in memory: a batch of each stage. One device computes.

  Args:
    loaded: the model.
    cascade: of its weights; see `check`.
    inputs: files; those with an error are passed on.
    fn: what is wanted of the model's result; pure.
    scores: what `Flow` makes of it.
    batch_size: images at a time; default as of `predictor.outcomes`.
    way: what runs it.

  Raises:
    UserError: a size that does not divide the images; images of another size than those of the calibration; several
      processes.
  """
  n = predictor.checked_batch_size(batch_size)
  if distributed.is_on():
    raise errors.UserError(
      "A cascade runs in one process; start the command once, or give --seqhw."
    )
  params = jax.device_put(loaded.params)
  calls = [programs.call(loaded, fn, size, way) for size in cascade.sizes]
  flow = Flow(cascade, [functools.partial(call, params) for call in calls], scores, n)
  order: collections.deque[tuple[int, str]] = collections.deque()
  found: dict[Hashable, Answer | str] = {}
  for key, (file, image) in enumerate(predictor.prepared(inputs, loaded.prepare, n)):
    order.append((key, file))
    if isinstance(image, str):
      found[key] = image
    else:
      _check_shape(loaded, cascade, image)
      found.update(flow.put(key, image))
    if len(order) > _WAITS * n:
      found.update(flow.flush())
    while order and order[0][0] in found:
      done, of = order.popleft()
      yield of, _finite(found.pop(done))
  found.update(flow.flush())
  for key, file in order:
    yield file, _finite(found[key])


def _finite(answer: Answer | str) -> Answer | str:
  if isinstance(answer, str) or np.isfinite(answer.output).all():
    return answer
  return predictor.NOT_FINITE


def _check_shape(loaded: predictor.Loaded, cascade: Cascade, image: np.ndarray) -> None:
  expected = tuple(cascade.data.get("image", image.shape))
  if image.shape != expected:
    raise errors.UserError(
      f"The cascade was calibrated on images of {expected[0]} x {expected[1]} pixels, these are prepared as"
      f" {image.shape[0]} x {image.shape[1]}; calibrate it on such images, or give --image_size."
    )
  for size in cascade.sizes:
    loaded.model.grid(image.shape[:2], **size_args(size))


def answers(
  loaded: predictor.Loaded,
  cascade: Cascade,
  inputs: Sequence[Input],
  k: int = 5,
  batch_size: int | None = None,
  among: texts.Names | None = None,
  way: programs.Way = programs.PLAIN,
) -> Generator[tuple[str, list[Prediction]], None, None]:
  """Yields (file, its one prediction at the size that answers) in order, as `predictions.predictions` does.

  Args:
    loaded: the model; with `among` two towers.
    cascade: of its weights; see `check`.
    inputs: the files.
    k: how many classes.
    batch_size, way: see `outcomes`.
    among: the classes, where they are texts; None: those of the model's head.
  """
  names = predictor.names_of(loaded) if among is None else among.names
  fn: programs.Fn = programs.probabilities
  scores: Scores = of_probabilities
  if among is not None:
    fn, scores = texts.embedding, functools.partial(of_embeddings, among)
  stream = outcomes(loaded, cascade, inputs, fn=fn, scores=scores, batch_size=batch_size, way=way)
  for file, answer in stream:
    if isinstance(answer, str):
      yield file, [Prediction(file, error=answer)]
      continue
    p = answer.output if among is None else among.probabilities(answer.output)
    yield (
      file,
      [Prediction(file, cascade.sizes[answer.stage], predictions.most_likely(p, names, k))],
    )
