"""The names of classes as queries of an open-vocabulary detector: embedded once, for all images and sizes.

Scores are means of the logits over templates (OWL-ViT, arXiv 2205.06230). A logit is (cosine + shift) * scale with the
token's own shift and scale, so this mean is the logit of the mean of the unit vectors. That mean is not divided by its
length again, as it is for zero-shot classification.
"""

from collections.abc import Sequence
from typing import Any, final

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Float32

from flexivit_jax import errors, heartbeat
from flexivit_jax.data import prompts
from flexivit_jax.data.text import Tokens
from flexivit_jax.devices import compilation, sharding
from flexivit_jax.models import Model
from flexivit_jax.objectives.base import Batch
from flexivit_jax.trees import Params

ROWS = 256  # queries that are embedded at a time


@final
class Queries:
  """What the names of classes are for a model.

  Args:
    model: a detector that is given queries.
    mesh: where it runs.
    names: of the classes, in the order of the logits.
    templates: into which they are put.
    tokens: how texts become tokens; None: not known, or the queries are vectors.
    vectors: of the names [k, d]; None: the queries are texts.
  """

  def __init__(
    self,
    model: Model,
    mesh: Mesh | None,
    names: Sequence[str],
    templates: Sequence[str],
    tokens: Tokens | None,
    vectors: Float32[np.ndarray, "k d"] | None,
  ):
    self._model, self._mesh, self._names = model, mesh, names
    self._templates, self._tokens, self._vectors = templates, tokens, vectors
    self._program: Any = None
    self.cut = 0  # sentences that are longer than the text tower takes

  @property
  def shape(self) -> tuple[int, int]:
    """Of what `embedded` returns: number of classes, length of a vector."""
    return len(self._names), int(self._model.outputs["query_embeddings"].shape[-1])

  def compile(self, params: Params) -> None:
    """Compiles the program that embeds.

    Raises:
      UserError: it is not known how texts become tokens.
    """
    if self._vectors is None and self._tokens is None:
      raise errors.UserError(
        "Names as queries need the tokenizer of the text tower. A run has it from query_tokens(...) in input.pp, a"
        " checkpoint from its run; this one has none."
      )
    if self._tokens is not None:
      sentences = [prompts.sentence(one, name) for one in self._templates for name in self._names]
      self.cut = sum(self._tokens.full_length(one) > self._tokens.length for one in sentences)
    rows = min(ROWS, len(self._names))
    devices, processes = self._mesh.size, jax.process_count()
    self._rows = -(-rows // devices) * devices
    example = self._inputs(self._templates[0])[:1].repeat(self._rows // processes, axis=0)
    specs = sharding.specs({"queries": example[:, None]}, self._mesh)
    self._program = compilation.compile_one(self._embed, (params, specs), "the queries")

  def _embed(self, params: Params, batch: Batch) -> Array:
    embedded, _ = self._model.apply({"params": params}, queries=batch["queries"])
    return jax.lax.with_sharding_constraint(embedded[:, 0], sharding.replicated(self._mesh))

  def _inputs(self, template: str) -> np.ndarray:
    if self._vectors is not None:
      return self._vectors
    assert self._tokens is not None
    return self._tokens.encode([prompts.sentence(template, name) for name in self._names])

  def embedded(self, params: Params) -> Float32[np.ndarray, "k e"]:
    """Returns the mean of each name's vectors over the templates.

    Raises:
      UserError: vectors that are not finite; a name that the model takes for padding.
    """
    if self._program is None:
      self.compile(params)
    total = np.zeros(self.shape)
    for template in self._templates:
      found = self._of(params, self._inputs(template))
      if not np.isfinite(found).all():
        raise errors.UserError("The vectors of the names are not finite; look at the checkpoint.")
      for k in np.flatnonzero((found == 0).all(-1)).tolist():
        raise errors.UserError(
          f"The model takes the name {self._names[k]!r} for padding: its first token, or its vector, is 0."
        )
      total += found
    return (total / len(self._templates)).astype(np.float32)

  def _of(self, params: Params, inputs: np.ndarray) -> Float[np.ndarray, "k e"]:
    mine = self._rows // jax.process_count()
    begin, parts = mine * jax.process_index(), []
    for start in range(0, len(inputs), self._rows):
      block = inputs[start : start + self._rows]
      block = np.concatenate([block, block[:1].repeat(self._rows - len(block), axis=0)])
      batch = sharding.put_batch({"queries": block[begin : begin + mine, None]}, self._mesh)
      parts.append(jax.device_get(self._program.run(params, batch)))
      heartbeat.beat()
    return np.concatenate(parts)[: len(inputs)]
