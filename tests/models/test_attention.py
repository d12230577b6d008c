"""Every form of attention gives the same numbers and gradients."""

import functools
import math
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexivit_jax import errors
from flexivit_jax.models import FlexiViT, attention, vit
from flexivit_jax.objectives.supervised import supervised
from flexivit_jax.training import steps
from flexivit_jax.weights import layouts

CPU = ("einsum", "heads_first", "one_by_one")
SHAPES = {"self": (5, 5), "probe": (1, 7), "longer": (6, 3)}


def arrays(queries, keys, dtype="float32"):
  rng = np.random.default_rng(0)
  shapes = [(2, n, 3, 4) for n in (queries, keys, keys)]
  return [jnp.asarray(3 * rng.normal(size=shape), dtype) for shape in shapes]


def reference(q, k, v):
  q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
  scores = np.einsum("nqhe,nkhe->nhqk", q, k) / np.sqrt(q.shape[-1])
  weights = np.exp(scores - scores.max(-1, keepdims=True))
  return np.einsum("nhqk,nkhe->nqhe", weights / weights.sum(-1, keepdims=True), v)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", CPU)
def test_a_form_is_the_formula(form, shape):
  given = arrays(*SHAPES[shape])
  np.testing.assert_allclose(attention.FORMS[form](*given), reference(*given), atol=2e-6)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", CPU[1:])
def test_gradients_are_those_of_the_formula(form, shape):
  given = arrays(*SHAPES[shape])
  weight = jnp.asarray(np.random.default_rng(1).normal(size=given[0].shape), jnp.float32)

  def gradients(form):
    loss = lambda q, k, v: (attention.FORMS[form](q, k, v) * weight).sum()  # noqa: E731
    return jax.jit(jax.grad(loss, (0, 1, 2)))(*given)

  for got, want in zip(gradients(form), gradients("einsum"), strict=True):
    np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("form", CPU)
def test_large_scores_do_not_overflow(form):
  q, k, v = arrays(5, 5)
  made = attention.FORMS[form](100 * q, 100 * k, v)
  np.testing.assert_allclose(made, reference(100 * q, 100 * k, v), atol=1e-4)


@pytest.mark.parametrize("form", CPU)
def test_half_precision_keeps_its_dtype_and_half_its_digits(form):
  given = arrays(5, 5, "bfloat16")
  made = attention.FORMS[form](*given)
  assert made.dtype == jnp.bfloat16
  np.testing.assert_allclose(np.float32(made), reference(*given), atol=0.05)
  grads = jax.grad(
    lambda q, k, v: attention.FORMS[form](q, k, v).astype(jnp.float32).sum(), (0, 1, 2)
  )(*given)
  assert all(g.dtype == jnp.bfloat16 for g in grads)


def test_one_by_one_needs_the_memory_of_one_head():
  specs = [jax.ShapeDtypeStruct((8, 128, 4, 8), jnp.float32)] * 3

  def memory(form):
    loss = lambda q, k, v: attention.FORMS[form](q, k, v).sum()  # noqa: E731
    compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(*specs).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  scores = 4 * 8 * 4 * 128 * 128
  assert memory("heads_first") > scores
  assert memory("one_by_one") < scores


def test_the_choice_goes_by_platform_tokens_dtype_and_head():
  choose = attention.choose
  assert choose("cpu", 226, 226, "float32", 64) == "heads_first"
  assert choose("cpu", 901, 901, "float32", 64) == "one_by_one"
  assert choose("cpu", 1, 901, "float32", 64) == "heads_first"  # a pooling head
  assert choose("gpu", 901, 901, "bfloat16", 64) == "cudnn"
  for platform, tokens, dtype, head in (
    ("gpu", 901, "float32", 64),
    ("gpu", 26, "bfloat16", 64),
    ("gpu", 901, "bfloat16", 60),
    ("gpu", 901, "bfloat16", 256),
    ("rocm", 901, "bfloat16", 64),
    ("tpu", 401, "bfloat16", 64),
    ("tpu v3", 901, "bfloat16", 64),
    ("elsewhere", 901, "bfloat16", 64),
  ):
    assert choose(platform, tokens, tokens, dtype, head) == "einsum"
  assert (
    choose("tpu", 577, 577, "bfloat16", 72) == choose("tpu", 901, 901, "float32", 16) == "splash"
  )
  assert choose("tpu", 1, 901, "bfloat16", 64) == "einsum"


