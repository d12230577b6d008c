"""The interface between the trainer and an objective."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from flexivit_jax import errors
from flexivit_jax.objectives import losses
from flexivit_jax.specs import Specs
from flexivit_jax.trees import Tree

Batch = Mapping[str, Any]
"""Arrays [n, ...] by name; of an objective with teachers also "targets", their part of it."""

Outputs = Mapping[str, Any]
"""What a model says of a batch: arrays [n, ...] by name, for example "logits" [n, k]; see `Model.outputs`."""


Predict = Callable[..., Outputs]
"""The model in training, as an objective sees it: `predict(inputs, *, fixed=False, **size)` takes the model's inputs by
name, {"image": batch["image"]}, and returns its outputs at the size drawn, or at `size`; with `fixed` as in inference
and without gradient, by the EMA of the weights if the objective has one."""


class Losses(NamedTuple):
  """The losses of examples, whose mean over the global batch is minimised.

  Attributes:
    total: [n], the loss of each example, summed over what is counted in it: pixels, boxes.
    weight: [n], how many these are; the mean is the sum of `total` by that of `weight`, divided once over all devices
      and microbatches. 0 where nothing in an example counts. None: each example counts 1.
  """

  total: jax.Array
  weight: jax.Array | None = None

  def mean(self) -> jax.Array:
    """Returns the mean; 0 where nothing counts."""
    if self.weight is None:
      return self.total.mean()
    weight = jax.lax.stop_gradient(self.weight).sum()
    return self.total.sum() / jnp.where(weight > 0, weight, 1.0)


ClassWeights = Literal["balanced"] | Sequence[float] | Mapping[str, float] | None
"""In a config: "balanced", a number for each class, or numbers by name; `class_weights.resolve` makes numbers of it."""


def weighted(loss: str, class_weights: ClassWeights) -> Callable[[jax.Array, jax.Array], jax.Array]:
  """See `losses.weighted`.

  Raises:
    UserError: an unknown loss; weights that are not resolved.
  """
  if loss not in losses.LOSSES:
    raise errors.unknown("loss", loss, losses.LOSSES)
  if isinstance(class_weights, str | Mapping):
    raise errors.UserError(f"class_weights={class_weights!r}; expected a number for each class.")
  return losses.weighted(loss, class_weights)


class Teaching(NamedTuple):
  """What does not depend on the student: computed once a step, before it and for all sizes alike, or read from a cache.

  Attributes:
    inputs: what it takes from the batch.
    prepare: `(batch, key) -> batch`, on the whole global batch, with the key of `Objective.prepare`.
    targets: `(frozen, batch) -> tree of arrays [n, ...]`, on any part of it; pure.
    frozen: arrays that it takes and nothing trains: parameters. In no checkpoint.
  """

  inputs: Specs
  prepare: Callable[[Batch, jax.Array], Batch]
  targets: Callable[[Tree, Batch], Tree]
  frozen: Tree


class BatchLoss(NamedTuple):
  """A loss that compares the examples of a batch with each other, in the two parts by which microbatches make it exact.

  Attributes:
    embed: `(predict, batch) -> tree of float arrays [n, ...]`, on any part of the batch: all that the loss takes from
      the model. A parameter that is one number, such as a temperature, is repeated for each example.
    loss: `(embedded, batch) -> Losses`, on the whole global batch.
  """

  embed: Callable[[Predict, Batch], Tree]
  loss: Callable[[Tree, Batch], Losses]


class Objective(NamedTuple):
  """What a training step minimises: pure functions, and what they need.

  Attributes:
    inputs: what it takes from the batch; nothing else reaches the device.
    outputs: names of the model's outputs that it takes.
    prepare: `(batch, key) -> batch`, on the whole global batch: mixup and the like.
    loss: `(predict, batch) -> Losses` where the loss of an example depends on no other one, on any part of the batch;
      or a `BatchLoss` where it does.
    teaching: makes batch["targets"], where there are teachers.
    ema: decay of an EMA of the weights, which is then part of the training state; None: no EMA.
    also: static arguments of each further forward pass of a step, `predict(..., fixed=True)`; for counting FLOPs.
  """

  inputs: Specs
  outputs: tuple[str, ...]
  prepare: Callable[[Batch, jax.Array], Batch]
  loss: Callable[[Predict, Batch], Losses] | BatchLoss
  teaching: Teaching | None = None
  ema: float | None = None
  also: tuple[Mapping[str, Any], ...] = ()

  @property
  def separable(self) -> bool:
    """Whether the loss of an example depends on no other example of the batch."""
    return not isinstance(self.loss, BatchLoss)


def keep(*names: str) -> Callable[[Batch, jax.Array], Batch]:
  """Returns a `prepare` that changes nothing: these arrays of the batch as they are."""
  return lambda batch, key: {name: batch[name] for name in names}
