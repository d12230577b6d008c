"""Set prediction: matching against scipy, losses against loops in float64, images without boxes, too few tokens."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from flexivit_jax import errors
from flexivit_jax.objectives import OBJECTIVES
from flexivit_jax.objectives.detection import generalized_iou, matched

detection = OBJECTIVES["detection"]
T, M, Q = 12, 6, 4


def case(rng, t=T, m=M, q=Q, boxes=None):
  """Scores, predicted boxes (cx, cy, w, h), true boxes (x0, y0, x1, y1), targets, real; padding is of zeros."""
  number = rng.integers(0, m + 1) if boxes is None else boxes
  predicted = rng.uniform(0.05, 0.95, (t, 4))
  low, side = rng.uniform(0, 0.6, (m, 2)), rng.uniform(0.02, 0.4, (m, 2))
  true = np.concatenate([low, low + side], axis=1)
  targets = rng.random((m, q)) < 0.4
  targets[np.arange(m), rng.integers(0, q, m)] = True
  real = np.arange(m) < number
  true[~real], targets[~real] = 0, False
  arrays = rng.normal(size=(t, q)) * 3, predicted, true, targets
  return (*(x.astype("f") for x in arrays), real)


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def focal(x, positive, alpha=0.3, gamma=2.0):
  p = sigmoid(x)
  if positive:
    return -alpha * (1 - p) ** gamma * np.log(p)
  return -(1 - alpha) * p**gamma * np.log1p(-p)


def corners_of(box):
  cx, cy, w, h = box
  return np.array([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2])


def giou(a, b):
  inter = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
  union = sum((x[2] - x[0]) * (x[3] - x[1]) for x in (a, b)) - inter
  hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
  return inter / union - (hull - union) / hull


def costs(logits, predicted, true, targets, real):
  """Of each token and each real box."""
  logits, predicted, true = (x.astype(np.float64) for x in (logits, predicted, true))
  out = np.zeros((len(logits), int(real.sum())))
  for i in range(len(logits)):
    for j in range(out.shape[1]):
      labels = np.nonzero(targets[j])[0]
      label = sum(focal(logits[i, q], True) - focal(logits[i, q], False) for q in labels)
      b = true[j]
      centre = np.array([(b[0] + b[2]) / 2, (b[1] + b[3]) / 2, b[2] - b[0], b[3] - b[1]])
      l1 = np.abs(predicted[i] - centre).sum()
      out[i, j] = label + l1 - giou(corners_of(predicted[i]), b)
  return out


def loop(logits, predicted, true, targets, real):
  """Weighted sums of an image (class, L1, GIoU), positive labels, boxes; matched by scipy."""
  token, box = scipy.optimize.linear_sum_assignment(costs(logits, predicted, true, targets, real))
  goal = np.zeros(logits.shape)
  goal[token] = targets[box]
  x = logits.astype(np.float64)
  label = sum(focal(x[i], bool(goal[i])) for i in np.ndindex(x.shape))
  own = [corners_of(predicted[i].astype(np.float64)) for i in token]
  l1 = sum(np.abs(a - true[j]).sum() for a, j in zip(own, box, strict=True))
  far = sum(1 - giou(a, true[j]) for a, j in zip(own, box, strict=True))
  return np.array([label, l1, far]), goal.sum(), len(box)


@pytest.mark.parametrize(("t", "m", "number"), [(12, 6, 400), (40, 9, 300), (4, 7, 300)])
def test_matching_is_scipys_with_padding_and_with_too_few_tokens(t, m, number):
  rng = np.random.default_rng(t)
  cases = [case(rng, t, m) for _ in range(number)]
  whole = [np.stack(x) for x in zip(*cases, strict=True)]
  whole[2] = np.where(whole[4][..., None], whole[2], np.float32([0, 0, 1, 1]))
  got = jax.jit(jax.vmap(matched))(*map(jnp.asarray, whole))
  for i, one in enumerate(cases):
    cost = costs(*one)
    rows, columns = scipy.optimize.linear_sum_assignment(cost)
    real = np.asarray(got.real[i])
    pairs = np.asarray(got.token[i])[real], np.asarray(got.box[i])[real]
    assert len(pairs[0]) == min(t, one[4].sum()) == len(set(pairs[0])) == len(set(pairs[1]))
    np.testing.assert_allclose(cost[pairs].sum(), cost[rows, columns].sum(), atol=2e-4)


@pytest.mark.parametrize("normalization", ["example", "global"])
@pytest.mark.parametrize("t", [12, 3])
def test_losses_are_those_of_a_loop_in_float64(normalization, t):
  rng = np.random.default_rng(0)
  cases = [case(rng, t, boxes=b) for b in (0, 1, 6, 3)]
  logits, predicted, true, targets, real = (np.stack(x) for x in zip(*cases, strict=True))
  batch = dict(image=np.zeros((4, 2, 2, 3)), boxes=true, box_targets=targets, box_mask=real)
  batch["queries"] = np.ones((4, Q, 3), np.int32)
  out = {"class_logits": jnp.asarray(logits), "pred_boxes": jnp.asarray(predicted)}
  objective = detection(queries=True, normalization=normalization)
  got = jax.jit(lambda batch: objective.loss(lambda inputs: out, batch))(batch)
  each = [loop(*one) for one in cases]
  if normalization == "global":
    np.testing.assert_allclose(got.total, [x[0].sum() for x in each], rtol=1e-4)
    np.testing.assert_array_equal(got.weight, [x[2] for x in each])
    return
  want = [
    x[0][0] / max(x[1], 1) + (x[0][1] + x[0][2]) / max(x[2], 1) for x in each
  ]  # labels and boxes each by their own number
  np.testing.assert_allclose(got.total, want, rtol=1e-4)


def test_class_0_is_a_class_and_padding_is_none():
  objective = detection()
  boxes = jnp.tile(jnp.array([[0.1, 0.1, 0.4, 0.4]]), (1, 2, 1))
  batch = dict(image=jnp.zeros((1, 2, 2, 3)), boxes=boxes, box_mask=jnp.array([[True, False]]))
  out = {"pred_boxes": jnp.full((1, 3, 4), 0.3), "class_logits": jnp.zeros((1, 3, 2))}

  @jax.jit
  @jax.grad
  def gradient(x, labels):
    labelled = batch | {"box_labels": labels}
    return objective.loss(lambda inputs: out | {"class_logits": x}, labelled).mean()

  def slope(labels):
    return np.asarray(gradient(out["class_logits"], jnp.array([labels])))[0]

  assert (slope([0, 1])[:, 0] < 0).sum() == 1  # one token is asked for class 0
  assert (slope([0, 1])[:, 1] > 0).all()  # none for the class of the padding
  np.testing.assert_array_equal(slope([0, 1]), slope([0, 0]))


def test_multilabel_boxes_have_all_their_classes():
  rng = np.random.default_rng(1)
  logits, predicted, true, targets, real = (np.stack([x]) for x in case(rng, boxes=4))
  batch = dict(boxes=true, box_targets=targets, box_mask=real, image=np.zeros((1, 2, 2, 3)))
  out = {"class_logits": jnp.asarray(logits), "pred_boxes": jnp.asarray(predicted)}
  asked = batch | {"queries": np.ones((1, Q, 3), np.int32)}
  a, b = (
    jax.jit(functools.partial(detection(**one).loss, lambda inputs: out))(given)
    for one, given in ((dict(multilabel=True), batch), (dict(queries=True), asked))
  )
  np.testing.assert_array_equal(a.total, b.total)
  assert a.total.item() > 0


@pytest.mark.parametrize("number", [0, 3])
def test_images_without_boxes_and_predictions_without_area_have_finite_gradients(number):
  logits, predicted, true, targets, real = case(np.random.default_rng(0), boxes=number)
  targets[:, -1] = 0  # the last query is padding
  batch = dict(image=np.zeros((1, 2, 2, 3)), boxes=true[None], box_targets=targets[None])
  batch |= dict(box_mask=real[None], queries=np.ones((1, Q, 3), np.int32))
  batch = jax.tree.map(jnp.asarray, batch)
  objective = detection(queries=True)

  def mean(logits, boxes):
    out = {"class_logits": logits[None], "pred_boxes": boxes[None]}
    return objective.loss(lambda inputs: out, batch).mean()

  gradient = jax.jit(jax.value_and_grad(mean, argnums=(0, 1)))
  for boxes in (predicted, np.zeros_like(predicted)):
    scores = np.where(np.arange(Q) == Q - 1, -1e6, logits).astype("f")
    value, slopes = gradient(jnp.asarray(scores), jnp.asarray(boxes))
    assert np.isfinite(value)
    assert all(np.isfinite(x).all() for x in slopes)
    assert slopes[1].any() == (number > 0)
    assert not slopes[0][:, -1].any()


def test_giou_of_pairs_that_are_known():
  a = jnp.array([0.0, 0.0, 1.0, 1.0])
  pairs = {(0.0, 0.0, 1.0, 1.0): 1.0, (1.0, 0.0, 2.0, 1.0): 0.0, (2.0, 0.0, 3.0, 1.0): -1 / 3}
  for b, want in pairs.items():
    np.testing.assert_allclose(generalized_iou(a, jnp.array(b)), want, atol=1e-6)


@pytest.mark.parametrize(
  ("arguments", "expected"),
  [
    (dict(normalization="batch"), "normalization 'batch'"),
    (dict(l1_weight=-1.0), "l1_weight=-1.0; expected a finite number >= 0"),
    (dict(alpha=1.0), "alpha=1.0; expected a number between 0 and 1"),
    (dict(queries=True, multilabel=True), "Got queries and multilabel"),
  ],
)
def test_bad_arguments_are_refused(arguments, expected):
  with pytest.raises(errors.UserError, match=expected):
    detection(**arguments)
