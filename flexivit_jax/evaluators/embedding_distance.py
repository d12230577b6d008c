"""How far a model's embeddings are from those of a frozen teacher at every patch size: for models without classes.

Two things are measured: the cosine between both embeddings of an image, whose mean hides the worst and so has the 5th
percentile beside it; and the neighbours: of the k images that are nearest to an image by the teacher, how many are
among the k nearest by the model. The second needs no common space and is what a search would notice. Where texts are
given as vectors of the same space, also how often both choose the same text.
"""

import functools
from collections.abc import Sequence
from typing import Any, final

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Integer

from flexivit_jax import errors, heartbeat
from flexivit_jax.devices import sharding
from flexivit_jax.evaluators.base import Batches, Report, Row, silent
from flexivit_jax.evaluators.metrics import Metric
from flexivit_jax.evaluators.per_size import PerSize, sizes_of
from flexivit_jax.models import Model
from flexivit_jax.objectives.base import Batch
from flexivit_jax.objectives.distill import Teacher
from flexivit_jax.objectives.distill_embeddings import OUTPUTS, embedding
from flexivit_jax.sizes import SeqHw
from flexivit_jax.trees import Params

METRICS = (
  Metric("cosine", title="cosine to the teacher's embedding"),
  Metric("cosine_p5", label="cosine, 5th percentile", title="5th percentile of the cosine"),
  Metric("neighbours", unit="%", title="nearest neighbours in common with the teacher"),
  Metric("zero_shot", "max", "binomial", "%", title="same text as the teacher", needs="anchors"),
)
_ROWS = 1024  # images whose similarities to all others are in memory at once

Vectors = Float[np.ndarray, "n d"]


def eval_step(
  params: Params, batch: Batch, *, model: Model, mesh: Mesh | None, output: str, **size: Any
) -> dict[str, jax.Array]:
  """Both embeddings and the mask of one batch, whole on every device, so that every process can read them."""
  _, out = model.apply({"params": params}, batch["image"], **size)
  made = {"ours": out[output].astype(jnp.float32), "target": batch["target"].astype(jnp.float32)}
  return jax.lax.with_sharding_constraint(
    made | {"_mask": batch["_mask"]}, sharding.replicated(mesh)
  )


@final
class EmbeddingDistance:
  """An evaluator with the interface of `PerSize`, which makes the embeddings; the host compares them at the end.

  Args:
    features: gives what `eval_step` returns.
    k: neighbours of each image.
    anchors: vectors [m, d] among which the nearest is chosen; None: there are none.
  """

  def __init__(self, features: PerSize, k: int, anchors: np.ndarray | None = None):
    self.features, self.k, self.anchors = features, k, anchors

  def check(self) -> None:
    """See `PerSize.check`."""
    self.features.check()

  def compile(self, params: Params, report: Report = silent) -> None:
    """Compiles a program for each size; see `PerSize.compile`."""
    self.features.compile(params, report)

  def run(self, params: Params) -> list[Row]:
    """Returns for each size {"seqhw", "cosine", "cosine_p5", "neighbours" (a fraction), "n"}, with anchors "zero_shot".

    Raises:
      UserError: no more images than neighbours; an embedding that is not finite.
    """
    ours: dict[Any, list] = {key: [] for key in self.features.sizes}
    targets = []
    for outputs in self.features.outputs(params, self.features.batches):
      host = jax.device_get(outputs)
      for key, made in host.items():
        ours[key].append(made["ours"][made["_mask"] > 0])
      first = next(iter(host.values()))
      targets.append(first["target"][first["_mask"] > 0])
    target = unit(np.concatenate(targets))
    if len(target) <= self.k:
      raise errors.UserError(
        f"{len(target)} images have no {self.k} neighbours each; give more images, or a smaller k."
      )
    nearest = neighbours(target, self.k)
    rows = []
    for key, size in self.features.sizes.items():
      vectors = unit(np.concatenate(ours[key]))
      scores = self._scores(vectors, target, nearest)
      rows.append({**self.features.names(size), **scores, "n": len(target)})
    return rows

  def _scores(
    self,
    ours: Float[np.ndarray, "n d"],
    target: Float[np.ndarray, "n e"],
    nearest: Integer[np.ndarray, "n k"],
  ) -> dict[str, float]:
    same = in_common(neighbours(ours, self.k), nearest).mean()
    if ours.shape != target.shape:  # two spaces: there is no angle between them
      return {"neighbours": float(same)}
    cosine = (ours.astype(np.float64) * target).sum(axis=-1)
    low = np.percentile(cosine, 5)
    row = {"cosine": float(cosine.mean()), "cosine_p5": float(low), "neighbours": float(same)}
    if self.anchors is not None:
      chosen, expected = ((x @ self.anchors.T).argmax(axis=-1) for x in (ours, target))
      row["zero_shot"] = float((chosen == expected).mean())
    return row

  def costs(self, params: Params, repeats: int = 5) -> list[Row]:
    """See `PerSize.costs`."""
    return self.features.costs(params, repeats)


