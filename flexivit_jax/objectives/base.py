"""The interface between the trainer and an objective."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

Batch = Mapping[str, jax.Array]
Predict = Callable[[jax.Array], jax.Array]


class Objective(NamedTuple):
  """What a training step minimises: two pure functions, and what they need.

  Attributes:
    inputs: keys of the batch that it takes; nothing else reaches the device.
    prepare: `(batch, key) -> batch`, on the whole global batch: mixup and the like.
    loss: `(predict, batch, frozen) -> [n]`, on any part of it; `predict(image)` gives the logits of the model in
      training.
    frozen: arrays that the loss takes and nothing trains: a teacher's parameters. In no checkpoint.
  """

  inputs: tuple[str, ...]
  prepare: Callable[[Batch, jax.Array], Batch]
  loss: Callable[[Predict, Batch, Any], jax.Array]
  frozen: Any = ()
