"""One training step, as pure functions: the gradients at a patch size, and the update, which knows no size."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from flexivit_jax.objectives.base import Batch, Objective, Teaching
from flexivit_jax.trees import Params, Tree


class TrainState(NamedTuple):
  """All that changes from step to step. `step` counts the updates done; `ema` is None where no objective needs it."""

  step: jax.Array
  params: Tree
  opt_state: Tree
  ema: Tree | None = None


def init_params(
  model: nn.Module,
  image_shape: tuple[int, ...],
  seed: int | jax.Array,
  head_bias: float | None = None,
) -> dict:
  """Random parameters; `head_bias` fills the head's bias (-10 for sigmoid losses over many classes)."""
  image = jnp.zeros((1, *image_shape), jnp.float32)
  # The kernel's own size need not divide the image; parameters do not depend on the size in use.
  params = model.init(jax.random.fold_in(jax.random.key(seed), 0), image, seqhw=1)["params"]
  if head_bias is not None:
    params["head"]["bias"] = jnp.full_like(params["head"]["bias"], head_bias)
  return params


def init_state(params: Tree, tx: optax.GradientTransformation, objective: Objective) -> TrainState:
  """The state before the first step."""
  ema = None if objective.ema is None else jax.tree.map(jnp.copy, params)
  return TrainState(jnp.int32(0), params, tx.init(params), ema)


def gradients(
  state: TrainState,
  batch: Batch,
  *,
  model: nn.Module,
  objective: Objective,
  seed: int | jax.Array,
  accumulate: int = 1,
  **size: Any,
) -> tuple[jax.Array, Tree]:
  """The part of a training step that is another program for each patch size.

  Args:
    state: its optimizer's part is not used.
    batch: "image" `[n, h, w, c]` and what else the objective takes; may hold more, which is ignored.
    model: gives the logits as the first of two outputs.
    objective: what to minimise, see `objectives.base`.
    seed: all randomness is a function of it and of `state.step`. An array where one program is to serve other seeds.
    accumulate: number of microbatches, run one after the other, whose gradients are averaged.
    **size: static arguments of the model, e.g. `seqhw=15`.

  Returns:
    The mean loss over the batch and its gradients with respect to the parameters.
  """
  mix_key, dropout_key = _keys(seed, state.step)
  prepared = objective.prepare(batch, mix_key)

  def mean_loss(params: Tree, microbatch: Batch, key: jax.Array) -> jax.Array:
    def predict(image: jax.Array, *, fixed: bool = False, **other: Any) -> jax.Array:
      if fixed:
        known = {"params": params if state.ema is None else state.ema}
        return jax.lax.stop_gradient(model.apply(known, image, **(other or size))[0])
      rngs = {"dropout": key}
      return model.apply({"params": params}, image, train=True, rngs=rngs, **(other or size))[0]

    return objective.loss(predict, microbatch).mean()

  return _accumulated(jax.value_and_grad(mean_loss), accumulate)(
    state.params, prepared, dropout_key
  )


