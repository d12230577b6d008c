"""What an objective says of itself is true: of its examples, its inputs, its outputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexivit_jax.objectives import OBJECTIVES, losses
from flexivit_jax.objectives.base import Losses
from flexivit_jax.objectives.distill import Teacher

ARGUMENTS = {
  "distill": dict(teachers={"t": Teacher(None, {}, "image", {})}, label_weight=0.5, top_k=2),
  "distill_embeddings": dict(teachers={"t": Teacher(None, {}, "image", {})}),
  "distill_detection": dict(teachers={"t": Teacher(None, {}, "image", {})}),
  "self_distill": dict(size={"seqhw": 3}),
}
# What an objective takes of the model; the others take its logits.
OUTPUTS = {
  "detection": {"class_logits", "pred_boxes"},
  "distill_embeddings": {"pre_logits"},
  "distill_detection": {"class_logits", "patch_centres", "pred_boxes"},
  "segmentation": {"pixel_logits"},
  "sigmoid_contrastive": {"image", "text", "t", "b"},
  "softmax_contrastive": {"image", "text", "t"},
}


def predict(inputs, *, fixed=False, **size):
  """A model whose logits are sums of its images."""
  del size
  image = inputs["image"] * (0.5 if fixed else 1.0)
  return {"logits": image.sum((1, 2)), "pixel_logits": image} | {
    "class_logits": image[:, 0], "pred_boxes": jax.nn.sigmoid(jnp.tile(image[:, 0, :, :1], (1, 1, 4))),
    "patch_centres": jnp.tile(jnp.array([[0.25, 0.5], [0.75, 0.5]]), (len(image), 1, 1)),
  }  # fmt: skip


def batch(name=""):
  rng = np.random.default_rng(0)
  image = jnp.asarray(rng.normal(size=(8, 2, 2, 3)), jnp.float32)
  target = losses.sparse_logits(jnp.asarray(rng.normal(size=(8, 3)), jnp.float32), 2)
  labels, tokens = jnp.eye(3)[jnp.arange(8) % 3], jnp.ones((8, 4), jnp.int32)
  mask = jnp.arange(32).reshape(8, 2, 2) % 4 - 1
  boxes = jnp.tile(jnp.array([[0.1, 0.2, 0.5, 0.6], [0.4, 0.1, 0.9, 0.8]]), (8, 1, 1))
  if name == "distill_detection":
    target = {k: v for k, v in predict({"image": image + 1}).items() if k in OUTPUTS[name]}
  return {
    "image": image, "labels": labels, "tokens": tokens, "mask": mask, "targets": {"t": target},
    "boxes": boxes, "box_labels": mask[:, 0], "box_mask": mask[:, 0] >= 0,
  }  # fmt: skip


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_the_loss_of_an_example_depends_on_no_other_one_unless_it_says_so(name):
  objective = OBJECTIVES[name](**ARGUMENTS.get(name, {}))
  if not objective.separable:
    return  # it says so
  loss = jax.jit(lambda batch: objective.loss(predict, batch))
  whole = loss(batch(name))
  for i in range(0, 8, 2):
    part = loss(jax.tree.map(lambda x, i=i: x[i : i + 2], batch(name)))
    got, want = (
      jax.tree.leaves(x) for x in (part, jax.tree.map(lambda x, i=i: x[i : i + 2], whole))
    )
    for a, b in zip(got, want, strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-6)


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_nothing_else_of_the_batch_is_taken(name):
  objective = OBJECTIVES[name](**ARGUMENTS.get(name, {}))
  taken = {k: v for k, v in batch().items() if k in (*objective.inputs, "targets")}
  prepared = objective.prepare(taken, jax.random.key(0))
  assert set(prepared) <= set(taken)
  assert set(objective.outputs) == OUTPUTS.get(name, {"logits"})


def test_a_mean_of_sums_is_divided_once():
  total, weight = jnp.array([6.0, 0.0, 4.0]), jnp.array([3.0, 0.0, 1.0])
  assert float(Losses(total, weight).mean()) == 2.5
  assert float(Losses(total).mean()) == pytest.approx(10 / 3)
  assert float(Losses(jnp.zeros(3), jnp.zeros(3)).mean()) == 0
  slope = jax.grad(lambda w: Losses(total, w).mean())(weight)
  assert not slope.any()  # weights count examples; nothing is learned from them
