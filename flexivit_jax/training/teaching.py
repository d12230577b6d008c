"""The teachers' part of each step: computed by a program of its own, or read from a cache."""

import functools
import math
from collections.abc import Sequence
from typing import Any, final

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from flexivit_jax.devices import compilation, sharding
from flexivit_jax.objectives.base import Teaching
from flexivit_jax.training import steps
from flexivit_jax.training.teacher_cache import TeacherCache


@final
class Targets:
  """Gives batch["targets"] of each step.

  Args:
    teaching: the objective's.
    specs: of the inputs on the device, by name.
    mesh: where it runs.
    seed: as in `steps.step`.
    microbatches, memory: as in `step_programs.compile_steps`.
    cache: of what the teachers said, read where it has a step and written where it has not; None: no cache.
    todo: the steps that are left; if the cache has them all, no teacher is compiled or put on a device.
    divide: the teachers' parameters along "fsdp" as the student's are; else they are copies.
  """

  def __init__(
    self,
    teaching: Teaching,
    specs: dict[str, Any],
    mesh: Any,
    *,
    seed: int,
    microbatches: Sequence[int] = (1,),
    memory: float = math.inf,
    cache: TeacherCache | None,
    todo: range,
    divide: bool = True,
    report: Any = lambda program: None,
  ):
    self._teaching, self._mesh, self._cache = teaching, mesh, cache
    self._seed = jax.device_put(np.uint32(seed), sharding.replicated(mesh))
    split = sharding.batch_split(mesh)

    def fn(step: jax.Array, batch: Any, frozen: Any, seed: jax.Array, accumulate: int = 1) -> Any:
      return steps.targets(step, batch, frozen, teaching=teaching, seed=seed, accumulate=accumulate)

    args = (jax.ShapeDtypeStruct((), jnp.int32, sharding=sharding.replicated(mesh)), specs)
    made = jax.eval_shape(fn, *args, teaching.frozen, self._seed)
    self.specs = jax.tree.map(
      lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=split), made
    )
    # Decided once, and alike on all processes: they run the teachers' program together or not at all.
    self._kept = frozenset() if cache is None else _kept_by_all(cache, todo)
    self.complete = len(self._kept) == len(todo)
    if not self.complete:
      where = sharding.divided(teaching.frozen, mesh) if divide else sharding.replicated(mesh)
      self._frozen = jax.device_put(teaching.frozen, where)

      def make(accumulate: int) -> compilation.Program:
        parted = functools.partial(fn, accumulate=accumulate)
        given = (*args, self._frozen, self._seed)
        return compilation.compile_one(parted, given, "the teachers", out_shardings=split)

      _, self._program = compilation.fewest_microbatches(make, microbatches, memory, "the teachers")
      report(self._program)

  def __call__(self, step: int, batch: dict[str, np.ndarray], done: jax.Array) -> Any:
    """Returns the targets of a step on the device.

    Args:
      step: counted from 0.
      batch: this process's part, from the data.
      done: the same number, on the device.
    """
    if self._cache is not None and step in self._kept:
      found = self._cache.read(step, self.specs)
      return sharding.put_batch(found, self._mesh)
    inputs = sharding.put_batch({k: batch[k] for k in self._teaching.inputs}, self._mesh)
    targets = self._program.run(done, inputs, self._frozen, self._seed)
    if self._cache is not None:
      self._cache.write(step, targets)
    return targets


def _kept_by_all(cache: TeacherCache, steps: range) -> frozenset[int]:
  """The steps whose targets every process has its part of."""
  kept = np.array([cache.has(step) for step in steps], bool)
  if jax.process_count() > 1:
    kept = multihost_utils.process_allgather(kept).all(axis=0)
  return frozenset(np.array(steps)[kept].tolist())