def test_a_form_that_cannot_run_here_says_why():
  with pytest.raises(errors.UserError, match=r"attention='splash'.*for TPUs.*'cpu'.*one_by_one"):
    attention.resolve("splash", 26, 26, "float32", 64)
  with pytest.raises(errors.UserError, match=r"'cudnn' cannot run here.*NVIDIA"):
    attention.resolve("cudnn", 26, 26, "bfloat16", 64)
  with pytest.raises(errors.UserError, match=r"bfloat16 or float16, and dtype='float32'"):
    attention.resolve("cudnn:gpu", 26, 26, "float32", 64)
  with pytest.raises(errors.UserError, match=r"multiple of 8 up to 128 numbers, and a head has 12"):
    attention.resolve("cudnn:gpu", 26, 26, "bfloat16", 12)
  assert attention.resolve("splash:tpu v3", 26, 26, "float32", 64) == "splash"
  assert attention.resolve("auto:tpu", 901, 901, "float32", 64) == "splash"


def test_what_is_made_for_other_devices_does_not_run_here():
  attention.check_here("auto", "float32", 64)
  attention.check_here("auto:cpu", "float32", 64)
  with pytest.raises(
    errors.UserError, match=r"'auto:tpu' is for programs .* of the kind 'cpu'; give 'auto'"
  ):
    attention.check_here("auto:tpu", "float32", 64)
  with pytest.raises(errors.UserError, match="'splash' cannot run here"):
    attention.check_here("splash", "float32", 64)


def test_weights_of_a_run_with_a_kernel_are_read_anywhere():
  path = pathlib.Path("run")
  read = layouts.fields_of_record(path, {"model": {"variant": "S", "attention": "splash"}})
  assert read == {"variant": "S"}
  kept = layouts.fields_of_record(path, {"model": {"variant": "S", "attention": "einsum"}})
  assert kept == {"variant": "S", "attention": "einsum"}


def test_a_platform_is_one_of_those_that_are_known():
  with pytest.raises(errors.UserError, match=r"platform.*'tqu'.*tpu"):
    FlexiViT(attention="auto:tqu")


@pytest.mark.parametrize("pool_type", ["map", pytest.param("tok", marks=pytest.mark.full)])
def test_a_model_gives_the_same_logits_with_every_form(pool_type):
  fields = dict(
    num_classes=3,
    width=24,
    depth=2,
    mlp_dim=24,
    num_heads=3,
    patch_size=(4, 4),
    pool_type=pool_type,
  )
  image = jnp.asarray(np.random.default_rng(0).normal(size=(2, 12, 12, 3)), jnp.float32)
  model = FlexiViT(**fields, head_zeroinit=False)
  params = jax.jit(model.init)(jax.random.key(0), image)["params"]
  made = {
    form: jax.jit(model.clone(attention=form).apply)({"params": params}, image)[0]
    for form in ("auto", *CPU)
  }
  for logits in made.values():
    np.testing.assert_allclose(logits, made["einsum"], atol=1e-6)


def test_an_unknown_form_is_named():
  with pytest.raises(errors.UserError, match=r"attention.*'heads_frist'.*heads_first"):
    FlexiViT(attention="heads_frist")


# --- the kernel for TPUs, step by step ---


def kernel_and_formula(tokens, head, dtype, heads=1):
  """Output and gradients of both, in float32."""
  rng = np.random.default_rng(0)
  *given, weight = (
    jnp.asarray(1.5 * rng.normal(size=(1, tokens, heads, head)), dtype) for _ in range(4)
  )

  def run(form):
    def loss(*arrays):
      out = form(*arrays)
      return (out * weight).sum(dtype=jnp.float32), out

    (_, out), grads = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(*given)
    assert all(x.dtype == dtype for x in (out, *grads))
    return [np.float32(x) for x in (out, *grads)]

  return run(functools.partial(attention.splash, interpret=True)), run(attention.einsum)


