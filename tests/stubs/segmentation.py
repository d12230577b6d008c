"""Segmentation in one file: a linear layer on the tokens of a FlexiViT, upsampled. A stub, not the paper's model.

flexivit plan tests/stubs/segmentation.py
flexivit train --config tests/stubs/segmentation.py --workdir runs/segmentation
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections

from flexivit_jax import specs
from flexivit_jax.data.annotations import NO_CLASS
from flexivit_jax.models import MODELS, FlexiViT
from flexivit_jax.models.counting import Counted
from flexivit_jax.objectives import OBJECTIVES
from flexivit_jax.objectives.base import Losses, Objective, keep


class Segmenter(nn.Module, Counted):
  """Logits of each pixel."""

  num_classes: int = 0
  variant: str = "mu"
  dtype: str = "float32"

  def setup(self):
    self.backbone = FlexiViT(variant=self.variant, pool_type="gap", dtype=self.dtype)
    self.head = nn.Dense(self.num_classes)

  def __call__(self, image, *, train=False, **size):
    logits = self.head(self.backbone.features(image, train=train, **size).tokens)
    shape = (*image.shape[:3], self.num_classes)
    logits = jax.image.resize(logits, shape, "linear")
    return logits, {"pixel_logits": logits}

  @property
  def inputs(self):
    return {"image": specs.image()}

  @property
  def outputs(self):
    return {"pixel_logits": specs.spec("h w classes")}

  @nn.nowrap
  def grid(self, image_hw, *, seqhw=None, grid_hw=None):
    return FlexiViT(variant=self.variant).grid(image_hw, seqhw=seqhw, grid_hw=grid_hw)


def pixels() -> Objective:
  """Cross-entropy, the mean over all pixels of the global batch that have a class."""

  def loss(predict, batch):
    logits, mask = predict({"image": batch["image"]})["pixel_logits"], batch["mask"]
    counts = mask != NO_CLASS
    labels = jnp.where(counts, mask, 0)
    log_p = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], axis=-1)[..., 0]
    return Losses(-(log_p * counts).sum((1, 2)), counts.sum((1, 2)).astype(jnp.float32))

  inputs = {"image": specs.image(), "mask": specs.spec("h w", "int")}
  return Objective(inputs, ("pixel_logits",), keep("image", "mask"), loss)


MODELS["stub_segmenter"], OBJECTIVES["stub_pixels"] = Segmenter, pixels


def get_config(arg=""):
  del arg
  c = ml_collections.ConfigDict()
  c.name = "stub of segmentation"
  c.total_steps = 4
  data = dict(name="synthetic", split="train", image_size=32, num_classes=4, num_examples=32)
  pp = "decode|inception_crop(24)|flip_lr|value_range|keep('image', 'mask')"
  c.input = dict(data=dict(data, annotated=True), pp=pp, batch_size=8, threads=0)
  c.model = dict(name="stub_segmenter")
  c.objective = dict(name="stub_pixels")
  c.flexi = dict(seqhw=dict(v=(2, 3, 4), share="flops"))
  c.optim = dict(lr=1e-2, clip=1.0)
  c.log_every = 1
  c.checkpoint = dict(every_steps=2)
  return c
