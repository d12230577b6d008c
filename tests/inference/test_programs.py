"""Programs of one size and one shape of batch: each image gets the same bits in any company."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from flexivit_jax import errors
from flexivit_jax.inference import predictor, programs
from flexivit_jax.models import FlexiViT, Segmenter
from flexivit_jax.sizes import Patch, size_args

SHAPE = (24, 24, 3)
FIELDS = dict(num_classes=5, width=32, depth=2, mlp_dim=48, num_heads=2, patch_size=(8, 8))
FIELDS |= dict(posemb_size=(3, 3), head_zeroinit=False)


@pytest.fixture(scope="module")
def loaded(random_params):
  model = FlexiViT(**FIELDS)
  params = random_params(model, SHAPE)
  return predictor.Loaded(model, params, {"notes": []}, "model.npz", lambda path: np.zeros(SHAPE))


def images(n, seed=0):
  return np.random.default_rng(seed).uniform(-1, 1, (n, *SHAPE)).astype(np.float32)


@pytest.fixture(scope="module")
def program(loaded):
  return programs.compiled(loaded, programs.probabilities, 4, batch=4, shape=SHAPE)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 3), st.integers(0, 1000), st.floats(0, 100))
def test_an_image_gets_the_same_bits_in_any_company_and_at_any_place(program, at, seed, scale):
  one = images(1)[0]
  alone = np.zeros((4, *SHAPE), np.float32)
  alone[0] = one
  among = images(4, seed) * np.float32(scale)
  among[at] = one
  np.testing.assert_array_equal(program.run(among)[at], program.run(alone)[0])


def test_it_gives_the_models_answers_and_says_its_memory(loaded, program):
  logits, _ = loaded.model.apply({"params": loaded.params}, images(4), seqhw=4)
  scores = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
  np.testing.assert_allclose(program.run(images(4)), scores, atol=1e-6)
  held = sum(array.nbytes for array in [*loaded.params.values()] if hasattr(array, "nbytes"))
  assert program.memory_mb > held / 1e6


@pytest.mark.parametrize("size", [6, (2, 4), Patch(8, 6)])
@pytest.mark.parametrize("fields", [{}, {"posemb": "sincos2d"}, {"pool_type": "map", "scan": True}])
def test_arrays_that_are_resized_once_give_what_the_model_gives(random_params, size, fields):
  model = FlexiViT(**FIELDS, **fields)
  params = random_params(model, SHAPE)
  loaded = predictor.Loaded(model, params, {"notes": []}, "model.npz", lambda path: None)
  logits, _ = model.apply({"params": params}, images(3), **size_args(size))
  call = programs.call(loaded, lambda result: result[0], size)
  np.testing.assert_allclose(call(params, images(3)), logits, atol=2e-5 * np.abs(logits).max())
  on_device = jax.device_put(params)
  np.testing.assert_array_equal(call(on_device, images(3)), call(params, images(3)))


def test_other_parameters_are_resized_anew(loaded):
  call = programs.call(loaded, lambda result: result[0], 4)
  kernel = loaded.params["embedding"]["kernel"]
  others = loaded.params | {"embedding": loaded.params["embedding"] | {"kernel": kernel * 2}}
  for params in (loaded.params, others, loaded.params):
    logits, _ = loaded.model.apply({"params": params}, images(2), seqhw=4)
    np.testing.assert_allclose(call(params, images(2)), logits, atol=1e-5)


def test_nothing_is_compiled_after_it_is_made(program, loaded):
  seen = []
  listen = lambda name, *a, **k: seen.append(name)  # noqa: E731
  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    program.run(images(4))
    assert not [name for name in seen if "compile" in name]
    programs.compiled(loaded, programs.probabilities, 4, batch=7, shape=SHAPE)
    assert [name for name in seen if "compile" in name]  # it would be heard
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)


def test_other_shapes_are_errors(program, loaded):
  with pytest.raises(ValueError, match=r"this program takes \(4, 24, 24, 3\)"):
    program.run(images(3))
  with pytest.raises(errors.UserError, match="divide"):
    programs.compiled(loaded, programs.probabilities, 7, batch=1, shape=SHAPE)


def test_bfloat16_is_another_program(loaded, program):
  way = programs.Way("jax", "bfloat16")
  half = programs.compiled(loaded, programs.probabilities, 4, batch=4, shape=SHAPE, way=way)
  difference = np.abs(half.run(images(4)) - program.run(images(4))).max()
  assert 0 < difference < 0.1


@pytest.mark.parametrize(
  ("way", "problem"),
  [
    (("torch", "float32"), "Unknown runtime 'torch'; known: jax, onnx"),
    (("jax", "int8"), "Unknown dtype of runtime jax 'int8'; known: bfloat16, float32"),
    (("onnx", "bfloat16"), "known: float32, int8"),
  ],
)
def test_ways_that_there_are_not(loaded, way, problem):
  with pytest.raises(errors.UserError, match=problem):
    programs.call(loaded, programs.probabilities, 4, programs.Way(*way))


def test_other_models_run_plainly(loaded):
  segmenter = loaded._replace(model=Segmenter.__new__(Segmenter))
  with pytest.raises(errors.UserError, match="Segmenter runs in XLA in float32 alone"):
    programs.call(segmenter, programs.probabilities, 4, programs.Way("jax", "bfloat16"))


@pytest.mark.convert
class TestOnnx:
  def test_answers_are_those_of_xla(self, loaded, program):
    way = programs.Way("onnx")
    for batch in (1, 4):
      other = programs.compiled(
        loaded, programs.probabilities, 4, batch=batch, shape=SHAPE, way=way
      )
      np.testing.assert_allclose(
        other.run(images(batch)), program.run(images(4))[:batch], atol=1e-5
      )

  def test_int8_is_near(self, loaded, program):
    way = programs.Way("onnx", "int8")
    other = programs.compiled(loaded, programs.probabilities, 4, batch=4, shape=SHAPE, way=way)
    difference = np.abs(other.run(images(4)) - program.run(images(4))).max()
    assert 0 < difference < 0.2

  def test_the_same_bits_in_any_company(self, loaded):
    program = programs.compiled(
      loaded, programs.probabilities, 4, batch=4, shape=SHAPE, way=programs.Way("onnx")
    )
    first = program.run(images(4))
    among = images(4, 9)
    among[2] = images(4)[0]
    np.testing.assert_array_equal(program.run(among)[2], first[0])

  def test_intermediates_are_not_in_the_graph(self, loaded):
    way = programs.Way("onnx")
    with pytest.raises(errors.UserError, match="gives its output alone, not 'pre_logits'"):
      programs.compiled(loaded, lambda r: r[1]["pre_logits"], 4, batch=1, shape=SHAPE, way=way)