@pytest.mark.parametrize(
  ("tokens", "head", "dtype"),
  [
    (26, 72, "float32"),  # So400m's heads
    *(
      pytest.param(tokens, head, dtype, marks=pytest.mark.full)
      for tokens, head in (
        (26, 64), (226, 64), (577, 64), (901, 64), (26, 16), (226, 80), (577, 88), (901, 104), (256, 64),
      )
      for dtype in ("float32", "bfloat16")
    ),
  ],
)  # fmt: skip
def test_the_kernel_is_the_formula_and_so_are_its_gradients(tokens, head, dtype):
  # bfloat16 has 8 bits: both round the weights and the gradients of the scores, at other places.
  bound = 1e-5 if dtype == "float32" else 0.02
  for got, want in zip(*kernel_and_formula(tokens, head, dtype), strict=True):
    np.testing.assert_allclose(got, want, rtol=0, atol=bound * max(1.0, np.abs(want).max()))


@pytest.mark.full
def test_a_query_alone_and_keys_of_another_number():
  given = arrays(1, 140)
  made = attention.splash(*given, interpret=True)
  np.testing.assert_allclose(made, reference(*given), atol=1e-5)


@pytest.mark.full
def test_large_scores_do_not_overflow_in_the_kernel_and_padding_has_no_weight():
  q, k, v = arrays(130, 130)
  made = attention.splash(100 * q, 100 * k, v, interpret=True)
  np.testing.assert_allclose(made, reference(100 * q, 100 * k, v), atol=1e-3)
  # All scores far below 0, the score of a padded key.
  made = attention.splash(jnp.full_like(q, 50), jnp.full_like(k, -50), v, interpret=True)
  np.testing.assert_allclose(made, np.broadcast_to(v.mean(1, keepdims=True), v.shape), atol=1e-5)


@pytest.mark.full
def test_gradients_of_the_kernel_are_the_same_bits_each_time():
  (first, _), (again, _) = (kernel_and_formula(140, 16, "float32", heads=3) for _ in range(2))
  for a, b in zip(first, again, strict=True):
    np.testing.assert_array_equal(a, b)


def test_lengths_are_padded_to_equal_blocks():
  for tokens, want in ((1, (128, 128)), (26, (128, 128)), (226, (256, 256)), (512, (512, 512))):
    assert attention.padded(tokens) == want
  assert attention.padded(577) == (768, 384)
  assert attention.padded(901) == (1024, 512)
  assert attention.padded(1370) == (1536, 512)


# --- programs for chips that are not here ---


def step_program(form, platform="tpu"):
  """The StableHLO of the gradients of a step of FlexiViT-S at patches of 8 pixels: 901 tokens."""
  model = FlexiViT(num_classes=10, variant="S", dtype="bfloat16", attention=form)
  batch = {
    "image": jax.ShapeDtypeStruct((2, 240, 240, 3), jnp.float32),
    "labels": jax.ShapeDtypeStruct((2, 10), jnp.float32),
  }
  shapes = {"image": (240, 240, 3)}
  params = jax.eval_shape(lambda: steps.init_params(model, shapes, seed=0))
  state = steps.TrainState(jax.ShapeDtypeStruct((), jnp.int32), params, None)
  run = functools.partial(steps.gradients, model=model, objective=supervised(), seed=0, seqhw=30)
  return jax.jit(run).trace(state, batch).lower(lowering_platforms=(platform,)).as_text()


SQUARES = re.compile(r"x(?:901x901|902x902|1024x1024)x")


def test_a_step_for_tpus_at_901_tokens_holds_nothing_of_that_size_squared():
  program = step_program("auto:tpu")
  assert program.count("tpu_custom_call") >= 3  # forward, and the two of the backward pass
  assert not SQUARES.search(program)


@pytest.mark.full
def test_the_formula_holds_scores_and_an_old_tpu_has_the_formula():
  for form in ("einsum", "auto:tpu v3"):
    assert SQUARES.search(step_program(form))


