"""The optimizer chain, with exactly big_vision's order of operations (its optax.py, `make`).

    clip by global norm -> adam, ... -> x lr -> + wd * param [-> x layer] -> x schedule(step) -> x -1

Weight decay comes after the multiplication with lr: the schedule scales it, lr does not (the
`weight_decay` of AdamW is wd / lr).
"""

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Int

from flexivit_jax import trees
from flexivit_jax.config import Section
from flexivit_jax.errors import UserError, unknown
from flexivit_jax.training import layerwise, schedules
from flexivit_jax.trees import Json, Tree


class Optimizer(NamedTuple):
  """What `make` returns.

  `tx.update(grads, state, params)` uses the run length given to `make`; a scalar array passed as
  `tx.update(grads, state, params, total_steps=total)` overrides it without a new compilation.
  `schedules` maps each regex of the schedule (".*" when there is one for all) to its function
  `step -> factor`, for logging. `frozen` is the tree of bools of the parameters that do not move.
  `clip_each` is the largest norm of one example's gradient, which is not part of `tx`: whoever computes
  the gradients applies it before the mean over examples. None: off.
  """

  tx: optax.GradientTransformationExtraArgs
  schedules: dict[str, schedules.Schedule]
  frozen: Tree
  clip_each: float | None = None


class ScheduleState(NamedTuple):
  """The number of updates so far."""

  step: Int[Array, ""]


def make(
  params: Tree,
  *,
  total_steps: int,
  lr: int | float,
  wd: int | float = 0.0,
  clip: int | float | None = None,
  clip_each: int | float | None = None,
  name: str = "adam",
  b1: int | float | None = None,
  b2: int | float | None = None,
  eps: int | float | None = None,
  mu_dtype: str | None = None,
  nesterov: bool | None = None,
  wd_mults: Sequence[tuple[str, int | float]] = ((".*/kernel", 1.0),),
  lr_mults: Sequence[tuple[str, int | float]] = (),
  layer_decay: layerwise.Decay | None = None,
  freeze: int | str | Sequence[str] | None = None,
  schedule: Section | Sequence[tuple[str, Section | None]] | None = None,
  batch_size: int | float | None = None,
  dataset_size: int | None = None,
) -> Optimizer:
  """Builds the gradient transformation.

  Args:
    params: tree of parameters or shapes; only the names are used.
    total_steps: of the run.
    lr: peak learning rate.
    wd: added to the update as `wd * mult * param`, after `lr`, before the schedule.
    clip: largest global norm of the gradient, over the parameters that are not frozen; None: off.
    clip_each: largest global norm of the gradient of each single example, for small batches; None: off.
    name: one of OPTIMIZERS.
    b1: first moment's decay; default in the optimizer's own function, as for the next four.
    b2: second moment's decay.
    eps: see the optimizer.
    mu_dtype: dtype of the first moment ("bfloat16", "float32").
    nesterov: see the optimizer.
    wd_mults: (regex, factor) pairs, first full match of the "/"-joined name wins; others: no decay.
    lr_mults: likewise, factors > 0 on `lr` (not on `wd`); others: 1.
    layer_decay: the update, decay included, is multiplied by this once for each layer below the head: block i of n by
      its power n - i, the embedding by n + 1; see `layerwise`. (name, decay) pairs for a model of several backbones,
      as of two towers: the others have none. None: by nothing.
    freeze: what does not move: n, the embedding and the first n blocks (0: the embedding alone); "all_but_head"; or
      regexes of whole names. As None in `schedule`, before whose patterns it comes. None: nothing.
    schedule: arguments of `schedules.make` for all parameters, or (regex, arguments) pairs. None in
      the place of arguments freezes: these parameters stay bitwise the same, have no optimizer
      state, and their gradients (even NaN) do not enter the clip norm.
    batch_size: global, for durations in epochs or examples.
    dataset_size: images in the training split, likewise.

  Raises:
    UserError: unknown optimizer or option, a regex without effect, a parameter without schedule.
  """
  if name not in OPTIMIZERS:
    raise unknown("optimizer", name, OPTIMIZERS)
  for key, value in {"lr": lr, "wd": wd, "eps": eps}.items():
    if value is not None and not 0 <= value < math.inf:
      raise UserError(f"optim.{key}={value}; expected a finite number >= 0.")
  for key, value in {"b1": b1, "b2": b2}.items():
    if value is not None and not 0 <= value < 1:
      raise UserError(f"optim.{key}={value}; expected 0 to below 1.")
  if clip_each is not None and not 0 < clip_each < math.inf:
    raise UserError(f"optim.clip_each={clip_each}; expected a finite norm > 0, or None.")
  given = {"b1": b1, "b2": b2, "eps": eps, "mu_dtype": mu_dtype, "nesterov": nesterov}
  moments = OPTIMIZERS[name](**_options(name, given))
  run = {"total_steps": total_steps, "batch_size": batch_size, "dataset_size": dataset_size}
  patterns = [*_frozen_patterns(params, freeze), *_schedule_patterns(schedule)]
  functions = [None if kw is None else _make_schedule(run, kw) for _, kw in patterns]
  which = _which_schedule(params, patterns)
  frozen = jax.tree.map(lambda i: functions[i] is None, which)
  moving = jax.tree.map(lambda i: functions[i] is not None, which)
  tx = optax.chain(
    optax.masked(_clip(clip), moving),
    optax.masked(moments, moving),
    _scale_and_decay(_lr_tree(params, lr, lr_mults), _wd_tree(params, wd, wd_mults)),
    *_scale_layers(params, layer_decay),
    _descend_by_schedules(functions, which),
  )
  regexes = [regex for regex, _ in patterns]
  by_regex = {r: f for r, f in zip(regexes, functions, strict=True) if f is not None}
  return Optimizer(optax.with_extra_args_support(tx), by_regex, frozen, clip_each)


