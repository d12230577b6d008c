"""A detector is distilled over grids: each token follows the surest of the teacher's tokens that are nearest to it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexivit_jax.errors import UserError
from flexivit_jax.models import OwlViT
from flexivit_jax.objectives.distill import Teacher
from flexivit_jax.objectives.distill_detection import _losses, distill_detection, owners

BACKBONE = dict(patch_size=(6, 6), posemb_size=(4, 4), width=16, depth=1, mlp_dim=24, num_heads=2)


@pytest.fixture(scope="module")
def detector():
  """A small detector whose boxes and scores differ from token to token."""
  model = OwlViT(num_classes=3, backbone=BACKBONE, embed_dim=8)
  image = np.zeros((1, 24, 24, 3), "f")
  shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), image, seqhw=1))["params"]
  rng = np.random.default_rng(0)
  return model, jax.tree.map(lambda s: rng.normal(0, 0.3, s.shape).astype("f"), shapes)


def grid(rows, columns):
  y, x = np.mgrid[:rows, :columns] + 0.5
  return np.stack([x / columns, y / rows], -1).reshape(-1, 2).astype(np.float32)


def losses_of(detector, **size):
  model, params = detector
  objective = distill_detection(teachers={"t": Teacher(model, params, "image", {})})
  image = np.random.default_rng(1).normal(size=(2, 24, 24, 3)).astype("f")

  @jax.jit
  def loss(params, frozen):
    batch = {"image": image}
    batch["targets"] = objective.teaching.targets({"t": frozen}, batch)
    predict = lambda inputs: model.apply({"params": params}, **inputs, **size)[1]  # noqa: E731
    return objective.loss(predict, batch).mean()

  value, slope = jax.value_and_grad(loss)(params, params)
  return float(value), slope


def test_a_student_that_is_its_teacher_has_no_loss_at_its_size_and_some_at_others(detector):
  value, slope = losses_of(detector)
  assert abs(value) < 1e-5
  for seqhw in (2, 8):
    value, slope = losses_of(detector, seqhw=seqhw)
    assert value > 0.01
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(slope))
    assert np.abs(slope["box_2"]["kernel"]).max() > 0 and np.abs(slope["queries"]).max() > 0


@pytest.mark.parametrize(("theirs", "ours"), [((4, 4), (2, 2)), ((3, 5), (3, 5)), ((6, 4), (3, 2))])
def test_a_coarser_patch_owns_those_whose_centres_lie_in_it(theirs, ours):
  found = owners(jnp.asarray(grid(*theirs)), jnp.asarray(grid(*ours)))
  x, y = (grid(*theirs) * np.array(ours[::-1])).astype(int).T
  np.testing.assert_array_equal(found, y * ours[1] + x)


def test_finer_patches_own_at_most_one_and_all_tokens_have_an_owner():
  found = np.asarray(owners(jnp.asarray(grid(3, 3)), jnp.asarray(grid(8, 8))))
  assert len(set(found.tolist())) == 9
  assert np.abs(grid(8, 8)[found] - grid(3, 3)).max() <= 1 / 16 + 1e-6


def test_the_loss_is_that_of_a_loop():
  """Two of the student's tokens own two each, of which they follow the surest; the third owns none."""
  rng = np.random.default_rng(0)
  logits, theirs = rng.normal(size=(3, 2)), rng.normal(size=(4, 2))
  boxes, true = rng.uniform(0.2, 0.4, (3, 4)), rng.uniform(0.2, 0.4, (4, 4))
  owner, sigmoid = np.array([0, 2, 0, 2]), lambda z: 1 / (1 + np.exp(-z))
  scores = l1 = giou = weights = 0.0
  for token in range(3):
    own = [k for k in range(4) if owner[k] == token]
    q = sigmoid(logits[token])
    if not own:
      scores += -np.log(1 - q).sum()
      continue
    best = max(own, key=lambda k: theirs[k].max())
    p = sigmoid(theirs[best])
    scores += (p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))).sum()
    a, b = ((c[:2] - c[2:] / 2, c[:2] + c[2:] / 2) for c in (boxes[token], true[best]))
    both = np.prod(np.maximum(np.minimum(a[1], b[1]) - np.maximum(a[0], b[0]), 0))
    union = np.prod(a[1] - a[0]) + np.prod(b[1] - b[0]) - both
    hull = np.prod(np.maximum(a[1], b[1]) - np.minimum(a[0], b[0]))
    weights += p.max()
    l1 += p.max() * sum(np.abs(s - t).sum() for s, t in zip(a, b, strict=True))
    giou += p.max() * (1 - both / union + (hull - union) / hull)
  assert weights > 1
  arrays = (jnp.asarray(x, jnp.float32) for x in (logits, boxes, theirs, true))
  found = _losses(*arrays, jnp.asarray(owner))
  np.testing.assert_allclose(found, np.array([scores, l1, giou]) / weights, rtol=1e-5)


def test_queries_that_are_padding_cost_nothing():
  logits = jnp.array([[1.0, -1e6], [0.0, -1e6]])
  boxes, owner = jnp.full((2, 4), 0.5), jnp.array([0, 0])
  loss = lambda z: _losses(z, boxes, logits - 1.0, boxes, owner).sum()  # noqa: E731
  value, slope = jax.value_and_grad(loss)(logits)
  assert np.isfinite(value) and np.isfinite(slope).all() and not slope[:, 1].any()


def test_what_cannot_be_is_refused(detector):
  model, params = detector
  with pytest.raises(UserError, match="teachers is empty"):
    distill_detection(teachers={})
  teacher = Teacher(model, params, "image", {})
  with pytest.raises(UserError, match=r"giou_weight=-1.*finite number >= 0"):
    distill_detection(teachers={"t": teacher}, giou_weight=-1)
  objective = distill_detection(teachers={"t": teacher})
  target = {"class_logits": jnp.zeros((1, 4, 2)), "pred_boxes": jnp.zeros((1, 4, 4))}
  out = {"class_logits": jnp.zeros((1, 4, 3)), "pred_boxes": jnp.zeros((1, 4, 4))}
  batch = {"image": jnp.zeros((1, 24, 24, 3)), "targets": {"t": target}}
  with pytest.raises(UserError, match=r"teachers\.t scores 2 queries, the model 3"):
    objective.loss(lambda inputs: out, batch)
