"""Image and text in one file: a FlexiViT, a bag of words, the sigmoid loss. A stub, not the paper's model.

flexivit plan tests/stubs/image_text.py
flexivit train --config tests/stubs/image_text.py --workdir runs/image_text
"""

import zlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from flexivit_jax import specs
from flexivit_jax.data.preprocess import OPS
from flexivit_jax.models import MODELS, FlexiViT
from flexivit_jax.models.counting import Counted
from flexivit_jax.objectives import OBJECTIVES
from flexivit_jax.objectives.base import BatchLoss, Losses, Objective, keep

WORDS = 64


class TwoTowers(nn.Module, Counted):
  """Embeddings of unit length, and the scale and the bias of their products."""

  num_classes: int = 0
  variant: str = "mu"
  width: int = 16
  dtype: str = "float32"

  @nn.compact
  def __call__(self, image, tokens, *, train=False, **size):
    tower = FlexiViT(variant=self.variant, pool_type="gap", dtype=self.dtype, name="image")
    pooled = tower.features(image, train=train, **size).pooled
    words = nn.Embed(WORDS, self.width, name="words")(tokens).mean(1)
    scale = self.param("t", nn.initializers.constant(jnp.log(10.0)), (1,))
    bias = self.param("b", nn.initializers.constant(-2.0), (1,))
    out = {
      "image": _unit(nn.Dense(self.width, name="image_head")(pooled)),
      "text": _unit(nn.Dense(self.width, name="text_head")(words)),
      "t": jnp.repeat(scale, len(image)),
      "b": jnp.repeat(bias, len(image)),
    }
    return out["image"], out

  @property
  def inputs(self):
    return {"image": specs.image(), "tokens": specs.spec("l", "int")}

  @property
  def outputs(self):
    unit, scalar = specs.spec("width"), specs.spec("")
    return {"image": unit, "text": unit, "t": scalar, "b": scalar}

  @nn.nowrap
  def grid(self, image_hw, *, seqhw=None, grid_hw=None):
    return FlexiViT(variant=self.variant).grid(image_hw, seqhw=seqhw, grid_hw=grid_hw)


def _unit(x):
  return x / (jnp.linalg.norm(x, axis=-1, keepdims=True) + 1e-8)


def sigmoid() -> Objective:
  """Of each pair of an image and a text of the batch, whether they belong together (arXiv 2303.15343)."""

  def embed(predict, batch):
    return predict({"image": batch["image"], "tokens": batch["tokens"]})

  def loss(embedded, batch):
    del batch
    logits = embedded["image"] @ embedded["text"].T
    logits = logits * jnp.exp(embedded["t"])[:, None] + embedded["b"][:, None]
    signs = 2 * jnp.eye(len(logits)) - 1
    return Losses(-jax.nn.log_sigmoid(signs * logits).sum(-1))

  inputs = {"image": specs.image(), "tokens": specs.spec("l", "int")}
  outputs = ("image", "text", "t", "b")
  return Objective(inputs, outputs, keep(*inputs), BatchLoss(embed, loss))


def words(record, length):
  """Captions -> "tokens" int32 [length], a number for each word of the first one; 0 where there is none."""
  numbers = [1 + zlib.crc32(w.encode()) % (WORDS - 1) for w in record["captions"][0].split()]
  tokens = np.array((numbers + [0] * length)[:length], np.int32)
  return record | {"tokens": tokens}


MODELS["stub_two_towers"], OBJECTIVES["stub_sigmoid"] = TwoTowers, sigmoid
OPS["words"] = words


def get_config(arg=""):
  del arg
  c = ml_collections.ConfigDict()
  c.name = "stub of image_text"
  c.total_steps = 4
  data = dict(name="synthetic", split="train", image_size=24, num_classes=4, num_examples=32)
  pp = "decode|flip_lr|value_range|words(12)|keep('image', 'tokens')"
  c.input = dict(data=dict(data, annotated=True), pp=pp, batch_size=8, threads=0)
  c.model = dict(name="stub_two_towers")
  c.objective = dict(name="stub_sigmoid")
  c.flexi = dict(seqhw=dict(v=(2, 3, 4), share="flops"))
  c.optim = dict(lr=1e-2, clip=1.0)
  c.log_every = 1
  c.checkpoint = dict(every_steps=2)
  return c
