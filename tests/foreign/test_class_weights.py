"""Class weights against PyTorch's."""

import jax
import numpy as np
import pytest

from flexivit_jax.objectives import losses

pytestmark = pytest.mark.convert


def test_weighted_losses_of_one_hot_labels_are_those_of_torch():
  import torch

  rng = np.random.default_rng(0)
  logits, labels = rng.normal(size=(9, 4)).astype(np.float32), rng.integers(0, 4, 9)
  weights = (0.5, 3.0, 0.25, 1.5)
  found = losses.weighted("softmax_xent", weights)(
    jax.numpy.asarray(logits), jax.nn.one_hot(labels, 4)
  )
  expected = torch.nn.functional.cross_entropy(
    torch.from_numpy(logits), torch.from_numpy(labels), torch.tensor(weights), reduction="none"
  )
  np.testing.assert_allclose(found, expected.numpy(), rtol=1e-5)
