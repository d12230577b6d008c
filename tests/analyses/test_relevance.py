"""Attention relevance: a case that is known in closed form, each part against a plain one, and the tool on a run."""

import csv
import json
import runpy
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexivit_jax import weights
from flexivit_jax.analyses import relevance
from flexivit_jax.errors import UserError
from flexivit_jax.models import vit
from flexivit_jax.models.flexivit import FlexiViT

FIELDS = dict(
  num_classes=5, patch_size=(4, 4), posemb_size=(3, 3), width=16, depth=2, mlp_dim=24, num_heads=4
)


def make(**fields):
  """Returns (model, params): small, every array random, so that each one matters."""
  model = FlexiViT(**{**FIELDS, **fields})
  image = jax.ShapeDtypeStruct((1, 12, 12, 3), jnp.float32)
  shapes = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, seqhw=1), image)["params"]
  rng = np.random.default_rng(0)
  return model, jax.tree.map(lambda s: rng.normal(size=s.shape).astype(np.float32) * 0.3, shapes)


@pytest.fixture
def image():
  return np.random.default_rng(1).uniform(-1, 1, size=(2, 12, 12, 3)).astype(np.float32)


def run(model, params, image, classes=None, **size):
  """`relevance`, compiled, and the model's own logits."""
  one = jax.jit(lambda p, x, c: relevance.relevance(model, p, x, c, **size))
  two = jax.jit(lambda p, x: model.apply({"params": p}, x, **size)[0])
  return one(params, image, classes), two(params, image)


# Patterns of width 4 with mean 0 and mean square 1, orthogonal to each other.
KEY, VALUE, CLS = np.array([[1, 1, -1, -1], [1, -1, -1, 1], [1, -1, 1, -1]], np.float32)


def one_head():
  """A model of one block and one head; a pixel of value (cos t, sin t) is a patch.

  Its token is cos t KEY + sin t VALUE, which LayerNorm leaves as it is, as it does CLS, the class token. The query is
  the same for all tokens and meets 3 cos t at a patch and 0 at the class token; the value is sin t VALUE, there 0. The
  MLP is 0. So the class token becomes CLS + s VALUE with s = sum_j a_j sin t_j, a = softmax(3 cos t_j, and 0 for
  itself), and the last LayerNorm divides by sqrt(1 + s^2). Classes 0 and 1 read plus and minus the part of VALUE: the
  logits are +- s / sqrt(1 + s^2).
  """
  model = FlexiViT(
    num_classes=2, patch_size=(1, 1), posemb_size=(1, 1), width=4, depth=1, mlp_dim=4, num_heads=1, layer_norm_eps=1e-12
  )  # fmt: skip
  start = model.init(jax.random.key(0), jnp.zeros((1, 1, 1, 2)), seqhw=1)["params"]
  scales = jax.tree_util.tree_map_with_path(
    lambda path, a: np.asarray(a) if path[-1].key == "scale" else np.zeros(a.shape, a.dtype), start
  )
  params, first = scales, np.eye(4, dtype=np.float32)[0]
  params["embedding"]["kernel"][0, 0] = KEY, VALUE
  params["cls"][0, 0] = CLS
  attention = params["Transformer"]["encoderblock_0"]["MultiHeadDotProductAttention_0"]
  attention["query"]["bias"][0] = 2 * 3 * first  # divided by sqrt(4)
  attention["key"]["kernel"][:, 0] = np.outer(KEY / 4, first)
  attention["value"]["kernel"][:, 0] = np.outer(VALUE / 4, first)
  attention["out"]["kernel"][0] = np.outer(first, VALUE)
  params["head"]["kernel"][:] = np.outer(VALUE / 4, (1, -1))
  return model, params


