"""One training step, as pure functions: the gradients at a patch size, and the update, which knows no size."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from flexivit_jax.devices import sharding
from flexivit_jax.errors import UserError
from flexivit_jax.objectives.base import (
  Batch,
  BatchLoss,
  Losses,
  Objective,
  Predict,
  Teaching,
)
from flexivit_jax.sizes import SizeArgs
from flexivit_jax.specs import Shapes
from flexivit_jax.trees import Params, Tree


class TrainState(NamedTuple):
  """All that changes from step to step. `step` counts the updates done; `ema` is None where no objective needs it."""

  step: jax.Array
  params: Tree
  opt_state: Tree
  ema: Tree | None = None


def init_params(model: nn.Module, shapes: Shapes, seed: int | jax.Array) -> Params:
  """Random parameters, by the model's own initialisers; `shapes` are those of its inputs, of one example each."""
  inputs, size = model.example(shapes)
  key = jax.random.fold_in(jax.random.key(seed), 0)
  return model.init(key, **inputs, **size)["params"]


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
  clip_each: float | None = None,
  frozen: Tree | None = None,
  **size: Any,
) -> tuple[jax.Array, Tree]:
  """The part of a training step that is another program for each patch size.

  Args:
    state: its optimizer's part is not used.
    batch: arrays `[n, ...]` by name; what `objective.inputs` names, and "targets" if there are teachers. May hold more,
      which is ignored.
    model: gives its outputs by name as the second of two results.
    objective: what to minimise, see `objectives.base`.
    seed: all randomness is a function of it and of `state.step`. An array where one program is to serve other seeds.
    accumulate: number of microbatches, run one after the other. Their gradients add up to those of the whole batch.
    clip_each: largest norm of the gradient of one example; None: no limit.
    frozen: tree of bools, the parameters that do not move: their gradients are zeros, and no backward pass goes
      through what only they are part of. None: none.
    **size: static arguments of the model, e.g. `seqhw=15`.

  Returns:
    The mean loss over the batch and its gradients with respect to the parameters.
  """
  mix_key, dropout_key = _keys(seed, state.step)
  prepared = objective.prepare(batch, mix_key)
  if clip_each is not None and getattr(model, "fsdp", None) is not None:
    # Its blocks divide the batch by hand, and one example cannot be divided: XLA gathers the parameters instead.
    model = model.clone(fsdp=None)
  predict_of = functools.partial(_predict, model, state, size, frozen)
  if isinstance(objective.loss, BatchLoss):
    run = _in_two_passes(objective.loss, predict_of, accumulate)
  elif clip_each is not None:
    run = _accumulated(_clipped_each(objective.loss, predict_of, clip_each), accumulate)
  else:
    run = _accumulated(
      jax.value_and_grad(_sums(objective.loss, predict_of), has_aux=True), accumulate
    )
  return run(state.params, prepared, dropout_key)


def _predict(
  model: nn.Module,
  state: TrainState,
  size: SizeArgs,
  frozen: Tree | None,
  params: Tree,
  key: jax.Array,
) -> Predict:
  """The model of these parameters, as an objective sees it."""
  if frozen is not None:
    params = jax.tree.map(lambda p, still: jax.lax.stop_gradient(p) if still else p, params, frozen)

  def predict(
    inputs: Mapping[str, jax.Array], *, fixed: bool = False, **other: Any
  ) -> Mapping[str, Any]:
    options = other or size
    if fixed:
      known = {"params": params if state.ema is None else state.ema}
      return jax.lax.stop_gradient(model.apply(known, **inputs, **options)[1])
    rngs = {"dropout": key}
    return model.apply({"params": params}, **inputs, train=True, rngs=rngs, **options)[1]

  return predict


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
  return _joined(made)


