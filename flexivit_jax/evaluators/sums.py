"""Masked sums: a metric is a sum over the real examples and their number, divided once, on the host.

So batches of different sizes, padded ones, and devices add up to the mean over all examples.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from flexivit_jax.errors import UserError
from flexivit_jax.trees import Tree


class Sums(NamedTuple):
  """Sums over the real (unmasked) examples of each metric, and how many they were.

  `tables` are counts, integers. `per_image` are values [n, ...] of each example, for metrics whose interval comes
  from a bootstrap, or that are no mean of one value (`PerSize`, `resampled`). What padding holds does not
  matter; a "_mask" [n] among them takes the place of the batch's.
  """

  total: dict[str, Tree]
  count: Tree
  tables: dict[str, Tree] | None = None
  per_image: dict[str, Tree] | None = None


def masked_sums(
  values: Mapping[str, Float[Array, "n"]], mask: Float[Array, "n"] | None = None
) -> Sums:
  """Sums values of real examples (`mask` 1); padded ones count nothing, not even a NaN."""
  if mask is None:
    mask = jnp.ones(len(next(iter(values.values()))), jnp.float32)
  mask = mask.astype(jnp.float32)
  values, mask = _gathered((dict(values), mask))
  total = {name: jnp.sum(jnp.where(mask > 0, v, 0.0) * mask) for name, v in values.items()}
  return Sums(total, jnp.sum(mask))


def _gathered(values: Tree) -> Tree:
  """Values of each example, whole on every device of the mesh under which a program is traced.

  Then every device adds all of them, in one order: the sums are the same to the bit on any number of devices.
  """
  if jax.sharding.get_abstract_mesh().size <= 1:
    return values
  return jax.lax.with_sharding_constraint(values, jax.sharding.PartitionSpec())


def merge(a: Sums, b: Sums) -> Sums:
  """Adds the sums of two batches."""
  return jax.tree.map(lambda x, y: x + y, a, b)


def means(*parts: Sums) -> dict[str, float]:
  """Adds the sums of all batches in float64 on the host and divides, once.

  Raises:
    UserError: no example counted.
  """
  parts = jax.device_get(parts)
  count = math.fsum(float(part.count) for part in parts)
  if count == 0:
    raise UserError("Metrics of 0 examples have no mean; the split is empty or all is masked.")
  return {k: sum(float(part.total[k]) for part in parts) / count for k in parts[0].total}