def unit(x: Vectors) -> Vectors:
  """Vectors of length 1.

  Raises:
    UserError: a number that is not finite.
  """
  if not np.isfinite(x).all():
    raise errors.UserError("Embeddings are not finite; look at the checkpoint and the images.")
  return (x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)).astype(np.float32)


def neighbours(x: Vectors, k: int) -> Integer[np.ndarray, "n k"]:
  """The k others that are most alike to each of the vectors of length 1; of equal ones, the first."""
  parts = []
  for start in range(0, len(x), _ROWS):
    block = x[start : start + _ROWS]
    similarity = block @ x.T
    similarity[np.arange(len(block)), start + np.arange(len(block))] = -np.inf
    parts.append(np.argsort(-similarity, axis=-1, kind="stable")[:, :k])
    heartbeat.beat()
  return np.concatenate(parts)


def in_common(
  a: Integer[np.ndarray, "n k"], b: Integer[np.ndarray, "n k"]
) -> Float[np.ndarray, "n"]:
  """The share of each row's numbers that the same row of the other has too."""
  return (a[:, :, None] == b[:, None]).any(axis=-1).mean(axis=-1)


def embedding_distance(
  model: Model,
  batches: Batches,
  mesh: Mesh | None,
  *,
  teacher: Teacher,
  seqhw: Sequence[SeqHw] = (),
  stride: Sequence[int] = (),
  depth: Sequence[int] = (),
  output: str = "pre_logits",
  k: int = 5,
  anchors: Sequence[Sequence[float]] | None = None,
) -> EmbeddingDistance:
  """Compares a model's embeddings with a teacher's, on images that need no labels. The teacher runs once for all sizes.

  The host holds the embeddings of all images at all sizes.

  Args:
    model: the model.
    batches: re-iterable, of "image", the teacher's image (`teacher.image`) and "_mask".
    mesh: where it runs.
    teacher: the model to compare with, at its own size.
    seqhw, stride, depth: sizes to evaluate, see `per_size.sizes_of`.
    output: of both models, see `objectives.distill_embeddings`; of other lengths, only neighbours are compared.
    k: neighbours of each image.
    anchors: embeddings of texts in the space of the teacher's: how often the model is nearest to the same one.

  Raises:
    UserError: k below 1; anchors of another length; an output that one of the models does not give.
  """
  if output not in OUTPUTS:
    raise errors.unknown("output", output, OUTPUTS)
  if k < 1:
    raise errors.UserError(f"k={k}; expected at least 1.")
  for name, one in (("The teacher", teacher.model), ("The model", model)):
    if output not in one.outputs:
      raise errors.UserError(f"{name} gives {sorted(one.outputs)}, no {output!r}.")
  # Without its parameters: they are an argument, not a constant of the program.
  once = functools.partial(_with_target, teacher._replace(params=None), output)
  fn = functools.partial(eval_step, model=model, mesh=mesh, output=output)
  inputs = tuple(dict.fromkeys(("image", teacher.image)))
  sizes = sizes_of(seqhw, stride, depth)
  features = PerSize(
    fn, model, batches, mesh, sizes=sizes, inputs=inputs, once=once, frozen=teacher.params
  )
  if anchors is None:
    return EmbeddingDistance(features, k)
  texts = unit(np.asarray(anchors, np.float32))
  if texts.shape[-1:] != (length := teacher.model.outputs[output].shape):
    raise errors.UserError(
      f"anchors of shape {list(texts.shape)}; expected vectors of {length[0]}."
    )
  return EmbeddingDistance(features, k, texts)


def _with_target(teacher: Teacher, output: str, frozen: Any, batch: Batch) -> dict[str, jax.Array]:
  """The batch with the teacher's embedding under "target"; its image is not needed any more."""
  images = {k: v for k, v in batch.items() if k != teacher.image or k == "image"}
  return images | {"target": embedding(teacher, frozen, batch, output)}
