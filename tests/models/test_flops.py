"""What a model costs against the paper's numbers, and against the products in its traced program."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexivit_jax.models import FlexiViT, counting, flops

FIELDS = dict(num_classes=5, width=16, depth=2, mlp_dim=24, num_heads=4)


def make(**fields):
  return FlexiViT(**{**FIELDS, **fields})


def multiply_adds(model, image_hw, **size):
  """Of all products in the forward pass of one image, as it is traced."""
  image = jax.ShapeDtypeStruct((1, *image_hw, 3), jnp.float32)
  params = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, seqhw=1), image)
  return _multiply_adds(jax.make_jaxpr(lambda p, x: model.apply(p, x, **size))(params, image).jaxpr)


# paper.md 1.10: multiply-adds in 1e9 at 240 px, with the class token, at ten grids.
GRIDS = (5, 6, 8, 10, 12, 15, 16, 20, 24, 30)
GMACS = {
  "S": (0.62, 0.86, 1.49, 2.30, 3.34, 5.34, 6.13, 10.06, 15.39, 26.68),
  "B": (2.35, 3.30, 5.73, 8.90, 12.84, 20.27, 23.18, 37.16, 55.28, 91.62),
  "L": (8.06, 11.42, 20.01, 31.18, 45.0, 70.94, 81.03, 129.2, 190.8, 312.2),
}


@pytest.mark.parametrize("variant", GMACS)
def test_gmacs_are_those_of_the_papers_models(variant):
  model = FlexiViT(variant=variant, num_classes=1000)
  for grid, want in zip(GRIDS, GMACS[variant], strict=True):
    got = model.gmacs({"image": (240, 240, 3)}, seqhw=grid)
    np.testing.assert_allclose(got, want, rtol=0.01, err_msg=f"{variant} {grid}")


def _multiply_adds(jaxpr):
  """Of all matrix products and convolutions in a jaxpr, also in those that it calls."""
  total = 0
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == "dot_general":
      shape, (contracted, _) = eqn.invars[0].aval.shape, eqn.params["dimension_numbers"][0]
      total += math.prod(eqn.outvars[0].aval.shape) * math.prod(shape[i] for i in contracted)
    if eqn.primitive.name == "conv_general_dilated":
      kernel = eqn.invars[1].aval.shape
      out_channels = kernel[eqn.params["dimension_numbers"].rhs_spec[0]]
      total += math.prod(eqn.outvars[0].aval.shape) * math.prod(kernel) // out_channels
    inner = [p.jaxpr for p in eqn.params.values() if hasattr(p, "jaxpr")]
    total += sum(_multiply_adds(getattr(j, "jaxpr", j)) for j in inner)
  return total


@pytest.mark.parametrize("registers", [0, 2])
@pytest.mark.parametrize("pool", ["tok", "gap", "map", "tok+gap"])
def test_gmacs_count_the_matrix_products_that_are_run(pool, registers):
  # Kernel and grid as stored, so that nothing is resized.
  model = make(pool_type=pool, patch_size=(12, 4), posemb_size=(2, 6), registers=registers)
  counted = multiply_adds(model, (24, 24))
  logits_2d = ("+" not in pool) * 12 * 16 * 5  # which nobody pays for who does not read them
  want = model.gmacs({"image": (24, 24, 3)}, grid_hw=(2, 6)) * 1e9
  np.testing.assert_allclose(counted - logits_2d, want, rtol=1e-12)


@pytest.mark.parametrize(
  ("size", "grid_hw"),
  [
    (dict(stride=3), (5, 7)),
    (dict(stride=6, depth=1), (3, 4)),
    (dict(depth=1), (2, 6)),
    (dict(depth=2), (2, 6)),
  ],
)
def test_gmacs_count_what_stride_and_depth_run(size, grid_hw):
  model = make(pool_type="map", depth=3, patch_size=(12, 4), posemb_size=grid_hw)
  image_hw = (24, 22 if "stride" in size else 24)
  assert model.grid(image_hw, **size).grid_hw == grid_hw
  counted = multiply_adds(model, image_hw, **size)
  logits_2d = math.prod(grid_hw) * 16 * 5
  want = model.gmacs({"image": (*image_hw, 3)}, **size) * 1e9
  np.testing.assert_allclose(counted - logits_2d, want, rtol=1e-12)


@pytest.mark.parametrize(
  ("remat", "form"),
  [("blocks", "einsum"), ("dots", "einsum"), (False, "one_by_one"), ("blocks", "one_by_one")],
)
def test_what_the_backward_pass_does_again_is_what_the_traced_program_has_more(remat, form):
  shapes = {"image": (24, 24, 3)}
  image = jax.ShapeDtypeStruct((1, 24, 24, 3), jnp.float32)

  def count(model):
    params = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, seqhw=1), image)
    loss = lambda p, x: model.apply(p, x, seqhw=4)[0].sum()  # noqa: E731
    traced = jax.jit(jax.grad(loss)).trace(params, image).jaxpr.jaxpr
    return counting._macs(
      jax.interpreters.partial_eval.dce_jaxpr(traced, [True] * len(traced.outvars))[0]
    )

  model = make(depth=3, scan=True, attention="einsum")
  again = model.clone(remat=remat, attention=form)
  want = flops.recomputed(again, shapes, seqhw=4) * 1e9
  assert want > 0 == flops.recomputed(model, shapes, seqhw=4)
  np.testing.assert_allclose(count(again) - count(model), want, rtol=1e-12)


@pytest.mark.parametrize("remat", [False, "blocks"])
def test_what_the_kernel_for_tpus_computes_besides_is_what_its_programs_have_more(remat):
  """With 257 tokens, which it pads to 384; traced, not run."""
  shapes = {"image": (32, 32, 3)}
  image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)

  def count(**fields):
    model = make(width=128, num_heads=2, depth=1, **fields)
    params = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, seqhw=1), image)
    loss = lambda p, x: model.apply(p, x, seqhw=16)[0].sum()  # noqa: E731
    traced = jax.jit(jax.grad(loss)).trace(params, image).jaxpr.jaxpr
    used = jax.interpreters.partial_eval.dce_jaxpr(traced, [True] * len(traced.outvars))[0]
    return counting._macs(used), flops.recomputed(model, shapes, seqhw=16) * 1e9

  (plain, none), (kernel, want) = (
    count(attention="einsum"),
    count(attention="splash:tpu", remat=remat),
  )
  assert none == 0 and want > 9 * 384**2 * 128 - 6 * 257**2 * 128 - 1
  np.testing.assert_allclose(kernel - plain, want, rtol=1e-3)  # and a product of length times width


def test_a_forward_pass_takes_what_one_block_works_on():
  """A teacher's, of which nothing is kept: within a factor of 1.3 of XLA's own figure on a CPU."""
  model = FlexiViT(variant="Ti", depth=3, num_classes=10, attention="einsum")
  seqhw, side = 14, 224
  image = jax.ShapeDtypeStruct((16, side, side, 3), jnp.float32)
  params = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, seqhw=1), image)
  forward = lambda p, x: model.apply(p, x, seqhw=seqhw)[0]  # noqa: E731
  found = jax.jit(forward).lower(params, image).compile().memory_analysis().temp_size_in_bytes
  want = 16 * flops.forward_bytes(model, {"image": (side, side, 3)}, seqhw=seqhw)
  assert found / 1.3 < want < found * 1.3, (found, want)
  assert want < 16 * model.activation_bytes({"image": (side, side, 3)}, seqhw=seqhw) / 5


def test_scores_count_where_the_form_of_attention_keeps_them():
  def size(form, seqhw):
    model = make(variant="S", dtype="bfloat16", attention=form)
    return model.activation_bytes({"image": (240, 240, 3)}, seqhw=seqhw)

  assert size("auto:tpu", 5) == size("einsum", 5)
  assert (
    size("einsum", 30) - size("auto:tpu", 30) == 2 * 901 * 901 * 4 * 6
  )  # blocks, heads; float32 and bfloat16
  assert size("auto:tpu v3", 30) == size("einsum", 30)
