"""FlexiViT inside other models: its grid of tokens, at any size, alone and as a part."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexivit_jax import trees
from flexivit_jax.errors import UserError
from flexivit_jax.models import FlexiViT, vit

FIELDS = dict(width=8, depth=2, mlp_dim=8, num_heads=2, patch_size=(4, 4), posemb_size=(3, 3))
IMAGE = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (2, 12, 24, 3)), jnp.float32)


def make(**fields):
  """Returns (model, variables), every array random."""
  model = FlexiViT(**FIELDS | fields)
  shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), IMAGE, method="features"))
  rng = np.random.default_rng(1)
  return model, jax.tree.map(lambda s: rng.normal(size=s.shape).astype(np.float32) * 0.3, shapes)


def features(model, variables, **options):
  return jax.jit(lambda v, x: model.apply(v, x, method="features", **options))(variables, IMAGE)


@pytest.mark.parametrize(
  ("fields", "size", "grid"),
  [
    (dict(), dict(), (3, 6)),
    (dict(pool_type="gap"), dict(seqhw=2), (2, 2)),
    (dict(pool_type="map"), dict(grid_hw=(2, 3)), (2, 3)),
    (dict(pool_type="tok+reg", registers=2), dict(patch_hw=(6, 4)), (2, 6)),
    (dict(pool_type="tok+gap"), dict(stride=2), (5, 11)),
  ],
)
def test_tokens_are_the_grid_without_those_before_it_at_any_size(fields, size, grid):
  model, variables = make(**fields)
  out = features(model, variables, blocks=(0, -1), **size)
  assert out.tokens.shape == (2, *grid, 8) and out.pooled.shape == (2, model.num_features)
  _, named = jax.jit(lambda v: model.apply(v, IMAGE, **size))(variables)
  prefix = model.prefix_length
  for i, block in ((0, "block00"), (-1, "block01")):
    want = named["encoder"][block]["+mlp"][:, prefix:].reshape(2, *grid, 8)
    np.testing.assert_allclose(out.blocks[i], want, atol=1e-6)
  # The tokens are what the last LayerNorm makes of the last block.
  scale, bias = (
    variables["params"]["Transformer"]["encoder_norm"][name] for name in ("scale", "bias")
  )
  last = np.asarray(out.blocks[-1], np.float64)
  centred = last - last.mean(-1, keepdims=True)
  want = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * scale + bias
  np.testing.assert_allclose(out.tokens, want, atol=1e-5)
  if model.pool_type == "gap":
    np.testing.assert_allclose(out.pooled, want.mean((1, 2)), atol=1e-5)


def test_scan_and_remat_give_the_same_features():
  model, variables = make()
  other = model.clone(scan=True, remat=True)
  stacked = {"params": vit.stack_blocks(variables["params"])}
  ask = dict(blocks=(-2, 1), seqhw=2)
  want, got = features(model, variables, **ask), features(other, stacked, **ask)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=3e-6), got, want)


def test_blocks_count_from_the_last_that_runs():
  model, variables = make()
  out = features(model, variables, depth=1, blocks=(-1, 0))
  np.testing.assert_array_equal(out.blocks[-1], out.blocks[0])


@pytest.mark.parametrize(
  ("options", "message"),
  [
    (dict(blocks=(2,)), r"blocks=\(2,\): 2 blocks run; expected numbers from -2 to 1"),
    (dict(blocks=(0, -2), depth=1), r"blocks=\(0, -2\): 1 blocks run; expected numbers from -1"),
    (dict(seqhw=5), "seqhw=5 does not divide the image"),
    (dict(depth=3), "depth=3: the model has 2 blocks"),
  ],
)
def test_what_it_cannot_give_is_an_error(options, message):
  model, variables = make()
  with pytest.raises(UserError, match=message):
    model.apply(variables, IMAGE, method="features", **options)


def test_a_head_is_made_only_for_classes():
  assert "head" not in make()[1]["params"] and "head" in make(num_classes=3)[1]["params"]


class Given(nn.Module):
  backbone: FlexiViT

  @nn.compact
  def __call__(self, image, *, sizes):
    return [nn.Dense(2)(self.backbone.features(image, seqhw=seqhw).tokens) for seqhw in sizes]


class Compact(nn.Module):
  @nn.compact
  def __call__(self, image, *, sizes):
    backbone = FlexiViT(**FIELDS, name="backbone")
    return [nn.Dense(2)(backbone.features(image, seqhw=seqhw).tokens) for seqhw in sizes]


class SetUp(nn.Module):
  def setup(self):
    self.backbone = FlexiViT(**FIELDS)
    self.heads = [nn.Dense(2), nn.Dense(2)]

  def __call__(self, image, *, sizes):
    tokens = [self.backbone.features(image, seqhw=seqhw).tokens for seqhw in sizes]
    return [head(x) for head, x in zip(self.heads, tokens, strict=True)]


@pytest.mark.parametrize("outer", [Given(FlexiViT(**FIELDS)), Compact(), SetUp()])
def test_as_a_part_it_has_one_set_of_parameters_for_all_sizes(outer):
  model, variables = make()
  sizes = (2, 3)
  shapes = jax.eval_shape(lambda: outer.init(jax.random.key(0), IMAGE, sizes=sizes))["params"]
  assert len(shapes) == 3 and not trees.diff(variables["params"], shapes["backbone"])
  ones = jax.tree.map(lambda s: np.ones(s.shape, np.float32), shapes)
  params = ones | {"backbone": variables["params"]}
  got = jax.jit(lambda p: outer.apply({"params": p}, IMAGE, sizes=sizes))(params)
  for x, seqhw in zip(got, sizes, strict=True):
    want = features(model, variables, seqhw=seqhw).tokens.sum(-1, keepdims=True) + 1
    np.testing.assert_allclose(x, np.broadcast_to(want, x.shape), atol=1e-5)


def test_as_a_pure_function_it_is_traced_once_for_each_size_and_has_gradients():
  model, variables = make(depth=1)
  traces = []

  def loss(params, image, seqhw):
    traces.append(seqhw)
    return (
      model.apply({"params": params}, image, method="features", seqhw=seqhw).tokens ** 3
    ).sum()

  step = jax.jit(jax.grad(loss), static_argnames="seqhw")
  for seqhw in (1, 2, 1, 2):
    kernel = step(variables["params"], IMAGE, seqhw=seqhw)["embedding"]["kernel"]
    assert np.isfinite(kernel).all() and (kernel != 0).any()
  assert traces == [1, 2]
