"""The interface between the trainer and an objective."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax

Batch = Mapping[str, jax.Array]
Predict = Callable[[jax.Array], jax.Array]


class Objective(NamedTuple):
  """Two pure functions.

  Attributes:
    prepare: `(batch, key) -> batch`, on the whole global batch: mixup and the like.
    loss: `(predict, batch) -> [n]`, on any part of it; `predict(image)` gives the logits of the model in training.
  """

  prepare: Callable[[Batch, jax.Array], Batch]
  loss: Callable[[Predict, Batch], jax.Array]
