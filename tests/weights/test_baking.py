"""The baked model is the flexible one at one size, and holds no resize."""

import jax
import numpy as np
import pytest

from flexivit_jax import errors
from flexivit_jax.models import FlexiViT
from flexivit_jax.weights import bake

FIELDS = dict(
  num_classes=5, patch_size=(6, 6), posemb_size=(3, 3), width=16, depth=1, mlp_dim=24, num_heads=4
)


def make(**fields):
  """Returns (model, params): small, every array random and NumPy."""
  model = FlexiViT(**{**FIELDS, **fields})
  image = jax.ShapeDtypeStruct((1, *model.patch_size, 3), np.float32)
  shapes = jax.eval_shape(model.init, jax.random.key(0), image)["params"]
  rng = np.random.default_rng(0)
  return model, jax.tree.map(lambda s: rng.normal(size=s.shape).astype(np.float32) * 0.3, shapes)


def images(hw):
  return np.random.default_rng(1).uniform(-1, 1, (2, *hw, 3)).astype(np.float32)


def products(model, params, image, **size):
  """Precision of each matrix product in the forward pass; only resizes ask for the highest."""
  jaxpr = jax.make_jaxpr(lambda p, x: model.apply({"params": p}, x, **size)[0])(params, image)
  return [str(e.params["precision"]) for e in jaxpr.jaxpr.eqns if e.primitive.name == "dot_general"]


@pytest.mark.parametrize(
  ("posemb", "pool_type"),
  [
    ("learn", "tok"),
    ("learn", "gap"),
    ("learn", "map"),
    ("sincos2d", "tok"),
    pytest.param("sincos2d", "gap", marks=pytest.mark.full),
    pytest.param("sincos2d", "map", marks=pytest.mark.full),
  ],
)
@pytest.mark.parametrize(
  ("hw", "size"),
  [
    ((24, 24), {"seqhw": 2}),
    ((24, 24), {"seqhw": 8}),
    ((24, 36), {"grid_hw": (4, 3)}),
    ((24, 36), {"patch_hw": (3, 12)}),
  ],
)
def test_logits_are_those_of_the_flexible_model(pool_type, posemb, hw, size):
  model, params = make(pool_type=pool_type, posemb=posemb)
  image = images(hw)
  want, _ = model.apply({"params": params}, image, **size)
  fixed, baked = bake(model, params, image_hw=hw, **size)
  got, _ = fixed.apply({"params": baked}, image)
  assert np.abs(np.asarray(want)).max() > 0.1
  np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("kernel_resize", ["pi", "plain", "area", "norm"])
@pytest.mark.parametrize("posemb", ["learn", "sincos2d"])
def test_at_the_stored_size_it_is_the_identity(posemb, kernel_resize):
  model, params = make(posemb=posemb, kernel_resize=kernel_resize)
  fixed, baked = bake(model, params, image_hw=(18, 18))
  assert fixed == model
  jax.tree.map(np.testing.assert_array_equal, baked, params)


def test_a_baked_model_is_baked_already():
  model, params = make()
  once = bake(model, params, image_hw=(24, 36), grid_hw=(4, 3))
  twice = bake(*once, image_hw=(24, 36))
  assert twice[0] == once[0]
  jax.tree.map(np.testing.assert_array_equal, twice[1], once[1])


def test_the_forward_pass_holds_no_resize():
  model, params = make()
  image = images((24, 24))
  flexible = products(model, params, image, seqhw=8)
  fixed, baked = bake(model, params, image_hw=(24, 24), seqhw=8)
  plain = products(fixed, baked, image)
  assert sum("HIGHEST" in p for p in flexible) == 4  # two axes of the kernel, two of the grid
  assert not any("HIGHEST" in p for p in plain)
  assert len(plain) == len(flexible) - 4


def test_the_parameters_given_stay_as_they_were():
  model, params = make()
  before = jax.tree.map(np.copy, params)
  bake(model, params, image_hw=(24, 24), seqhw=8)
  jax.tree.map(np.testing.assert_array_equal, params, before)


def test_a_size_that_does_not_divide_the_image_is_refused():
  with pytest.raises(errors.UserError, match="sizes that do: 1, 2, 3, 4, 6, 8, 12, 24"):
    bake(*make(), image_hw=(24, 24), seqhw=7)
