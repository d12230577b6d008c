"""A cascade in the queues: an image that a stage leaves unsure waits for the next one, among all others there."""

import functools

import numpy as np

from flexivit_jax import errors
from flexivit_jax.budget.cascade import Cascade
from flexivit_jax.inference import cascades, texts
from flexivit_jax.serving.engine import Answer, Engine
from flexivit_jax.serving.queues import Lane


def check(cascade: Cascade, weights: str, shape: tuple[int, ...]) -> Cascade:
  """Returns a cascade that fits the weights and the shape of their images; raises a UserError for another."""
  again = "`flexivit cascade` makes one"
  if cascade.weights != weights:
    raise errors.UserError(f"The cascade was calibrated with other weights; {again} for these.")
  expected = tuple(cascade.data.get("image", shape))
  if expected != tuple(shape):
    raise errors.UserError(
      f"The cascade was calibrated on images of {expected}, these are {shape}; {again} for these."
    )
  return cascade


def scores_of(cascade: Cascade, among: texts.Names | None, templates: str) -> cascades.Scores:
  """Returns what makes scores of a program's outputs; raises a UserError for other classes than the cascade's."""
  if (among.names if among else ()) != cascade.names or (among and templates != cascade.templates):
    of = f"names={','.join(cascade.names)}" if cascade.names else "the classes of the model's head"
    with_templates = f" and templates={cascade.templates}" if cascade.names else ""
    raise errors.UserError(f"the cascade was calibrated for {of}{with_templates}")
  return functools.partial(cascades.of_embeddings, among) if among else cascades.of_probabilities


async def answer(
  engine: Engine, cascade: Cascade, scores_of: cascades.Scores, image: np.ndarray, deadline: float
) -> Answer:
  """Returns the answer of the stage that is sure, with the milliseconds of all stages before.

  Raises:
    see `Engine.answer`; a deadline may pass between two stages.
  """
  before, ms, wait_ms = None, 0.0, 0.0
  for stage, size in enumerate(cascade.sizes):
    found = await engine.answer(Lane("predict", size), image, deadline, again=stage > 0)
    ms, wait_ms = ms + found.ms, wait_ms + found.wait_ms
    scores = scores_of(found.output[None])
    if cascade.stop(stage, scores, before)[0]:
      break
    before = scores
  return found._replace(ms=ms, wait_ms=wait_ms)


def first_lane(cascade: Cascade) -> Lane:
  """Where every image of a cascade waits first."""
  return Lane("predict", cascade.sizes[0])
