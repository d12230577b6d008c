"""Masked sums: padded examples count nothing, and batches of different sizes add up."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexivit_jax.errors import UserError
from flexivit_jax.evaluators.sums import masked_sums, means, merge


def test_means_of_padded_batches_are_those_of_the_examples():
  rng = np.random.default_rng(0)
  loss = rng.normal(size=10).astype(np.float32)
  batches = [(loss[:4], np.ones(4)), (loss[4:8], np.ones(4))]
  batches += [(np.append(loss[8:], [np.nan, np.inf]), np.array([1, 1, 0, 0]))]
  sums = [jax.jit(masked_sums)({"loss": jnp.float32(x)}, jnp.float32(m)) for x, m in batches]
  want = loss.astype(np.float64).mean()
  assert means(*sums)["loss"] == pytest.approx(want, rel=1e-6)
  merged = merge(merge(sums[0], sums[1]), sums[2])
  assert float(merged.count) == 10
  assert means(merged)["loss"] == pytest.approx(want, rel=1e-6)


def test_sums_without_a_mask_and_of_nothing():
  sums = masked_sums({"a": jnp.float32([1, 2]), "b": jnp.float32([0, 1])})
  assert means(sums) == {"a": 1.5, "b": 0.5}
  with pytest.raises(UserError, match="0 examples"):
    means(masked_sums({"a": jnp.zeros(3)}, jnp.zeros(3)))