@pytest.fixture
def for_cudnn(monkeypatch):
  """Lets programs with cuDNN's kernel be traced where cuDNN, which JAX asks for its version, is not installed."""
  from jax._src.cudnn import fused_attention_stablehlo

  monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)


@pytest.mark.full
@pytest.mark.parametrize("tokens", [900, 901])
def test_gradients_of_single_examples_are_one_call_of_cudnn(tokens, for_cudnn):
  specs = [jax.ShapeDtypeStruct((4, 1, tokens, 6, 64), jnp.bfloat16)] * 3
  loss = lambda *arrays: (attention.cudnn(*arrays) ** 2).sum(dtype=jnp.float32)  # noqa: E731
  traced = jax.jit(jax.vmap(jax.grad(loss, (0, 1, 2)))).trace(*specs)
  program = traced.lower(lowering_platforms=("cuda",)).as_text()
  assert len(re.findall(r"custom_call @__cudnn.*-> \(tensor<4x6x90[02]x64xbf16>", program)) == 2


@pytest.mark.full
def test_a_step_for_gpus_at_901_tokens_holds_nothing_of_that_size_squared(for_cudnn):
  program = step_program("auto:gpu", "cuda")
  assert "@__cudnn$fmhaSoftmax(" in program and "@__cudnn$fmhaSoftmaxBackward(" in program
  assert not SQUARES.search(program)


def stored(form):
  """Bytes that FlexiViT-S keeps of an image at 901 tokens for the backward pass of a block."""
  block = vit.EncoderBlock(
    vit.BlockConfig(mlp_dim=1536, num_heads=6, dtype="bfloat16", attention=form)
  )
  x = jax.ShapeDtypeStruct((1, 901, 384), jnp.float32)
  params = jax.eval_shape(block.init, jax.random.key(0), x)["params"]

  def run(params, x):
    return block.apply({"params": params}, x)[0]

  leaves = jax.tree.leaves(jax.eval_shape(lambda p, x: jax.vjp(run, p, x)[1], params, x))
  kept = [leaf for leaf in leaves if {901, 1024} & {*leaf.shape}]
  assert (form == "einsum") == any(list(leaf.shape).count(901) == 2 for leaf in kept)
  return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in kept)


def test_a_block_with_the_kernel_keeps_no_scores_for_the_backward_pass():
  assert stored("splash:tpu") < 0.6 * stored("einsum")


def test_a_fused_form_keeps_no_scores():
  assert attention.keeps_scores("einsum", 901, "bfloat16", 64)
  assert attention.keeps_scores("auto:tpu", 26, "bfloat16", 64)
  assert not attention.keeps_scores("auto:tpu", 901, "bfloat16", 64)
  assert not attention.keeps_scores("auto:gpu", 226, "bfloat16", 64)
  assert attention.kernel_length("auto:tpu", 901, "bfloat16", 64) == 1024
  assert attention.kernel_length("auto:gpu", 901, "bfloat16", 64) == 902
  assert attention.kernel_length("auto:tpu", 26, "bfloat16", 64) is None


@pytest.mark.gpu
@pytest.mark.parametrize(("queries", "keys"), [(64, 64), (101, 101), (226, 226), (577, 577)])
def test_cudnn_is_the_formula_at_even_and_odd_lengths(queries, keys):
  given = [jnp.tile(x, (1, 1, 1, 16)) for x in arrays(queries, keys, "bfloat16")]
  loss = lambda form, q, k, v: (attention.FORMS[form](q, k, v).astype(jnp.float32) ** 2).sum()  # noqa: E731
  made, grads = (
    attention.cudnn(*given),
    jax.grad(functools.partial(loss, "cudnn"), (0, 1, 2))(*given),
  )
  wanted, want_grads = (
    attention.einsum(*given),
    jax.grad(functools.partial(loss, "einsum"), (0, 1, 2))(*given),
  )
  for got, want in zip((made, *grads), (wanted, *want_grads), strict=True):
    error = np.linalg.norm(np.float32(got) - np.float32(want))
    assert error < 0.02 * np.linalg.norm(np.float32(want))
