"""OWL-ViT: boxes and scores at any size, where boxes begin, queries that are padding, what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexivit_jax import errors
from flexivit_jax.models import OwlViT
from flexivit_jax.models.owl_vit import centre_bias, corner_bias, with_queries
from flexivit_jax.training import steps

BACKBONE = dict(variant="mu", depth=1, patch_size=(8, 8), posemb_size=(3, 3))
TEXT = dict(width=16, depth=1, mlp_dim=32, num_heads=2, vocab_size=30, max_length=4)
SHAPES = {"image": (24, 24, 3), "queries": (3, 4)}


def detector(**fields):
  return OwlViT(**{"num_classes": 3, "backbone": BACKBONE, "embed_dim": 8, **fields})


def parameters(model, shapes=SHAPES, seed=0):
  shapes = {k: v for k, v in shapes.items() if k in model.inputs}
  params = jax.jit(lambda: steps.init_params(model, shapes, seed))()
  rng = np.random.default_rng(seed)  # away from zeros, so that every parameter matters
  return {"params": jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape).astype("f"), params)}


def run(model, params, *arrays, **size):
  return jax.jit(lambda p, *x: model.apply(p, *x, **size)[1])(params, *arrays)


def images(n=2):
  return np.random.default_rng(1).normal(size=(n, 24, 24, 3)).astype("f")


@pytest.mark.parametrize("objectness", [False, True])
def test_every_token_has_a_box_and_scores_at_every_size(objectness):
  model = detector(objectness=objectness)
  params = parameters(model)
  for seqhw in (2, 3):
    out = run(model, params, images(), seqhw=seqhw)
    assert out["pred_boxes"].shape == (2, seqhw**2, 4)
    assert out["class_logits"].shape == (2, seqhw**2, 3)
    assert model.outputs.keys() == out.keys()


def test_boxes_begin_at_their_patches():
  for rows, columns in ((3, 5), (15, 15), (1, 1)):
    box = 1 / (1 + np.exp(-centre_bias((rows, columns)).astype(np.float64)))
    i, j = rows // 2, columns - 1
    want = [(j + 0.5) / columns, (i + 0.5) / rows, 1 / columns, 1 / rows]
    # A side as long as the image is held off 1 by the 1e-4 of the logit.
    np.testing.assert_allclose(box[i, j], want, atol=2e-4)


def test_boxes_begin_as_large_as_they_are_told_to():
  given = detector(box_size=(1 / 3, 1 / 3))
  params = parameters(given)
  # At three patches a side that is a patch; elsewhere another.
  for seqhw, same in ((3, True), (2, False)):
    one, other = (
      run(model, params, images(), seqhw=seqhw)["pred_boxes"] for model in (given, detector())
    )
    assert np.allclose(one, other, atol=1e-6) == same
    np.testing.assert_allclose(one[..., :2], other[..., :2], atol=1e-6)
  with pytest.raises(errors.UserError, match=r"box_size=\(0\.5, 2\.0\); expected two shares"):
    detector(box_size=(0.5, 2.0))


def test_the_corner_bias_is_the_published_formula():
  """Values of log(x + 1e-4) - log1p(-x + 1e-4) by hand, at x = 1/5, 1 and 2/5."""
  bias = corner_bias((5, 5))
  np.testing.assert_allclose(bias[0, 0], [-1.385919] * 4, atol=1e-5)
  np.testing.assert_allclose(bias[4, 1, :2], [-0.405382, 9.210440], atol=1e-5)
  slope = 1 / (1 + np.exp(-bias[..., :2])) * 1 / (1 + np.exp(bias[..., :2]))
  assert (slope.min(-1) < 2e-4).mean() == 9 / 25


def test_queries_of_padding_describe_nothing_and_change_nothing():
  model = detector(text=TEXT)
  params = parameters(model)
  queries = np.random.default_rng(0).integers(1, 30, (2, 3, 4)).astype("i")
  out = run(model, params, images(), queries, seqhw=3)
  padded = np.concatenate([queries, np.zeros((2, 2, 4), "i")], axis=1)
  more = run(model, params, images(), padded, seqhw=3)
  np.testing.assert_allclose(more["class_logits"][..., :3], out["class_logits"], atol=1e-5)
  assert (more["class_logits"][..., 3:] == -1e6).all()


def test_an_embedded_query_is_as_the_query():
  vectors = np.random.default_rng(0).normal(size=(2, 3, 5)).astype("f")
  model = detector(query_length=5)
  params = parameters(model, SHAPES | {"queries": (3, 5)})
  want = run(model, params, images(), vectors, seqhw=2)
  embedded = jax.jit(lambda p, q: model.apply(p, queries=q)[0])(params, vectors)
  got = jax.jit(lambda p, x, e: model.apply(p, x, embedded=e, seqhw=2)[1])(
    params, images(), embedded
  )
  np.testing.assert_allclose(got["class_logits"], want["class_logits"], atol=1e-6)


def test_a_detector_with_fixed_queries_is_as_the_one_that_was_given_them():
  """With the mean of the embeddings of two sentences for each name, the mean of the logits."""
  model = detector(text=TEXT)
  params = parameters(model)
  tokens = np.random.default_rng(0).integers(1, 30, (2, 3, 4)).astype("i")
  both = [run(model, params, images(1), one[None], seqhw=3) for one in tokens]
  mean = np.mean([out["query_embeddings"][0] for out in both], axis=0)
  closed, fixed = with_queries(model, params["params"], mean)
  assert not closed.open and closed.num_classes == 3 and "text" not in fixed
  out = run(closed, {"params": fixed}, images(1), seqhw=3)
  want = np.mean([out["class_logits"] for out in both], axis=0)
  np.testing.assert_allclose(out["class_logits"], want, atol=1e-5)
  np.testing.assert_array_equal(out["pred_boxes"], both[0]["pred_boxes"])


def test_scores_are_the_formula_in_float64():
  model = detector(merge="none", backbone=BACKBONE | {"pool_type": "gap"})
  params = parameters(model)
  backbone = {"params": params["params"]["backbone"]}
  part = model.parts["backbone"]
  tokens = jax.jit(lambda p, x: part.apply(p, x, method="features", seqhw=3).tokens)(
    backbone, images()
  )
  p = jax.tree.map(lambda x: np.asarray(x, np.float64), params["params"])
  x = np.asarray(tokens, np.float64).reshape(2, 9, -1)
  x = x - x.mean(-1, keepdims=True)
  x = x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6)
  x = x * p["merged_class_token"]["scale"] + p["merged_class_token"]["bias"]

  def dense(name):
    return x @ p[name]["kernel"] + p[name]["bias"]

  own, named = dense("class_embedding"), p["queries"][0]
  own, named = (v / (np.linalg.norm(v, axis=-1, keepdims=True) + 1e-6) for v in (own, named))
  scale = dense("class_scale")
  scale = np.where(scale > 0, scale, np.expm1(scale)) + 1
  want = (own @ named.T + dense("class_shift")) * scale
  out = run(model, params, images(), seqhw=3)
  np.testing.assert_allclose(out["class_logits"], want, atol=2e-5)


def test_every_class_begins_unlikely():
  model = detector()
  params = {"params": jax.jit(lambda: steps.init_params(model, {"image": (24, 24, 3)}, 0))()}
  p = jax.nn.sigmoid(run(model, params, images(), seqhw=3)["class_logits"])
  assert float(p.max()) < 0.5
  np.testing.assert_allclose(params["params"]["class_shift"]["bias"], -4.59512, atol=1e-5)
  boxes = run(model, params, images(), seqhw=3)["pred_boxes"]
  np.testing.assert_allclose(boxes[0, 4], [0.5, 0.5, 1 / 3, 1 / 3], atol=2e-4)


@pytest.mark.parametrize(
  ("fields", "expected"),
  [
    (dict(merge="sum"), "merge 'sum'"),
    (dict(box_bias="middle"), "box_bias 'middle'"),
    (dict(backbone=BACKBONE | {"pool_type": "gap"}), "expected 'tok', or merge='none'"),
    (dict(text=TEXT, query_length=5), "both say what a query is"),
  ],
)
def test_a_field_that_no_detector_has_is_refused(fields, expected):
  with pytest.raises(errors.UserError, match=expected):
    detector(**fields)


def test_queries_that_are_missing_or_too_many_are_refused():
  for model, queries, expected in (
    (detector(), jnp.ones((2, 3, 4), jnp.int32), "its classes; it takes none"),
    (detector(num_classes=0), None, "0 classes; expected 1 or more"),
    (detector(text=TEXT), None, "got none; give it names"),
  ):
    with pytest.raises(errors.UserError, match=expected):
      model.apply({"params": {}}, images(), queries, seqhw=3)
