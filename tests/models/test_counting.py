"""Costs that are counted in the traced program are those of the formulas, where there are formulas."""

import numpy as np
import pytest

from flexivit_jax.models import FlexiViT, counting

SHAPES = {"image": (24, 24, 3)}
FIELDS = dict(num_classes=5, width=16, depth=3, mlp_dim=24, num_heads=2, patch_size=(6, 6))


@pytest.mark.parametrize(
  "fields", [dict(pool_type="tok"), dict(pool_type="map", scan=True), dict(remat=True)]
)
@pytest.mark.parametrize("size", [dict(seqhw=2), dict(seqhw=8), dict(stride=3, depth=1)])
def test_multiply_adds_are_those_of_the_formula(fields, size):
  model = FlexiViT(**FIELDS, **fields)
  rows, columns = model.grid((24, 24), **size).grid_hw
  each_token = rows * columns * 16 * 5 / 1e9  # logits_2d, which the formula leaves out
  got = counting.gmacs(model, SHAPES, **size)
  np.testing.assert_allclose(got, model.gmacs(SHAPES, **size) + each_token, rtol=1e-9)


def test_activations_are_about_those_of_the_estimate():
  """Within a factor of three: the estimate is of what XLA keeps, the count of what JAX asks it to keep."""
  model = FlexiViT(**FIELDS)
  for seqhw in (4, 8):
    got = counting.activation_bytes(model, SHAPES, seqhw=seqhw)
    assert 1 / 3 < got / model.activation_bytes(SHAPES, seqhw=seqhw) < 3
    inputs = 3 * 16 * 4 * seqhw**2  # of the blocks, which remat keeps
    with_remat = counting.activation_bytes(model.clone(remat=True), SHAPES, seqhw=seqhw)
    assert inputs <= with_remat < got / 3


def test_what_is_made_of_parameters_alone_is_counted_for_no_example():
  coarse = FlexiViT(**FIELDS | dict(depth=1), kernel_resize="pi")
  fine = coarse.clone(patch_size=(24, 24))  # a larger matrix resizes its kernel
  a, b = (counting.gmacs(m, SHAPES, seqhw=4) for m in (coarse, fine))
  assert a == b
