"""The graph computes what the model does: run here by a NumPy interpreter, by onnxruntime in tests/foreign."""

import jax
import numpy as np
import pytest
from scipy import special

from flexivit_jax import errors, trees
from flexivit_jax.models import FlexiViT, vit
from flexivit_jax.weights import bake, certificate
from flexivit_jax.weights.export import onnx_graph

FIELDS = dict(num_classes=5, patch_size=(6, 6), posemb_size=(3, 3), layer_norm_eps=1e-3)
FIELDS |= dict(width=16, depth=2, mlp_dim=24, num_heads=4)
VARIATIONS = {
  "tok": {},
  "gap, sincos2d, exact": dict(pool_type="gap", posemb="sincos2d", gelu="exact"),
  "gap, registers, scan": dict(pool_type="gap", registers=3, scan=True),
  "map, quick, pre_norm": dict(pool_type="map", gelu="quick", pre_norm=True),
  "tok+gap, registers": dict(pool_type="tok+gap", registers=2, gelu="exact"),
  "tok+reg, sincos2d": dict(pool_type="tok+reg", registers=1, posemb="sincos2d"),
  "no head": dict(num_classes=0, pool_type="tok+gap"),
}


def make(**fields):
  """Returns (model, params): small, every array random and NumPy."""
  model = FlexiViT(**{**FIELDS, **fields})
  image = jax.ShapeDtypeStruct((1, *model.patch_size, 3), np.float32)
  shapes = jax.eval_shape(model.init, jax.random.key(0), image)["params"]
  rng = np.random.default_rng(0)
  return model, jax.tree.map(lambda s: rng.normal(size=s.shape).astype(np.float32) * 0.3, shapes)


def images(n, hw=(24, 24)):
  return np.random.default_rng(n).uniform(-1, 1, (n, *hw, 3)).astype(np.float32)


def reshape(x, shape):
  return x.reshape([x.shape[i] if size == 0 else size for i, size in enumerate(shape)])


def layer_norm(x, scale, bias, *, axis, epsilon):
  centred = x - x.mean(axis, keepdims=True)
  return centred / np.sqrt((centred**2).mean(axis, keepdims=True) + epsilon) * scale + bias


def slice_(x, starts, ends, axes):
  index = [slice(None)] * x.ndim
  for start, end, axis in zip(starts, ends, axes, strict=True):
    index[axis] = slice(start, end)
  return x[tuple(index)]


def gelu(x, *, approximate):
  if approximate == "none":
    return x * special.ndtr(x)
  return x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))) / 2


# What the ONNX standard says, of the attributes that we use.
OPS = {
  "Add": np.add,
  "Concat": lambda *x, axis: np.concatenate(x, axis),
  "Expand": lambda x, shape: np.broadcast_to(x, np.broadcast_shapes(x.shape, shape)),
  "Gather": lambda x, index, *, axis: np.take(x, index, axis),
  "Gelu": gelu,
  "Identity": lambda x: x,
  "LayerNormalization": layer_norm,
  "MatMul": np.matmul,
  "Mul": np.multiply,
  "ReduceMean": lambda x, axes, *, keepdims: x.mean(tuple(axes), keepdims=bool(keepdims)),
  "Reshape": reshape,
  "Shape": lambda x, *, start, end: np.array(x.shape[start:end]),
  "Sigmoid": special.expit,
  "Slice": slice_,
  "Softmax": lambda x, *, axis: special.softmax(x, axis),
  "Transpose": lambda x, *, perm: x.transpose(perm),
}


def interpret(graph, params, image):
  """Runs the nodes in their order, in float64; each must find its inputs."""
  known = {name: params[name].reshape(shape) for name, shape in graph.weights.items()}
  known = {name: array.astype(np.float64) for name, array in (known | graph.constants).items()}
  known |= {name: array for name, array in graph.constants.items() if array.dtype == np.int64}
  known["image"] = image.astype(np.float64)
  for op, name, inputs, attributes in graph.nodes:
    assert name not in known
    known[name] = OPS[op](*(known[each] for each in inputs), **attributes)
  return known[graph.nodes[-1].name]


def flat_of(fixed, baked):
  """Arrays by name, as an export stores them."""
  flat = trees.flatten(vit.unstack_blocks(baked))
  if fixed.posemb == "sincos2d":
    flat["pos_embedding"] = vit.sincos2d(fixed.posemb_size, fixed.width)
  return flat


@pytest.mark.parametrize("fields", VARIATIONS.values(), ids=VARIATIONS)
def test_it_gives_the_models_logits_for_any_batch(fields):
  model, params = make(**fields)
  for seqhw in (2, 8):
    fixed, baked = bake(model, params, image_hw=(24, 24), seqhw=seqhw)
    graph = onnx_graph.describe(fixed, 3)
    for n in (1, 5):
      want = certificate.logits(model, params, images(n), seqhw)
      got = interpret(graph, jax.tree.map(np.asarray, flat_of(fixed, baked)), images(n))
      assert got.shape == (n, graph.outputs) == want.shape and np.abs(want).max() > 0.1
      np.testing.assert_allclose(got, want, atol=2e-6 * np.abs(want).max())


def test_height_and_width_are_not_exchanged():
  model, params = make(pool_type="map")
  fixed, baked = bake(model, params, image_hw=(24, 36), grid_hw=(4, 3))
  graph = onnx_graph.describe(fixed, 3)
  assert graph.shape == (24, 36, 3)
  want, _ = model.apply({"params": params}, images(2, (24, 36)), grid_hw=(4, 3))
  got = interpret(graph, jax.tree.map(np.asarray, flat_of(fixed, baked)), images(2, (24, 36)))
  np.testing.assert_allclose(got, want, atol=2e-6 * np.abs(want).max())


@pytest.mark.parametrize("fields", VARIATIONS.values(), ids=VARIATIONS)
def test_it_takes_every_parameter_under_its_name_and_resizes_nothing(fields):
  fixed, baked = bake(*make(**fields), image_hw=(24, 24), seqhw=4)
  graph, flat = onnx_graph.describe(fixed, 3), flat_of(fixed, baked)
  assert set(graph.weights) == set(flat)
  assert {n: np.prod(s) for n, s in graph.weights.items()} == {n: a.size for n, a in flat.items()}
  assert not {"Resize", "Conv"} & {node.op for node in graph.nodes}
  assert sum(constant.nbytes for constant in graph.constants.values()) < 4096
  assert graph.nodes[-1].name == ("logits" if fixed.num_classes else "pre_logits")


def test_bfloat16_is_refused():
  with pytest.raises(errors.UserError, match="dtype='bfloat16'; give the model with dtype"):
    onnx_graph.describe(FlexiViT(**FIELDS, dtype="bfloat16"), 3)
