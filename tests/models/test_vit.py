"""The table of variants, fixed positions, and the two layouts of the blocks' parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexivit_jax import trees
from flexivit_jax.errors import UserError
from flexivit_jax.models import FlexiViT, vit


@pytest.mark.parametrize(("variant", "millions"), [("S", 22.06), ("B", 86.59), ("L", 304.36)])
def test_parameters_are_as_many_as_the_papers(variant, millions):
  # paper.md 1.10: patch 16 at 240 px, hence 15x15 positions, and ImageNet's classes.
  model = FlexiViT(num_classes=1000, variant=f"{variant}/16", posemb_size=(15, 15), scan=True)
  image = jax.ShapeDtypeStruct((1, 16, 16, 3), jnp.float32)
  params = jax.eval_shape(model.init, jax.random.key(0), image)["params"]
  assert round(trees.count(params) / 1e6, 2) == millions


def test_every_variant_can_be_split_into_its_heads_and_has_sincos_positions():
  for name, shape in vit.VARIANTS.items():
    assert shape.width % shape.num_heads == 0 == shape.width % 4, name
    assert vit.decode_variant(name) == shape._asdict()
    assert vit.decode_variant(f"{name}/14") == shape._asdict() | {"patch_size": (14, 14)}


@pytest.mark.parametrize("variant", ["b", "XL", "", "/16", "B16"])
def test_unknown_variants_are_errors_that_list_the_known(variant):
  with pytest.raises(
    UserError, match=r"Unknown variant .*known: B, G, H, L, M, S, So400m, Ti, g, mu"
  ):
    vit.decode_variant(variant)


def test_attention_is_permutation_equivariant_and_rows_attend_alone():
  attend = vit.Attention(num_heads=2)
  x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 8)), jnp.float32)
  params = jax.jit(attend.init)(jax.random.key(0), x, x)
  apply = jax.jit(attend.apply)
  order = np.array([3, 0, 4, 1, 2])
  out = apply(params, x, x)
  np.testing.assert_allclose(apply(params, x[:, order], x), out[:, order], atol=1e-6)
  np.testing.assert_allclose(apply(params, x, x[:, order]), out, atol=1e-6)
  np.testing.assert_allclose(apply(params, x, x.at[1].set(0.0))[0], out[0], atol=1e-6)


def test_sincos2d_is_the_definition_of_moco_v3():
  got = vit.sincos2d((3, 5), 16)
  assert got.shape == (3, 5, 16) and got.dtype == np.float32
  frequency = 1.0 / 10_000.0 ** (np.arange(4) / 3)  # from 1 to 1 / 10,000, both included
  for y in range(3):
    for x in range(5):
      angles = x * frequency, y * frequency
      want = np.concatenate([f(a) for a in angles for f in (np.sin, np.cos)])
      np.testing.assert_allclose(got[y, x], want, atol=1e-7)


def test_sincos2d_products_depend_on_the_distance_only():
  grid = vit.sincos2d((6, 6), 32)
  np.testing.assert_allclose((grid**2).sum(-1), 16.0, rtol=1e-6)
  dot = lambda a, b: grid[a] @ grid[b]  # noqa: E731
  np.testing.assert_allclose(dot((0, 0), (1, 2)), dot((3, 2), (4, 4)), rtol=1e-6)
  flat = grid.reshape(36, 32)
  assert (flat @ flat.T).argmax(1).tolist() == list(range(36))  # each position is its own nearest


@pytest.mark.parametrize("width", [4, 10])
def test_sincos2d_of_an_impossible_width_is_an_error(width):
  with pytest.raises(UserError, match=rf"multiple of 4 and at least 8, got {width}"):
    vit.sincos2d((2, 2), width)


@pytest.mark.parametrize("array", [np.asarray, jnp.asarray])
def test_stacked_and_unstacked_blocks_are_the_same_bits_in_the_right_order(array):
  rng = np.random.default_rng(0)
  # More than ten: sorted as text, block 10 would come before block 2.
  blocks = {f"encoderblock_{i}": {"a": {"w": array(rng.normal(size=(2, 3)))}} for i in range(12)}
  params = {"cls": array([0.0]), "Transformer": {**blocks, "encoder_norm": {"scale": array([1.0])}}}
  stacked = vit.stack_blocks(params)
  assert stacked["Transformer"].keys() == {"encoderblock", "encoder_norm"}
  w = stacked["Transformer"]["encoderblock"]["a"]["w"]
  assert w.shape == (12, 2, 3) and isinstance(w, type(array(0.0)))
  np.testing.assert_array_equal(w[10], blocks["encoderblock_10"]["a"]["w"])
  back = vit.unstack_blocks(stacked)
  assert jax.tree.structure(back) == jax.tree.structure(params)
  jax.tree.map(np.testing.assert_array_equal, back, params)
  assert vit.stack_blocks(stacked) is stacked and vit.unstack_blocks(params) is params