@pytest.mark.parametrize("asked", [0, 1])
def test_one_head_in_closed_form(asked):
  """d logit / d a_j = +- sin t_j (1 + s^2)^(-3/2), so the relevance is max(0, +- a_j sin t_j) (1 + s^2)^(-3/2)."""
  model, params = one_head()
  angle = np.array([[0.3, -0.8, 2.0], [-2.5, 1.2, 0.1]])
  image = np.stack([np.cos(angle), np.sin(angle)], axis=-1)[None].astype(np.float32)
  a = np.exp(3 * np.cos(angle)) / (1 + np.exp(3 * np.cos(angle)).sum())
  s = (a * np.sin(angle)).sum()
  sign = 1 - 2 * asked
  got, _ = run(model, params, image, np.array([asked]), patch_hw=(1, 1))
  np.testing.assert_allclose(got.logits[0, asked], sign * s / np.sqrt(1 + s**2), rtol=1e-5)
  want = np.maximum(0, sign * a * np.sin(angle)) * (1 + s**2) ** -1.5
  np.testing.assert_allclose(got.map[0], want, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(("pool_type", "seqhw"), [("tok", 3), ("gap", 2)])
def test_logits_are_the_models_own(pool_type, seqhw, image):
  """Unrolled and in a scan with recomputed blocks; and so are the relevances of both."""
  model, params = make(pool_type=pool_type, gelu="exact", layer_norm_eps=1e-3)
  scanned = model.clone(scan=True, remat=True)
  one, want = run(model, params, image, seqhw=seqhw)
  two, scanned_logits = run(scanned, vit.stack_blocks(params), image, seqhw=seqhw)
  np.testing.assert_allclose(one.logits, want, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(two.logits, scanned_logits, rtol=1e-5, atol=1e-5)
  assert one.map.shape == (2, seqhw, seqhw)
  np.testing.assert_allclose(one.map, two.map, rtol=1e-5, atol=1e-7)


def test_a_grid_that_is_not_square_and_fewer_blocks(image):
  model, params = make(pool_type="gap", registers=2)
  got, want = run(model, params, image, grid_hw=(2, 3), depth=1)
  np.testing.assert_allclose(got.logits, want, rtol=1e-5, atol=1e-5)
  assert got.map.shape == (2, 2, 3)


def parts(model, params, image, classes, **size):
  """Of each block the weights and the gradients, compiled."""
  fn = jax.jit(lambda p, x, c: relevance.with_gradients(model, p, x, c, **size)[:2])
  return fn(params, image, classes)


STENCIL = np.array([-2, -1, 1, 2], np.float32)  # of differences of fourth order


@pytest.mark.parametrize("pool_type", ["tok", "gap"])
def test_gradients_are_those_of_differences(pool_type, image):
  """Along the gradient of each block, and along a random half of its entries."""
  model, params = make(pool_type=pool_type)
  asked = np.array([3, 1])
  gradients = parts(model, params, image, asked, seqhw=2)[1]

  @jax.jit
  def score(nudges):
    logits, _ = relevance.nudged(model, params, image, nudges, seqhw=2)
    return logits[0, 3] + logits[1, 1]

  rng = np.random.default_rng(2)
  nothing = [jnp.zeros_like(g) for g in gradients]
  for block, gradient in enumerate(gradients):
    for part in (gradient, gradient * rng.integers(0, 2, gradient.shape)):
      way = part / jnp.linalg.norm(part)
      at = [score([*nothing[:block], step * way, *nothing[block + 1 :]]) for step in 0.1 * STENCIL]
      difference = (8 * (at[2] - at[1]) - (at[3] - at[0])) / 1.2
      np.testing.assert_allclose(difference, (gradient * way).sum(), rtol=1e-3)


@pytest.mark.parametrize("pool_type", ["tok", "gap", "tok+gap"])
def test_the_rule_is_that_of_whole_matrices(pool_type, image):
  model, params = make(pool_type=pool_type, registers=1)
  asked = np.array([0, 4])
  got, _ = run(model, params, image, asked, seqhw=3)
  blocks = list(zip(*parts(model, params, image, asked, seqhw=3), strict=True))
  before = model.prefix_length
  for n in range(2):
    whole = start = np.eye(before + 9)
    for w, g in blocks:
      product = np.asarray(w[n], np.float64) * np.asarray(g[n], np.float64)
      whole = whole + np.clip(product, 0, None).mean(axis=0) @ whole
    whole = whole - start
    row = np.zeros(before + 9)
    row += whole[0] if "tok" in pool_type else 0
    row += whole[before:].mean(axis=0) if "gap" in pool_type else 0
    np.testing.assert_allclose(got.map[n].ravel(), row[before:], rtol=1e-5, atol=1e-8)


def test_the_class_is_the_models_own_where_none_is_given(image):
  """And images do not interact."""
  model, params = make()
  got, logits = run(model, params, image, seqhw=2)
  asked = logits.argmax(axis=-1)
  for n in range(2):
    one, _ = run(model, params, image[n : n + 1], asked[n : n + 1], seqhw=2)
    np.testing.assert_allclose(one.map[0], got.map[n], rtol=1e-4, atol=1e-7)


def test_a_model_in_half_precision_is_run_in_float32(image):
  model, params = make()
  one, _ = run(model, params, image, seqhw=2)
  two, _ = run(model.clone(dtype="bfloat16"), params, image, seqhw=2)
  np.testing.assert_array_equal(one.map, two.map)


@pytest.mark.parametrize(
  ("fields", "classes", "said"),
  [
    (dict(pool_type="map"), None, "pool_type='map'; expected one of tok, gap, tok[+]gap"),
    (dict(pool_type="tok+reg", registers=1), None, "pool_type='tok[+]reg'"),
    (dict(num_classes=0), None, "no head"),
    ({}, [0, 5], "class 5; expected 0 to 4"),
  ],
)
def test_what_has_no_relevance_is_refused(fields, classes, said, image):
  model, params = make(**fields)
  given = None if classes is None else np.array(classes)
  with pytest.raises(UserError, match=said):
    relevance.relevance(model, params, image, given, seqhw=2)


@pytest.fixture
def tool(repository):
  return runpy.run_path(str(repository / "tools" / "paper" / "relevance.py"))


def test_maps_are_compared_on_the_smaller_number_of_rows_and_columns(tool):
  fine = np.arange(16.0).reshape(1, 4, 4)
  one, other = tool["together"](fine, np.ones((1, 2, 8)))
  np.testing.assert_allclose(one, [[2, 3, 4, 5, 10, 11, 12, 13]])
  assert other.shape == (1, 8)


def test_correlation_of_a_map_without_differences_is_not_a_number(tool):
  one = np.array([[1.0, 2, 4], [1, 2, 4], [1, 1, 1]])
  other = np.array([[3.0, 5, 9], [0, -1, -3], [1, 2, 3]])
  np.testing.assert_allclose(tool["correlation"](one, other), [1, -1, np.nan])


@pytest.mark.parametrize("labels", [[[0, 1, 1]], [[0, 0, 0]], [[0, 0.5, 0.5]]])
def test_labels_of_not_one_class_are_refused(tool, labels):
  with pytest.raises(UserError, match="one class an image"):
    tool["check_labels"](np.array(labels))


def test_the_tool_on_a_checkpoint(tool, tmp_path, monkeypatch, capsys):
  """Sizes from coarse to fine; of the 20 images of the evaluation, in batches of 8 with padding, the first 18."""
  file, out = tmp_path / "vit.npz", tmp_path / "relevance"
  fields = FIELDS | {"num_classes": 10, "depth": 1}
  weights.save_npz(file, *make(**fields), {"model": fields})
  given = [file, "--config=configs/digits.py:debug", f"--out={out}", "--seqhw=8,2,3"]
  monkeypatch.setattr(sys, "argv", ["relevance.py", *map(str, given), "--examples=18"])
  tool["main"]()
  rows = json.loads((out / "relevance.json").read_text())
  assert [(row["seqhw"], row["other"]) for row in rows] == [("2", "3"), ("2", "8"), ("3", "8")]
  for row in rows:
    assert -1 <= row["correlation"] <= 1 and -1 <= row["other_image"] <= 1
    assert row["examples"] == 18 and row["error"] > 0
  assert len(list(csv.DictReader((out / "relevance.csv").read_text().splitlines()))) == 3
  assert {p.name for p in out.iterdir()} == {"relevance.json", "relevance.csv", "relevance.png"}
  assert capsys.readouterr().out.count("with the next image's map") == 3
