"""The compiled training step: one program for the gradients at each patch size, one for the update of all."""

import functools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from flexivit_jax.devices import compilation, sharding
from flexivit_jax.objectives.base import Objective
from flexivit_jax.sizes import SizeArgs, SizeKey, size_key, size_name
from flexivit_jax.training import steps
from flexivit_jax.trees import Tree

Report = Callable[[dict, compilation.Program, int], None]


class StepPrograms(NamedTuple):
  """What `compile_steps` returns. `microbatches` is their number at each size; keys: `sizes.size_key`."""

  gradients: dict[tuple, compilation.Program]
  update: compilation.Program
  microbatches: dict[tuple, int]
  seconds: float = 0.0  # that making them took
  scales: dict[tuple, jax.Array] | None = None  # of the updates

  def __call__(
    self, size: SizeArgs, state: steps.TrainState, batch: Tree, run: dict[str, jax.Array]
  ) -> tuple[steps.TrainState, dict[str, jax.Array]]:
    """One step; `run` holds "seed" and "total_steps". The state's memory is taken."""
    state, measured, _ = self.with_gradients(size, state, batch, run)
    return state, measured

  def with_gradients(
    self, size: SizeArgs, state: steps.TrainState, batch: Tree, run: dict[str, jax.Array]
  ) -> tuple[steps.TrainState, dict[str, jax.Array], Tree]:
    """As a call, and returns the gradients too."""
    program = self.gradients[size_key(size)]
    loss, grads = program.run(state._replace(opt_state=None), batch, run["seed"])
    scale = () if self.scales is None else (self.scales[size_key(size)],)
    state, measured = self.update.run(state, loss, grads, run["total_steps"], *scale)
    return state, measured, grads


def compile_steps(
  sizes: Sequence[SizeArgs],
  state: steps.TrainState,
  batch: Tree,
  run: dict[str, jax.Array],
  mesh: Mesh,
  *,
  model: nn.Module,
  objective: Objective,
  tx: optax.GradientTransformationExtraArgs,
  clip_each: float | None = None,
  frozen: Tree | None = None,
  microbatches: Sequence[int] = (1,),
  memory: float = math.inf,
  skip_above: float | None = None,
  batches_of: Callable[[SizeArgs], int] = lambda size: 1,
  update_scale: Callable[[SizeArgs], float] | None = None,
  report: Report = lambda size, program, microbatches: None,
) -> StepPrograms:
  """Compiles all that a run's steps will need.

  Args:
    sizes: the static arguments of the model, one dict a size; best from few tokens to many.
    state, batch, run: as the steps will get them, or their shapes.
    mesh: where they live.
    model, objective, tx: see `steps.step`.
    clip_each, frozen: see `steps.gradients`.
    microbatches: candidate numbers of gradient-accumulation microbatches, from small to large; each size uses the
      smallest with which a step fits into `memory`.
    memory: bytes of each device for a step.
    skip_above: see `steps.update`.
    batches_of: how many times `batch` a step at a size takes.
    update_scale: by what the update is multiplied after a step at a size; None: by nothing.
    report: called after each compilation; the update is that of the size {}.

  Raises:
    OutOfMemory: a step that does not fit.
  """
  begin = time.perf_counter()
  everywhere = sharding.replicated(mesh)
  # As the parameters and the state: left to the compiler, what is donated might be laid out anew.
  placed = (everywhere, sharding.divided(state.params, mesh))
  seen = state._replace(opt_state=None)
  fn = functools.partial(
    steps.gradients, model=model, objective=objective, clip_each=clip_each, frozen=frozen
  )

  def gradients(
    seen: Tree, batch: Tree, seed: jax.Array, *, microbatches: int, **size: Any
  ) -> Tree:
    return fn(seen, batch, seed=seed, accumulate=microbatches, **size)

  def given(size: SizeArgs) -> tuple:
    return (seen, _several(batch, batches_of(size)), run["seed"])

  # With one number there is nothing to find out: as below, but a size is compiled while the next is traced.
  if len(microbatches) == 1:
    used = {size_key(size): microbatches[0] for size in sizes}
    programs = compilation.compile_each(
      functools.partial(gradients, microbatches=microbatches[0]),
      given,
      sizes,
      out_shardings=placed,
      report=lambda size, program: report(size, program, microbatches[0]),
    )
  else:
    room = memory - sharding.bytes_each(state.opt_state)  # which waits meanwhile
    programs, used = _fitting(gradients, given, sizes, microbatches, room, placed, report)

  scales = None
  if update_scale is not None:
    by_size = {size_key(s): np.float32(update_scale(s)) for s in sizes}
    scales = jax.device_put(by_size, everywhere)
  update = functools.partial(steps.update, objective=objective, tx=tx, skip_above=skip_above)
  updating = _compile_update(update, state, run["total_steps"], mesh, scales)
  report({}, updating, 1)
  return StepPrograms(programs, updating, used, time.perf_counter() - begin, scales)


def _compile_update(
  update: Callable[..., Tree],
  state: steps.TrainState,
  total_steps: jax.Array,
  mesh: Mesh,
  scales: dict[SizeKey, jax.Array] | None,
) -> compilation.Program:
  """The one update of all sizes; it takes the memory of the state."""
  everywhere = sharding.replicated(mesh)
  loss = jax.ShapeDtypeStruct((), jnp.float32, sharding=everywhere)
  grads = jax.tree.map(
    lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
    state.params,
    sharding.divided(state.params, mesh),
  )

  def run(
    state: Tree, loss: Tree, grads: Tree, total_steps: jax.Array, scale: jax.Array | None = None
  ) -> Tree:
    return update(state, loss, grads, total_steps=total_steps, scale=scale)

  args: tuple[Tree, ...] = (state, loss, grads, total_steps)
  if scales is not None:
    args += (next(iter(scales.values())),)
  placed = (sharding.divided(state, mesh), everywhere)
  return compilation.compile_one(run, args, "the update", donate=(0,), out_shardings=placed)


def _fitting(
  gradients: Callable[..., Tree],
  inputs_of: Callable[[SizeArgs], tuple],
  sizes: Sequence[SizeArgs],
  microbatches: Sequence[int],
  room: float,
  out_shardings: Tree,
  report: Report,
) -> tuple[dict[tuple, compilation.Program], dict[tuple, int]]:
  """Compiles each size with the fewest microbatches that fit into `room`; returns the programs and these numbers."""
  programs, used = {}, {}
  busy = (
    0.0  # bytes of the intermediates of a whole batch at the size before, which has fewer tokens
  )
  for size in sizes:
    name, args = f"a training step at {size_name(size)}", inputs_of(size)

    def make(
      microbatches: int, size: SizeArgs = size, args: tuple = args, name: str = name
    ) -> Tree:
      fixed = functools.partial(gradients, microbatches=microbatches, **size)
      return compilation.compile_one(fixed, args, name, out_shardings=out_shardings)

    key = size_key(size)
    guess = busy / max(room - 2 * sharding.bytes_each(args[0].params), 1.0)
    used[key], programs[key] = compilation.fewest_microbatches(
      make, microbatches, room, name, guess
    )
    busy = programs[key].temp_bytes * used[key]
    report(size, programs[key], used[key])
  return programs, used


def _several(batch: Tree, times: int) -> Tree:
  """The shapes of several batches as one."""
  if times == 1:
    return batch
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(
      (times * x.shape[0], *x.shape[1:]), x.dtype, sharding=x.sharding
    ),
    batch,
  )
