"""The Segmenter: its outputs at any size, padding, the decoders against float64, what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexivit_jax import errors
from flexivit_jax.models import Segmenter
from flexivit_jax.models.grid import padded_grid
from flexivit_jax.training import steps

BACKBONE = dict(variant="mu", depth=1, patch_size=(8, 8), posemb_size=(4, 4))
SHAPES = {"image": (24, 32, 3)}


def segmenter(**fields):
  return Segmenter(**{"num_classes": 5, "backbone": BACKBONE, "decoder_depth": 1, **fields})


def parameters(model, seed=0):
  params = jax.jit(lambda: steps.init_params(model, SHAPES, seed))()
  rng = np.random.default_rng(seed)  # away from zeros, so that every parameter matters
  return {"params": jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape).astype("f"), params)}


def run(model, params, image, **size):
  return jax.jit(lambda p, x: model.apply(p, x, **size))(params, image)


def images(*hw, n=2):
  return np.random.default_rng(1).normal(size=(n, *hw, 3)).astype("f")


@pytest.mark.parametrize("fields", [dict(decoder="linear"), {}, dict(fuse=2)])
def test_scores_of_every_pixel_at_every_size_from_the_same_weights(fields):
  model = segmenter(**fields)
  params = parameters(model)
  for size in (dict(patch_hw=(8, 8)), dict(grid_hw=(6, 8)), dict(seqhw=4)):
    pixels, out = run(model, params, images(24, 32), **size)
    grid = model.grid((24, 32), **size).grid_hw
    assert pixels.shape == (2, 24, 32, 5)
    assert out["patch_logits"].shape == (2, *grid, 5)
    assert model.outputs.keys() == out.keys()


@pytest.mark.parametrize("fuse", [0, 2])
def test_an_image_that_the_patch_does_not_divide_is_as_one_padded_by_hand(fuse):
  model = segmenter(fuse=fuse, decoder="linear")
  params, image = parameters(model), images(21, 27)
  got = run(model, params, image, patch_hw=(8, 8))[0]
  rows, columns = model.grid((21, 27), patch_hw=(8, 8)).grid_hw
  padded = np.zeros((2, rows * 8, columns * 8, 3), "f")
  padded[:, :21, :27] = image
  want = run(model, params, padded, patch_hw=(8, 8))[0][:, :21, :27]
  np.testing.assert_array_equal(got, want)
  more = padded[:, : rows * 8 - 1]  # any other padding that the same patches cover
  np.testing.assert_array_equal(run(model, params, more, patch_hw=(8, 8))[0][:, :21, :27], want)


def test_what_the_mask_decoder_says_is_its_formula_in_float64():
  model = segmenter()
  params, image = parameters(model), images(24, 32)
  block = params["params"]["decoder"]["blocks"]["encoderblock_0"]  # one that adds nothing
  for module, last in (("MultiHeadDotProductAttention_0", "out"), ("MlpBlock_0", "Dense_1")):
    block[module][last] = jax.tree.map(jnp.zeros_like, block[module][last])
  out = run(model, params, image, patch_hw=(8, 8))[1]
  p = jax.tree.map(lambda x: np.asarray(x, np.float64), params["params"]["decoder"])
  tokens = np.asarray(out["tokens"], np.float64).reshape(2, 12, -1)
  x = tokens @ p["projection"]["kernel"] + p["projection"]["bias"]
  x = np.concatenate([x, np.tile(p["classes"], (2, 1, 1))], axis=1)
  x = _layer_norm(x, p["blocks"]["encoder_norm"], 1e-6)
  patches, classes = x[:, :12] @ p["patch_kernel"], x[:, 12:] @ p["class_kernel"]
  patches, classes = (v / np.linalg.norm(v, axis=-1, keepdims=True) for v in (patches, classes))
  want = _layer_norm(patches @ classes.transpose(0, 2, 1), p["mask_norm"], 1e-5)
  np.testing.assert_allclose(out["patch_logits"].reshape(2, 12, 5), want, rtol=1e-4, atol=1e-4)


def _layer_norm(x, p, eps):
  x = x - x.mean(-1, keepdims=True)
  return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * p["scale"] + p["bias"]


def test_a_pixel_is_between_the_centres_of_its_patches():
  model = segmenter(decoder="linear")
  out = run(model, parameters(model), images(24, 32), patch_hw=(8, 8))[1]
  patch, pixel = (np.asarray(out[k], np.float64) for k in ("patch_logits", "pixel_logits"))
  y, x = 11, 17  # centres of patches are at 4, 12, 20, ... in pixels
  dy, dx = (y + 0.5 - 4) / 8, (x + 0.5 - 4) / 8
  i, j = int(dy), int(dx)
  a, b = dy - i, dx - j
  block = patch[:, i : i + 2, j : j + 2]
  want = (
    (1 - a) * ((1 - b) * block[:, 0, 0] + b * block[:, 0, 1])
    + a * ((1 - b) * block[:, 1, 0] + b * block[:, 1, 1])
  )  # fmt: skip
  np.testing.assert_allclose(pixel[:, y, x], want, atol=1e-5)
  np.testing.assert_allclose(pixel[:, 0, 0], patch[:, 0, 0], atol=1e-5)


def test_fusion_begins_as_the_fine_pass_alone():
  fine, fused = segmenter(decoder="linear"), segmenter(decoder="linear", fuse=2)
  params = steps.init_params(fused, {"image": (32, 32, 3)}, 0)
  alone = {k: v for k, v in params.items() if k != "fusion"}
  x = images(32, 32)
  a, b = run(fused, {"params": params}, x, seqhw=4), run(fine, {"params": alone}, x, seqhw=4)
  np.testing.assert_array_equal(a[0], b[0])


def test_parameters_depend_on_no_size():
  def shapes(*hw):
    made = jax.eval_shape(lambda: steps.init_params(segmenter(), {"image": (*hw, 3)}, 0))
    return jax.tree.map(lambda x: x.shape, made)

  assert shapes(24, 32) == shapes(64, 48)


@pytest.mark.parametrize(
  ("fields", "expected"),
  [
    (dict(decoder="upernet"), "decoder 'upernet'"),
    (dict(fuse=1), "fuse=1; expected 0 for one pass"),
    (dict(decoder_depth=0), "decoder_depth=0; expected 1 or more"),
    (dict(decoder_dropout=1.0), "decoder_dropout=1.0; expected 0 or more"),
  ],
)
def test_a_field_that_no_segmenter_has_is_refused(fields, expected):
  with pytest.raises(errors.UserError, match=expected):
    segmenter(**fields)


def test_no_classes_are_refused():
  with pytest.raises(errors.UserError, match=r"0 classes; expected 1 or more. Name them"):
    segmenter(num_classes=0).apply({"params": {}}, images(8, 8))


@pytest.mark.parametrize(
  ("hw", "size", "expected"),
  [
    ((24, 32), dict(seqhw=2, patch_hw=(8, 8)), "Give one of seqhw, grid_hw and patch_hw"),
    ((24, 32), dict(patch_hw=(0, 8)), r"patch_hw=\(0, 8\); expected numbers from 1 up"),
    ((10, 10), dict(seqhw=7), r"seqhw=7 does not fit.*2 x 2 pixels, 5 x 5 of them.*seqhw=5"),
    ((10, 12), dict(grid_hw=(7, 6)), r"grid_hw=\(7, 6\) does not fit.*grid_hw=\(5, 6\)"),
  ],
)
def test_a_size_that_covers_no_image_is_refused_and_the_advice_works(hw, size, expected):
  with pytest.raises(errors.UserError, match=expected):
    padded_grid(hw, (8, 8), **size)


def test_padded_grids_cover_the_image_without_a_patch_of_padding_alone():
  for height in range(1, 30):
    for p in range(1, 12):
      _, _, (rows, _) = padded_grid((height, 8), (8, 8), patch_hw=(p, 8))
      assert rows * p >= height > (rows - 1) * p


def test_gradients_are_finite_for_tokens_of_zeros():
  model = segmenter()
  params = jax.tree.map(jnp.zeros_like, parameters(model))
  slope = jax.jit(jax.grad(lambda p: model.apply(p, images(24, 32), seqhw=4)[0].sum()))(params)
  assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(slope))
