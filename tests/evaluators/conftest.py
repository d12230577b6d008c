"""What tests of several evaluators use."""

import jax
import numpy as np
import pytest

from flexivit_jax.models import FlexiViT


@pytest.fixture(scope="module")
def model_and_params():
  """A model of three classes for grey images of 8 x 8 pixels at patches of 4 and 2, and random parameters."""
  model = FlexiViT(
    num_classes=3, width=8, depth=1, mlp_dim=8, num_heads=2, patch_size=(4, 4), posemb_size=(2, 2)
  )
  params = model.init(jax.random.key(0), np.zeros((1, 8, 8, 1)), seqhw=2)["params"]
  params = jax.tree.map(
    lambda p: p + 0.5 * jax.random.normal(jax.random.key(p.size), p.shape), params
  )
  return model, params
