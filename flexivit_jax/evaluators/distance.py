"""How far a model is from a frozen teacher at every patch size: agreement and distances of their logits."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from flexivit_jax import errors
from flexivit_jax.evaluators import intervals, metrics
from flexivit_jax.evaluators.base import Batches
from flexivit_jax.evaluators.classification import scores
from flexivit_jax.evaluators.metrics import Metric
from flexivit_jax.evaluators.per_size import PerSize, sizes_of
from flexivit_jax.evaluators.sums import Sums, masked_sums
from flexivit_jax.models import Model
from flexivit_jax.objectives import losses
from flexivit_jax.objectives.base import Batch
from flexivit_jax.objectives.distill import Teacher, teach
from flexivit_jax.sizes import SeqHw
from flexivit_jax.trees import Params

METRICS = (
  metrics.TOP1._replace(needs="labels"),
  metrics.TOP5._replace(needs="labels"),
  Metric("agree1", "max", "binomial", "%", title="agreement with the teacher"),
  Metric("agree5", "max", "binomial", "%", title="agreement with the teacher, of the first 5"),
  metrics.LOSS._replace(needs="labels"),
  Metric("kl", "min", "bootstrap", "nats", title="KL divergence from the teacher"),
  Metric("logsoftmax_euclidean", "min", "bootstrap", "nats", title="distance of the log-softmax"),
)


def eval_step(params: Params, batch: Batch, *, model: Model, **size: Any) -> Sums:
  """Masked sums over one batch: agree1, agree5 (the teacher's class is among the first 1, 5), and `DISTANCES`.

  Where the batch has labels also top1, top5 and loss, as in `classification`.
  """
  logits, _ = model.apply({"params": params}, batch["image"], **size)
  target = batch["target"]
  same = jax.lax.top_k(logits, min(5, logits.shape[-1]))[1] == target.argmax(axis=-1, keepdims=True)
  values = {"agree1": same[:, 0] * 1.0, "agree5": same.any(axis=-1) * 1.0}
  distances = {name: distance(logits, target) for name, distance in losses.DISTANCES.items()}
  values |= distances
  if "labels" in batch:
    values |= scores(logits, batch["labels"], "softmax_xent")
  return masked_sums(values, batch["_mask"])._replace(per_image=distances)


def distance(
  model: Model,
  batches: Batches,
  mesh: Mesh | None,
  *,
  teacher: Teacher,
  seqhw: Sequence[SeqHw] = (),
  stride: Sequence[int] = (),
  depth: Sequence[int] = (),
  labels: bool = False,
) -> PerSize:
  """Compares a model with a teacher, on images that need no labels. The teacher runs once for all sizes.

  Args:
    model: the model; its first output are logits.
    batches: re-iterable, of "image", the teacher's image (`teacher.image`) and "_mask".
    mesh: where it runs.
    teacher: of the same classes.
    seqhw, stride, depth: sizes to evaluate, see `per_size.sizes_of`.
    labels: whether the batches have "labels", which are then used too.

  Raises:
    UserError: the teacher has another number of classes.
  """
  if teacher.model.num_classes != model.num_classes:
    raise errors.UserError(
      f"The teacher has {teacher.model.num_classes} classes, the model {model.num_classes}."
    )
  # Without its parameters: they are an argument, not a constant of the program.
  once = functools.partial(_with_target, teacher._replace(params=None))
  inputs = dict.fromkeys(("image", teacher.image, *(("labels",) if labels else ())))
  fn = functools.partial(eval_step, model=model)
  return PerSize(
    fn,
    model,
    batches,
    mesh,
    sizes=sizes_of(seqhw, stride, depth),
    inputs=tuple(inputs),
    once=once,
    frozen=teacher.params,
    resampled=dict.fromkeys(losses.DISTANCES, intervals.mean),
  )


def _with_target(teacher: Teacher, frozen: Any, batch: Batch) -> dict[str, jax.Array]:
  """The batch with the teacher's logits under "target"; its image is not needed any more."""
  images = {k: v for k, v in batch.items() if k != teacher.image or k == "image"}
  return images | {"target": teach(teacher, frozen, batch)}
