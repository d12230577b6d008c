"""Costs that are counted in the traced program are those of the formulas, where there are formulas."""

import numpy as np
import pytest

from flexivit_jax.models import FlexiViT, counting, flops

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


@pytest.mark.parametrize("fields", [dict(dtype="bfloat16"), dict(gelu="exact", remat="dots")])
def test_what_a_loop_keeps_is_what_the_formula_says(fields):
  model = FlexiViT(**FIELDS, **fields, scan=True, attention="einsum")
  got = counting.activation_bytes(model, SHAPES, seqhw=8)
  np.testing.assert_allclose(got, flops.kept_bytes(model, SHAPES, seqhw=8), rtol=0.05)


def test_what_is_made_of_parameters_alone_is_counted_for_no_example():
  coarse = FlexiViT(**FIELDS | dict(depth=1), kernel_resize="pi")
  fine = coarse.clone(patch_size=(24, 24))  # a larger matrix resizes its kernel
  a, b = (counting.gmacs(m, SHAPES, seqhw=4) for m in (coarse, fine))
  assert a == b


@pytest.mark.full
def test_the_kernel_for_tpus_counts_with_all_its_blocks():
  shapes = {"image": (240, 240, 3)}
  fields = dict(num_classes=5, width=16, depth=2, mlp_dim=24, num_heads=2)
  formula, kernel = (
    counting.gmacs(FlexiViT(**fields, attention=form), shapes, seqhw=30)
    for form in ("einsum", "auto:tpu")
  )
  more = 2 * 2 * 16 * (1024**2 - 901**2)  # two blocks, two products of padded tokens
  np.testing.assert_allclose((kernel - formula) * 1e9, more)


@pytest.mark.full
def test_what_a_loop_keeps_with_the_kernel_is_what_the_formula_says():
  model = FlexiViT(variant="S", depth=2, scan=True, dtype="bfloat16", attention="auto:tpu")
  shapes = {"image": (240, 240, 3)}
  got = counting.activation_bytes(model, shapes, seqhw=30)
  np.testing.assert_allclose(got, flops.kept_bytes(model, shapes, seqhw=30), rtol=0.06)
