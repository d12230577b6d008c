"""Detection in one file: each token of a FlexiViT says a box and a class. A stub, not the paper's model.

flexivit plan tests/stubs/detection.py
flexivit train --config tests/stubs/detection.py --workdir runs/detection
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections

from flexivit_jax import specs
from flexivit_jax.models import MODELS, FlexiViT
from flexivit_jax.models.counting import Counted
from flexivit_jax.objectives import OBJECTIVES
from flexivit_jax.objectives.base import Losses, Objective, keep


class Detector(nn.Module, Counted):
  """A box and the logits of its class for each token."""

  num_classes: int = 0
  variant: str = "mu"
  dtype: str = "float32"

  @nn.compact
  def __call__(self, image, *, train=False, **size):
    backbone = FlexiViT(variant=self.variant, pool_type="gap", dtype=self.dtype, name="backbone")
    tokens = backbone.features(image, train=train, **size).tokens
    out = {
      "boxes": nn.sigmoid(nn.Dense(4, name="boxes")(tokens)),
      "box_logits": nn.Dense(self.num_classes, name="classes")(tokens),
    }
    return out["boxes"], out

  @property
  def inputs(self):
    return {"image": specs.image()}

  @property
  def outputs(self):
    return {"boxes": specs.spec("gh gw 4"), "box_logits": specs.spec("gh gw classes")}

  @nn.nowrap
  def grid(self, image_hw, *, seqhw=None, grid_hw=None):
    return FlexiViT(variant=self.variant).grid(image_hw, seqhw=seqhw, grid_hw=grid_hw)


def centres() -> Objective:
  """Each box asks the token in which its centre lies; the mean over all boxes of the global batch."""

  def loss(predict, batch):
    out, boxes, real = predict({"image": batch["image"]}), batch["boxes"], batch["box_mask"]
    n, gh, gw, _ = out["boxes"].shape
    centre = (boxes[..., :2] + boxes[..., 2:]) / 2
    scale = jnp.array([gw, gh], jnp.float32)[None, None]
    column, row = jnp.moveaxis((centre * scale).astype(jnp.int32), -1, 0)
    at = jnp.arange(n)[:, None], jnp.clip(row, 0, gh - 1), jnp.clip(column, 0, gw - 1)
    far = jnp.abs(out["boxes"][at] - boxes).sum(-1)
    labels = jnp.maximum(batch["box_labels"], 0)[..., None]
    log_p = jax.nn.log_softmax(out["box_logits"][at])
    far -= jnp.take_along_axis(log_p, labels, axis=-1)[..., 0]
    real = real.astype(jnp.float32)
    return Losses((far * real).sum(-1), real.sum(-1))

  inputs = {
    "image": specs.image(),
    "boxes": specs.spec("m 4"),
    "box_labels": specs.spec("m", "int"),
    "box_mask": specs.spec("m", "any"),
  }
  return Objective(inputs, ("boxes", "box_logits"), keep(*inputs), loss)


MODELS["stub_detector"], OBJECTIVES["stub_centres"] = Detector, centres


def get_config(arg=""):
  del arg
  c = ml_collections.ConfigDict()
  c.name = "stub of detection"
  c.total_steps = 4
  data = dict(name="synthetic", split="train", image_size=32, num_classes=4, num_examples=32)
  pp = (
    "decode|inception_crop(24)|flip_lr|value_range|pad_boxes(6)|relative_boxes('xyxy')"
    "|keep('image', 'boxes', 'box_labels', 'box_mask')"
  )
  c.input = dict(data=dict(data, annotated=True), pp=pp, batch_size=8, threads=0)
  c.model = dict(name="stub_detector")
  c.objective = dict(name="stub_centres")
  c.flexi = dict(seqhw=dict(v=(2, 3, 4), share="flops"))
  c.optim = dict(lr=1e-2, clip=1.0)
  c.log_every = 1
  c.checkpoint = dict(every_steps=2)
  return c
