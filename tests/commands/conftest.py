"""Two small towers in a file, for commands about images and texts."""

import functools

import jax
import numpy as np
import pytest

from flexivit_jax import weights
from flexivit_jax.data import text
from flexivit_jax.models import TwoTowers
from flexivit_jax.weights import model_records


@pytest.fixture(scope="session")
def save_towers(tmp_path_factory):
  """Saves two small towers for images of 24 pixels and returns their file."""

  @functools.cache
  def save(bias=-1.0, tokenizer=True):
    model = TwoTowers(
      image=dict(width=16, depth=1, mlp_dim=16, num_heads=2, patch_size=(6, 6), posemb_size=(2, 2)),
      text=dict(width=12, depth=1, mlp_dim=16, num_heads=2, vocab_size=258, max_length=12),
      embed_dim=4,
      bias=bias,
    )
    inputs = np.zeros((1, 12, 12, 3), np.float32), np.zeros((1, 12), int)
    shapes = jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda s: rng.normal(0, 0.5, s.shape).astype(np.float32), shapes)
    pp = (
      "decode|resize(24)|value_range|first_caption|tokenize('gone.json', length=12, pad=1, end=1)"
    )
    record = {
      "model": model_records.record_of(model), "pp": f"{pp}|keep('image', 'tokens')",
      "source": {"file": "towers.npz", "format": "ours"}, "trained": {"seqhw": [2, 4]},
    }  # fmt: skip
    if tokenizer:
      record["text"] = text.load("bytes", length=12, pad="[PAD]", end="[END]").record()
    file = tmp_path_factory.mktemp("towers") / "towers.npz"
    weights.save_npz(file, model, params, record)
    return file

  return save
