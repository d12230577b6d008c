"""Costs of any model, counted in its traced program: for models that have no formula of their own."""

import functools
import math
from collections.abc import Callable, Hashable
from typing import Any, cast

import jax
import jax.extend.core
import jax.numpy as jnp

from flexivit_jax.models.base import Model, zeros
from flexivit_jax.sizes import SizeArgs
from flexivit_jax.specs import Shapes
from flexivit_jax.trees import Tree

Jaxpr = Any  # jax.extend.core.Jaxpr


class Counted:
  """Those methods of `Model` that most models can leave to this: a base class of a Flax module, after `nn.Module`.

  The module gives `inputs` and `outputs`.
  """

  def example(self, shapes: Shapes) -> tuple[dict[str, jax.Array], SizeArgs]:
    """See `Model.example`: zeros, and one token."""
    return zeros(cast(Model, self).inputs, shapes), {"seqhw": 1}

  def gmacs(self, shapes: Shapes, **size: Any) -> float:
    """See `gmacs`."""
    return gmacs(cast(Model, self), shapes, **size)

  def activation_bytes(self, shapes: Shapes, **size: Any) -> float:
    """See `activation_bytes`."""
    return activation_bytes(cast(Model, self), shapes, **size)


def gmacs(model: Model, shapes: Shapes, **size: Any) -> float:
  """Multiply-adds of one forward pass for one example, in 1e9: all matrix products and convolutions.

  What two examples take less what one takes: what is made of parameters alone, such as a resized kernel, is left out.
  A loop of unknown length counts once. What has been counted is remembered: several evaluations ask for the same.

  Args:
    model: the model.
    shapes: of its inputs, of one example.
    **size: static arguments of the model.

  Raises:
    UserError: the size does not fit the image.
  """
  named = tuple((name, tuple(shape)) for name, shape in shapes.items())
  return _gmacs(cast(Hashable, model), named, tuple(size.items()))


@functools.lru_cache(maxsize=1024)
def _gmacs(
  model: Any, shapes: tuple[tuple[str, tuple[int, ...]], ...], size: tuple[tuple[str, Any], ...]
) -> float:
  params, one = _inputs(model, dict(shapes))
  trace = functools.partial(jax.make_jaxpr(_forward(model, dict(size))), params)
  return (_macs(trace(_batch(one, 2)).jaxpr) - _macs(trace(one).jaxpr)) / 1e9


def step_gmacs(model: Model, shapes: Shapes, frozen: Tree, **size: Any) -> float:
  """Multiply-adds of forward and backward pass for one example, in 1e9, where some parameters do not move.

  No backward pass goes through what only these are part of: a locked tower costs its forward pass alone.

  Args:
    model, shapes, size: as for `gmacs`.
    frozen: tree of bools, the parameters that do not move.
  """
  params, one = _inputs(model, shapes)
  forward = _forward(model, size)

  def total(params: Tree, batch: Tree) -> jax.Array:
    out = forward(_stopped(params, frozen), batch)
    return sum((x.sum() for x in jax.tree.leaves(out)), jnp.float32(0))

  trace = functools.partial(jax.make_jaxpr(jax.grad(total)), params)
  return (_macs(trace(_batch(one, 2)).jaxpr) - _macs(trace(one).jaxpr)) / 1e9


def activation_bytes(
  model: Model, shapes: Shapes, frozen: Tree | None = None, **size: Any
) -> float:
  """Bytes that one example's activations take until the backward pass has used them, before XLA fuses anything.

  What two examples keep less what one keeps: parameters, and what is made of them alone, are kept once. What a block
  needs while `remat` computes it again is not among them.

  Args:
    model: the model.
    shapes: of its inputs, of one example.
    frozen: see `step_gmacs`; None: all parameters move.
    **size: static arguments of the model.
  """
  params, one = _inputs(model, shapes)
  kept = functools.partial(_kept, _forward(model, size), frozen, params)
  return float(kept(_batch(one, 2)) - kept(one))


def _inputs(model: Model, shapes: Shapes) -> tuple[Tree, Tree]:
  """Shapes of the parameters and of a batch of one example."""
  inputs, size = model.example(shapes)
  params = jax.eval_shape(functools.partial(model.init, **size), jax.random.key(0), **inputs)
  return params, _batch(inputs, 1)


def _batch(inputs: Tree, n: int) -> Tree:
  return {k: jax.ShapeDtypeStruct((n, *x.shape[1:]), x.dtype) for k, x in inputs.items()}


def _forward(model: Model, size: Any) -> Callable[[Tree, Tree], Tree]:
  """The named outputs, which are all that anything is computed for."""

  def run(params: Tree, batch: Tree) -> Tree:
    out = model.apply(params, **batch, **size)[1]
    return {name: out[name] for name in model.outputs}

  return run


def _macs(jaxpr: Jaxpr) -> int:
  total = 0
  for eqn in jaxpr.eqns:
    name, params = eqn.primitive.name, eqn.params
    if name == "dot_general":
      (contracted, _), _ = params["dimension_numbers"]
      sides = [eqn.invars[0].aval.shape[i] for i in contracted]
      total += math.prod(eqn.outvars[0].aval.shape) * math.prod(sides)
    elif name == "conv_general_dilated":
      kernel = eqn.invars[1].aval.shape
      out_axis = params["dimension_numbers"].rhs_spec[0]
      each = math.prod(n for i, n in enumerate(kernel) if i != out_axis)
      total += math.prod(eqn.outvars[0].aval.shape) * each
    elif name == "cond":
      total += max(_macs(branch.jaxpr) for branch in params["branches"])
    else:
      inner = sum(map(_macs, _inner(params)))
      if name == "scan":
        inner *= params["length"]
      elif name == "pallas_call":  # a kernel, whose program is that of one block
        inner *= math.prod(params["grid_mapping"].grid)
      total += inner
  return total


def _inner(params: dict[str, Any]) -> list[Jaxpr]:
  """The programs inside an operation: of a loop, a call, a checkpoint."""
  found = []
  for value in params.values():
    if isinstance(value, jax.extend.core.ClosedJaxpr):
      found.append(value.jaxpr)
    elif isinstance(value, jax.extend.core.Jaxpr):
      found.append(value)
  return found


def _stopped(params: Tree, frozen: Tree | None) -> Tree:
  """The parameters, without a gradient for those that do not move."""
  if frozen is None:
    return params
  stop = lambda p, still: jax.lax.stop_gradient(p) if still else p  # noqa: E731
  return jax.tree.map(stop, params, {"params": frozen})


def _kept(
  forward: Callable[[Tree, Tree], Tree], frozen: Tree | None, params: Tree, batch: Tree
) -> int:
  """Bytes of what the backward pass takes."""

  def pull(params: Tree, batch: Tree) -> Tree:
    return jax.vjp(lambda p: forward(_stopped(p, frozen), batch), params)[1]

  kept = jax.tree.leaves(jax.eval_shape(pull, params, batch))
  return sum(math.prod(x.shape) * x.dtype.itemsize for x in kept)