def frozen(
  params: Tree,
  freeze: int | str | Sequence[str] | None = None,
  schedule: Section | Sequence[tuple[str, Section | None]] | None = None,
) -> Tree:
  """Returns the tree of bools of the parameters that do not move; arguments and errors as of `make`."""
  patterns = [*_frozen_patterns(params, freeze), *_schedule_patterns(schedule)]
  which = _which_schedule(params, patterns)
  return jax.tree.map(lambda i: patterns[i][1] is None, which)


def adam(
  *, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, mu_dtype: str = "bfloat16"
) -> optax.GradientTransformation:
  """Adam; the first moment is kept in bfloat16, the second in the parameters' dtype."""
  return optax.scale_by_adam(b1=b1, b2=b2, eps=eps, mu_dtype=_dtype(mu_dtype))


def momentum(
  *, b1: float = 0.9, nesterov: bool = False, mu_dtype: str = "bfloat16"
) -> optax.GradientTransformation:
  """Gradient descent with momentum, kept in bfloat16 (big_vision's `momentum_hp`)."""
  return optax.trace(decay=b1, nesterov=nesterov, accumulator_dtype=_dtype(mu_dtype))


def sgd() -> optax.GradientTransformation:
  """Plain gradient descent, without state."""
  return optax.identity()


def adafactor(
  *, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-30, mu_dtype: str = "bfloat16"
) -> optax.GradientTransformation:
  """Adafactor as big_vision changed it for ViT-G: no update clipping, no scaling by the parameter.

  The second moment's decay is `min(b2, 1 - (step + 1) ** -0.8)`; `b1` is that of a first moment
  without bias correction. Source: big_vision optax.py `scale_by_adafactor`, arXiv 2106.04560.
  """

  def decay_rate(step: Array, exponent: float) -> Array:
    return jnp.minimum(b2, 1.0 - (jnp.asarray(step, jnp.float32) + 1.0) ** -exponent)

  second = optax.scale_by_factored_rms(
    decay_rate=0.8, min_dim_size_to_factor=32, epsilon=eps, decay_rate_fn=decay_rate
  )
  first = optax.ema(b1, debias=False, accumulator_dtype=_dtype(mu_dtype))
  return optax.chain(second, first)


def lion(
  *, b1: float = 0.9, b2: float = 0.99, mu_dtype: str = "bfloat16"
) -> optax.GradientTransformation:
  """Lion: the sign of `b1 * m + (1 - b1) * g`, then the moment `m = b2 * m + (1 - b2) * g` (arXiv 2302.06675).

  An update has size 1 in every coordinate, so `lr` is 3 to 10 times smaller than Adam's.
  """
  return optax.scale_by_lion(b1=b1, b2=b2, mu_dtype=_dtype(mu_dtype))


OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
  "adam": adam,
  "momentum": momentum,
  "sgd": sgd,
  "adafactor": adafactor,
  "lion": lion,
}


def _dtype(name: str) -> Any:
  dtypes = {"bfloat16": jnp.bfloat16, "float32": jnp.float32}
  if name not in dtypes:
    raise unknown("mu_dtype", name, dtypes)
  return dtypes[name]


def _clip(max_norm: int | float | None) -> optax.GradientTransformation:
  if max_norm is None:
    return optax.identity()
  if not max_norm > 0:
    raise UserError(f"clip={max_norm}; expected a norm > 0, or None to switch clipping off.")
  return optax.clip_by_global_norm(max_norm)


def _scale_and_decay(lrs: Tree, wds: Tree) -> optax.GradientTransformation:
  """Returns `update -> lr * update + wd * param`, with trees of numbers `lrs` and `wds`."""

  def update(updates: Tree, params: Tree) -> Tree:
    decay = lambda u, p, lr, wd: lr * u + wd * p if wd else lr * u  # noqa: E731
    return jax.tree.map(decay, updates, params, lrs, wds)

  return optax.stateless(update)


