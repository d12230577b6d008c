"""The original ViT's names, against the reference's logits."""

import jax
import numpy as np
import pytest

from flexivit_jax import trees, weights
from flexivit_jax.errors import UserError
from flexivit_jax.weights import big_vision


def logits(model, params, image, **size):
  with jax.default_matmul_precision("highest"):
    return np.asarray(model.apply({"params": params}, image, **size)[0])


def test_only_a_position_too_many_is_folded_into_the_class_token():
  position = np.arange(10.0, dtype=np.float32).reshape(1, 10, 1)
  cls = np.ones((1, 1, 1), np.float32)
  grid, token = big_vision.split_position(position, cls)
  np.testing.assert_array_equal(grid, position[:, 1:])
  assert token == cls + position[:, :1]
  grid, token = big_vision.split_position(position[:, :9], cls)
  np.testing.assert_array_equal(grid, position[:, :9])
  assert token == cls
  assert big_vision.split_position(position, cls, (2, 5))[0].shape[1] == 10
  assert big_vision.split_position(position[:, :7], cls, (2, 3))[0].shape[1] == 6


@pytest.mark.shared
def test_the_original_vit_gives_its_golden_logits(shared):
  model, params, record = weights.load_with_record(shared / "golden" / "vit_original.ckpt.npz")
  assert (model.patch_size, model.posemb_size, model.gelu) == ((16, 16), (8, 8), "tanh")
  assert record["image_size"] == [128, 128]
  with np.load(shared / "golden" / "vit_original.golden.npz") as want:
    got = logits(model, params, want["image"])
    np.testing.assert_allclose(got, want["vit_logits"], rtol=0, atol=1e-4)


@pytest.mark.shared
def test_flexified_at_load_it_gives_the_references_arrays_and_logits(shared):
  file = shared / "golden" / "vit_original.ckpt.npz"
  model, params = weights.load(file, flexify=((32, 32), (7, 7)))
  with np.load(shared / "golden" / "vit_original.golden.npz") as want:
    got = trees.flatten(params)
    kernel = got["embedding/kernel"]
    np.testing.assert_allclose(kernel, want["flexi_kernel"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(got["pos_embedding"], want["flexi_pos_embedding"], rtol=0, atol=1e-6)
    np.testing.assert_array_equal(got["cls"], want["flexi_cls"])
    for seqhw in (4, 8, 16):
      out = logits(model, params, want["image"], seqhw=seqhw)
      np.testing.assert_allclose(out, want[f"flexi_logits_{seqhw:02d}"], rtol=0, atol=1e-4)


@pytest.mark.shared
def test_a_buffer_smaller_than_the_kernel_is_refused(shared):
  with pytest.raises(UserError, match="would lose detail"):
    weights.load(shared / "golden" / "vit_original.ckpt.npz", flexify=((8, 8), (7, 7)))