def _keys(seed: int | jax.Array, step: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The keys of mixup and dropout."""
  key = jax.random.fold_in(jax.random.key(seed), step + 1)  # 0 is the initialisation's
  mix_key, dropout_key = jax.random.split(key)
  return mix_key, dropout_key


PredictOf = Callable[[Tree, jax.Array], Predict]  # (parameters, key of dropout)


def _sums(loss: Callable[[Predict, Batch], Losses], predict_of: PredictOf) -> Callable[..., Tree]:
  """Returns `(params, microbatch, key) -> (loss, weight)`: the mean and None, or sums where examples have weights."""

  def run(params: Tree, microbatch: Batch, key: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    losses = loss(predict_of(params, key), microbatch)
    if losses.weight is None:
      return losses.total.mean(), None
    return losses.total.sum(), jax.lax.stop_gradient(losses.weight).sum()

  return run


def _accumulated(value_and_grad: Callable, microbatches: int) -> Callable:
  """The mean over equal microbatches, one at a time; where examples have weights, their sum divides once, at the end.

  Args:
    value_and_grad: `(params, microbatch, key) -> ((loss, weight), grads)`, see `_sums`.
    microbatches: their number.
  """

  def run(params: Tree, batch: Tree, key: jax.Array) -> tuple[jax.Array, Tree]:
    if microbatches == 1:
      (loss, weight), grads = value_and_grad(params, batch, key)
      return (loss, grads) if weight is None else _divided((loss, grads), weight)
    split = _split(batch, microbatches)

    def body(total: Tree, xs: Tree) -> tuple[Tree, jax.Array | None]:
      microbatch, i = xs
      (loss, weight), grads = value_and_grad(params, microbatch, jax.random.fold_in(key, i))
      return jax.tree.map(jnp.add, total, (loss, grads)), weight

    zeros = jax.tree.map(jnp.zeros_like, (jnp.float32(0), params))
    total, weights = jax.lax.scan(body, zeros, (split, jnp.arange(microbatches)))
    if weights is None:
      return jax.tree.map(lambda x: x / microbatches, total)
    return _divided(total, weights.sum())

  return run


def _divided(sums: Tree, weight: jax.Array) -> Tree:
  """Sums by their weight; where nothing counts they are 0 and stay so."""
  return jax.tree.map(lambda x: x / jnp.where(weight > 0, weight, 1.0).astype(x.dtype), sums)


def _clipped_each(
  loss: Callable[[Predict, Batch], Losses], predict_of: PredictOf, limit: float
) -> Callable:
  """As `value_and_grad` of `_sums`, with the gradient of each example cut to a norm before the mean is taken."""

  def one(params: Tree, example: Batch, key: jax.Array) -> jax.Array:
    losses = loss(predict_of(params, key), jax.tree.map(lambda x: x[None], example))
    if losses.weight is not None:
      raise UserError(
        "optim.clip_each limits the gradient of each example's own loss, but this objective divides by a weight over"
        " the whole batch; use clip, or an objective that divides per example."
      )
    return losses.total[0]

  def clipped(params: Tree, example: Batch, key: jax.Array) -> tuple[jax.Array, Tree]:
    value, grads = jax.value_and_grad(one)(params, example, key)
    # Written so that a norm of 0 divides nothing, and one that is not finite stays seen.
    factor = limit / jnp.maximum(optax.tree.norm(grads), limit)
    return value, jax.tree.map(lambda g: g * factor.astype(g.dtype), grads)

  def run(params: Tree, microbatch: Batch, key: jax.Array) -> Tree:
    n = len(jax.tree.leaves(microbatch)[0])
    keys = jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(n))
    # The names are for kernels on a mesh: where examples are divided along its axes, each device computes its own.
    axes = sharding.mesh_of(*jax.tree.leaves(microbatch)).axis_names
    each = jax.vmap(clipped, (None, 0, 0), spmd_axis_name=axes or None)
    values, grads = each(params, microbatch, keys)
    return (values.mean(), None), jax.tree.map(lambda g: g.mean(axis=0), grads)

  return run


def _in_two_passes(loss: BatchLoss, predict_of: PredictOf, microbatches: int) -> Callable:
  """The gradients of a loss over the whole batch, in two passes over the microbatches where there are several.

  First all embeddings, without their intermediates; from these the loss, and its gradient with respect to each
  embedding; then the microbatches again, to take this gradient on to the parameters. So every example is compared with
  the whole batch. Source: GradCache (arXiv 2101.06983).
  """

  def embed(params: Tree, microbatch: Batch, key: jax.Array) -> Tree:
    return loss.embed(predict_of(params, key), microbatch)

  def mean(embedded: Tree, batch: Batch) -> jax.Array:
    return loss.loss(embedded, batch).mean()

  def whole(params: Tree, batch: Batch, key: jax.Array) -> tuple[jax.Array, Tree]:
    return jax.value_and_grad(lambda p: mean(embed(p, batch, key), batch))(params)

  def run(params: Tree, batch: Batch, key: jax.Array) -> tuple[jax.Array, Tree]:
    split = _split(batch, microbatches)
    each = (split, jnp.arange(microbatches))
    made = jax.lax.map(lambda xs: embed(params, xs[0], jax.random.fold_in(key, xs[1])), each)
    value, pull = jax.value_and_grad(mean)(_joined(made), batch)

    def body(total: Tree, xs: Tree) -> tuple[Tree, None]:
      microbatch, i, cotangent = xs
      again = lambda p: embed(p, microbatch, jax.random.fold_in(key, i))  # noqa: E731
      (grads,) = jax.vjp(again, params)[1](cotangent)
      return jax.tree.map(jnp.add, total, grads), None

    zeros = jax.tree.map(jnp.zeros_like, params)
    grads, _ = jax.lax.scan(body, zeros, (*each, _split(pull, microbatches)))
    return value, grads

  return whole if microbatches == 1 else run


def _split(batch: Tree, microbatches: int) -> Tree:
  """Arrays [n, ...] as [microbatches, n / microbatches, ...], interleaved: each device divides its own share."""
  return jax.tree.map(lambda x: x.reshape(-1, microbatches, *x.shape[1:]).swapaxes(0, 1), batch)


def _joined(parts: Tree) -> Tree:
  """Undoes `_split`."""
  return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), parts)