def update(
  state: TrainState,
  loss: jax.Array,
  grads: Tree,
  *,
  objective: Objective,
  tx: optax.GradientTransformationExtraArgs,
  total_steps: jax.Array | None = None,
  skip_above: float | None = None,
  scale: jax.Array | None = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
  """The part of a training step that is one program for all patch sizes: two thirds of what there is to compile.

  Args:
    state: its memory may be donated.
    loss, grads: of `gradients`.
    objective: says whether the state has an EMA of the weights.
    tx: the optimizer.
    total_steps: of the run, for the schedules of `tx`, where one program is to serve runs of other lengths; None: what
      `tx` was made with.
    skip_above: a gradient whose norm is larger, or not finite, changes nothing but `state.step`, to the bit; and
      "skipped" is then 1. None: nothing is skipped.
    scale: by what the update is multiplied; None: by nothing.

  Returns:
    The next state, and "loss", "grad_norm" and "param_norm" (of the next state) as float32 scalars.
  """
  length = {} if total_steps is None else {"total_steps": total_steps}
  updates, opt_state = tx.update(grads, state.opt_state, state.params, **length)
  if scale is not None:
    updates = jax.tree.map(lambda u: u * scale.astype(u.dtype), updates)
  params = optax.apply_updates(state.params, updates)
  ema = None if objective.ema is None else update_ema(state.ema, params, objective.ema, state.step)
  new = TrainState(state.step + 1, params, opt_state, ema)
  measured = {"loss": loss, "grad_norm": optax.tree.norm(grads)}
  if skip_above is not None:
    good = jnp.isfinite(loss) & (measured["grad_norm"] <= skip_above)  # false for NaN
    new = jax.tree.map(lambda a, b: jnp.where(good, a, b), new, state)._replace(step=new.step)
    measured["skipped"] = 1.0 - good
  return new, {**measured, "param_norm": optax.tree.norm(new.params)}


def step(
  state: TrainState,
  batch: Batch,
  *,
  model: nn.Module,
  objective: Objective,
  tx: optax.GradientTransformationExtraArgs,
  seed: int | jax.Array,
  total_steps: jax.Array | None = None,
  accumulate: int = 1,
  **size: Any,
) -> tuple[TrainState, dict[str, jax.Array]]:
  """One update at one patch size: `update` with `gradients`, whose arguments and results these are."""
  loss, grads = gradients(
    state, batch, model=model, objective=objective, seed=seed, accumulate=accumulate, **size
  )
  return update(state, loss, grads, objective=objective, tx=tx, total_steps=total_steps)


def update_ema(ema: Params, params: Params, decay: float | jax.Array, step: jax.Array) -> Params:
  """Returns the EMA of the weights after one more update.

  Args:
    ema: before; at first the initial weights.
    params: after the update.
    decay: the weight of the past, in the first steps at most (1 + step) / (10 + step), so that the EMA forgets the
      initial weights. Source of that factor: TensorFlow's ExponentialMovingAverage.
    step: number of updates before this one.
  """
  decay = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
  return jax.tree.map(lambda m, p: m + (1.0 - decay) * (p - m), ema, params)


def targets(
  step: jax.Array,
  batch: Batch,
  frozen: Tree,
  *,
  teaching: Teaching,
  seed: int | jax.Array,
  accumulate: int = 1,
) -> Tree:
  """What the objective's teachers say of a batch: batch["targets"] of the step after `step` updates.

  A program of its own, the same for all sizes, so that the teachers are compiled once; and a step whose targets were
  kept is the same program on the same numbers.

  Args:
    step: `state.step` of the step that they are for.
    batch: what `teaching.inputs` names, as it comes from the data: mixup is done here as in the step.
    frozen: `teaching.frozen`, as an argument so that it is no constant of the program.
    teaching: see `objectives.base`.
    seed: as in `step`.
    accumulate: number of microbatches that are computed one after the other: less memory, the same numbers.
  """
  mix_key, _ = _keys(seed, step)
  prepared = teaching.prepare(batch, mix_key)
  if accumulate == 1:
    return teaching.targets(frozen, prepared)
  made = jax.lax.map(functools.partial(teaching.targets, frozen), _split(prepared, accumulate))
  return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), made)


def _keys(seed: int | jax.Array, step: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The keys of mixup and dropout."""
  key = jax.random.fold_in(jax.random.key(seed), step + 1)  # 0 is the initialisation's
  mix_key, dropout_key = jax.random.split(key)
  return mix_key, dropout_key


def _accumulated(value_and_grad: Callable, microbatches: int) -> Callable:
  """The mean of `value_and_grad(params, microbatch, key)` over equal microbatches, one at a time."""
  if microbatches == 1:
    return value_and_grad

  def run(params: Tree, batch: Tree, key: jax.Array) -> Tree:
    split = _split(batch, microbatches)

    def body(total: Tree, xs: Tree) -> tuple[Tree, None]:
      microbatch, i = xs
      return jax.tree.map(
        jnp.add, total, value_and_grad(params, microbatch, jax.random.fold_in(key, i))
      ), None

    zeros = jax.tree.map(jnp.zeros_like, (jnp.float32(0), params))
    total, _ = jax.lax.scan(body, zeros, (split, jnp.arange(microbatches)))
    return jax.tree.map(lambda x: x / microbatches, total)

  return run


def _split(batch: Tree, microbatches: int) -> Tree:
  """Arrays [n, ...] as [microbatches, n / microbatches, ...], interleaved: each device divides its own share."""
  return jax.tree.map(lambda x: x.reshape(-1, microbatches, *x.shape[1:]).swapaxes(0, 1), batch)
