"""One training step, as a pure function that is compiled once for each patch size."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from flexivit_jax.objectives.base import Batch, Objective


class TrainState(NamedTuple):
  """All that changes from step to step. `step` counts the updates done."""

  step: jax.Array
  params: Any
  opt_state: Any


def init_params(
  model: nn.Module, image_shape: tuple[int, ...], seed: int, head_bias: float | None = None
) -> dict:
  """Random parameters; `head_bias` fills the head's bias (-10 for sigmoid losses over many classes)."""
  image = jnp.zeros((1, *image_shape), jnp.float32)
  # The kernel's own size need not divide the image; parameters do not depend on the size in use.
  params = model.init(jax.random.fold_in(jax.random.key(seed), 0), image, seqhw=1)["params"]
  if head_bias is not None:
    params["head"]["bias"] = jnp.full_like(params["head"]["bias"], head_bias)
  return params


def step(
  state: TrainState,
  batch: Batch,
  frozen: Any = (),
  *,
  model: nn.Module,
  objective: Objective,
  tx: optax.GradientTransformation,
  seed: int,
  accumulate: int = 1,
  **size: Any,
) -> tuple[TrainState, dict[str, jax.Array]]:
  """One update at one patch size.

  Args:
    state: its memory may be donated.
    batch: "image" `[n, h, w, c]` and what else the objective takes; may hold more, which is ignored.
    frozen: the objective's, as an argument so that it is no constant of the program of each size.
    model: gives the logits as the first of two outputs.
    objective: what to minimise, see `objectives.base`.
    tx: the optimizer.
    seed: all randomness is a function of it and of `state.step`.
    accumulate: number of parts, run one after the other, whose gradients are averaged.
    **size: static arguments of the model, e.g. `seqhw=15`.

  Returns:
    The next state, and "loss", "grad_norm" and "param_norm" (of the next state) as float32 scalars.
  """
  key = jax.random.fold_in(jax.random.key(seed), state.step + 1)  # 0 is the initialisation's
  mix_key, dropout_key = jax.random.split(key)
  prepared = objective.prepare(batch, mix_key)

  def mean_loss(params: Any, part: Batch, key: jax.Array) -> jax.Array:
    def predict(image: jax.Array) -> jax.Array:
      rngs = {"dropout": key}
      return model.apply({"params": params}, image, train=True, rngs=rngs, **size)[0]

    return objective.loss(predict, part, frozen).mean()

  loss, grads = _accumulated(jax.value_and_grad(mean_loss), accumulate)(
    state.params, prepared, dropout_key
  )
  updates, opt_state = tx.update(grads, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  norms = {"grad_norm": optax.tree.norm(grads), "param_norm": optax.tree.norm(params)}
  return TrainState(state.step + 1, params, opt_state), {"loss": loss, **norms}


def _accumulated(value_and_grad: Callable, parts: int) -> Callable:
  """The mean of `value_and_grad(params, part, key)` over `parts` equal parts of the batch, one at a time."""
  if parts == 1:
    return value_and_grad

  def run(params: Any, batch: Any, key: jax.Array) -> Any:
    # Interleaved, so that each device's share of the batch is divided where it is.
    split = jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), batch)

    def body(total: Any, xs: Any) -> tuple[Any, None]:
      part, i = xs
      return jax.tree.map(
        jnp.add, total, value_and_grad(params, part, jax.random.fold_in(key, i))
      ), None

    zeros = jax.tree.map(jnp.zeros_like, (jnp.float32(0), params))
    total, _ = jax.lax.scan(body, zeros, (split, jnp.arange(parts)))
    return jax.tree.map(lambda x: x / parts, total)

  return run
