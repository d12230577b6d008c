"""The compiled training step: one program for the gradients at each patch size, one for the update of all."""

import functools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from flexivit_jax import compilation, sharding, steps, trees
from flexivit_jax.objectives.base import Objective

Report = Callable[[dict, compilation.Program, int], None]


class StepPrograms(NamedTuple):
  """What `compile_steps` returns. `parts` are those of the batch at each size; keys: `compilation.size_key`."""

  gradients: dict[tuple, compilation.Program]
  update: compilation.Program
  parts: dict[tuple, int]
  seconds: float = 0.0  # that making them took

  def __call__(
    self, size: dict[str, Any], state: steps.TrainState, batch: Any, run: dict[str, jax.Array]
  ) -> tuple[steps.TrainState, dict[str, jax.Array]]:
    """One step; `run` holds "seed" and "total_steps". The state's memory is taken."""
    program = self.gradients[compilation.size_key(size)]
    loss, grads = program.run(state._replace(opt_state=None), batch, run["seed"])
    return self.update.run(state, loss, grads, run["total_steps"])


def compile_steps(
  sizes: Sequence[dict[str, Any]],
  state: steps.TrainState,
  batch: Any,
  run: dict[str, jax.Array],
  mesh: Any,
  *,
  model: nn.Module,
  objective: Objective,
  tx: optax.GradientTransformationExtraArgs,
  parts: Sequence[int] = (1,),
  memory: float = math.inf,
  report: Report = lambda size, program, parts: None,
) -> StepPrograms:
  """Compiles all that a run's steps will need.

  Args:
    sizes: the static arguments of the model, one dict a size; best from few tokens to many.
    state, batch, run: as the steps will get them, or their shapes.
    mesh: where they live.
    model, objective, tx: see `steps.step`.
    parts: numbers of parts of a batch whose gradients may be computed one after the other; of these each size takes
      the fewest with which a step fits into `memory`.
    memory: bytes of each device for a step.
    report: called after each compilation; the update is that of the size {}.

  Raises:
    OutOfMemory: a step that does not fit.
  """
  begin = time.perf_counter()
  everywhere = sharding.replicated(mesh)
  seen = state._replace(opt_state=None)
  fn = functools.partial(steps.gradients, model=model, objective=objective)

  def gradients(seen: Any, batch: Any, seed: jax.Array, *, parts: int, **size: Any) -> Any:
    return fn(seen, batch, seed=seed, accumulate=parts, **size)

  given = (seen, batch, run["seed"])
  if (
    len(parts) == 1
  ):  # nothing to find out; as below, but one size is compiled while the next is traced
    used = {compilation.size_key(size): parts[0] for size in sizes}
    programs = compilation.compile_each(
      functools.partial(gradients, parts=parts[0]),
      given,
      sizes,
      out_shardings=everywhere,
      report=lambda size, program: report(size, program, parts[0]),
    )
  else:
    programs, used = {}, {}
    room = memory - trees.size_in_bytes(state.opt_state)  # which waits meanwhile
    busy = (
      0.0  # bytes of the intermediates of a whole batch at the size before, which has fewer tokens
    )
    for size in sizes:
      name = f"a training step at {compilation.size_name(size)}"

      def make(parts: int, size: dict[str, Any] = size, name: str = name) -> compilation.Program:
        fixed = functools.partial(gradients, parts=parts, **size)
        return compilation.compile_one(fixed, given, name, out_shardings=everywhere)

      key = compilation.size_key(size)
      guess = busy / max(room - 2 * trees.size_in_bytes(state.params), 1.0)
      used[key], programs[key] = compilation.fewest_parts(make, parts, room, name, guess)
      busy = programs[key].temp_bytes * used[key]
      report(size, programs[key], used[key])

  def placed(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere)

  loss, grads = placed(jnp.zeros(())), jax.tree.map(placed, state.params)

  def update(state: Any, loss: Any, grads: Any, total_steps: jax.Array) -> Any:
    return steps.update(state, loss, grads, objective=objective, tx=tx, total_steps=total_steps)

  args = (state, loss, grads, run["total_steps"])
  updating = compilation.compile_one(
    update, args, "the update", donate=(0,), out_shardings=everywhere
  )
  report({}, updating, 1)
  return StepPrograms(programs, updating, used, time.perf_counter() - begin)