def _scale_layers(
  params: Tree, decay: layerwise.Decay | None
) -> list[optax.GradientTransformation]:
  """Multiplies each layer's update by its power of the decay; with None nothing is part of the chain."""
  if decay is None:
    return []
  by_name = layerwise.scales(_shapes(params), decay)
  factors = trees.map_named(lambda name, _: by_name[name], params)

  def update(updates: Tree, params: Tree) -> Tree:
    return jax.tree.map(lambda u, factor: jnp.asarray(factor, u.dtype) * u, updates, factors)

  return [optax.stateless(update)]


def _descend_by_schedules(
  functions: Sequence[schedules.Schedule | None], which: Tree
) -> optax.GradientTransformationExtraArgs:
  """Multiplies each update by minus its schedule's factor; `which` is a tree of indices."""

  def update(
    updates: Tree,
    state: ScheduleState,
    params: Tree | None = None,
    *,
    total_steps: Array | int | None = None,
    **_: object,
  ) -> tuple[Tree, ScheduleState]:
    args = (state.step,) if total_steps is None else (state.step, total_steps)
    factors = [None if f is None else f(*args) for f in functions]

    def descend(u: Array | np.ndarray, i: int) -> Array:
      # Minus zero is the neutral element: x + -0.0 keeps every bit, 0.0 would turn -0.0 into 0.0.
      return jnp.full_like(u, -0.0) if factors[i] is None else -jnp.asarray(factors[i], u.dtype) * u

    return jax.tree.map(descend, updates, which), ScheduleState(state.step + 1)

  return optax.GradientTransformationExtraArgs(
    lambda params: ScheduleState(jnp.zeros((), jnp.int32)), update
  )


def _frozen_patterns(
  params: Tree, freeze: int | str | Sequence[str] | None
) -> list[tuple[str, None]]:
  if freeze is None:
    return []
  if not isinstance(freeze, int | str):
    trees.mask(params, [(regex, 0) for regex in freeze], default=1, what="optim.freeze")
  return [(regex, None) for regex in layerwise.frozen(freeze, _shapes(params))]


def _shapes(params: Tree) -> dict[str, tuple[int, ...]]:
  return {name: leaf.shape for name, leaf in trees.flatten(params).items()}


def _schedule_patterns(
  schedule: Section | Sequence[tuple[str, Section | None]] | None,
) -> list[tuple[str, Section | None]]:
  if isinstance(schedule, Sequence):
    return [(regex, kw) for regex, kw in schedule]
  return [(".*", schedule or {})]


def _make_schedule(run: Section, kw: Section) -> schedules.Schedule:
  known = inspect.signature(schedules.make).parameters.keys() - run.keys()
  for key in kw:
    if key not in known:
      raise unknown("key in optim.schedule", key, known)
  return schedules.make(**run, **kw)


def _which_schedule(params: Tree, patterns: Sequence[tuple[str, Section | None]]) -> Tree:
  """Returns the tree of indices into `patterns`."""
  indices = [(regex, i) for i, (regex, _) in enumerate(patterns)]
  which = trees.mask(params, indices, default=-1, what="optim.schedule")
  free = [name for name, i in trees.flatten(which).items() if i == -1]
  if free:
    raise UserError(
      f"optim.schedule: no pattern matches {', '.join(free[:5])} ({len(free)} parameters);"
      ' add (".*", {}), or (".*", None) to freeze them.'
    )
  return which


def _lr_tree(params: Tree, lr: int | float, mults: Sequence[tuple[str, int | float]]) -> Tree:
  for regex, mult in mults:
    if not mult > 0:
      raise UserError(
        f"optim.lr_mults: {regex!r} has {mult}, expected > 0;"
        f" to freeze, use schedule=(({regex!r}, None), ...)."
      )
  factors = trees.mask(params, mults, default=1.0, what="optim.lr_mults")
  return jax.tree.map(lambda mult: lr * mult, factors)


def _wd_tree(params: Tree, wd: int | float, mults: Sequence[tuple[str, int | float]]) -> Tree:
  # Without decay, a model without a kernel must not fail because of the default pattern.
  factors = trees.mask(params, mults if wd else (), default=0.0, what="optim.wd_mults")
  return jax.tree.map(lambda mult: wd * mult, factors)


def _options(name: str, given: Section) -> Json:
  options = {key: value for key, value in given.items() if value is not None}
  for key in options:
    if key not in inspect.signature(OPTIMIZERS[name]).parameters:
      raise UserError(f"optim.{key} has no effect with the optimizer {name!r}; remove it.")
  return options
