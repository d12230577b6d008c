"""The interface between the trainer and an objective."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax

from flexivit_jax import errors
from flexivit_jax.objectives import losses
from flexivit_jax.trees import Tree

Batch = Mapping[str, Any]
"""Arrays [n, ...] by name; of an objective with teachers also "targets", their part of it."""


Predict = Callable[..., jax.Array]
"""The model in training, as an objective sees it: `predict(image, *, fixed=False, **size)` gives the logits [n, k] at
the size drawn, or at `size`; with `fixed` as in inference and without gradient, by the EMA of the weights if
the objective has one."""

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
    inputs: keys of the batch that it takes.
    prepare: `(batch, key) -> batch`, on the whole global batch, with the key of `Objective.prepare`.
    targets: `(frozen, batch) -> tree of arrays [n, ...]`, on any part of it; pure.
    frozen: arrays that it takes and nothing trains: parameters. In no checkpoint.
  """

  inputs: tuple[str, ...]
  prepare: Callable[[Batch, jax.Array], Batch]
  targets: Callable[[Tree, Batch], Tree]
  frozen: Tree


class Objective(NamedTuple):
  """What a training step minimises: pure functions, and what they need.

  Attributes:
    inputs: keys of the batch that it takes; nothing else reaches the device.
    prepare: `(batch, key) -> batch`, on the whole global batch: mixup and the like.
    loss: `(predict, batch) -> [n]`, on any part of it.
    teaching: makes batch["targets"], where there are teachers.
    ema: decay of an EMA of the weights, which is then part of the training state; None: no EMA.
    also: static arguments of each further forward pass of a step, `predict(..., fixed=True)`; for counting FLOPs.
  """

  inputs: tuple[str, ...]
  prepare: Callable[[Batch, jax.Array], Batch]
  loss: Callable[[Predict, Batch], jax.Array]
  teaching: Teaching | None = None
  ema: float | None = None
  also: tuple[Mapping[str, Any], ...] = ()
