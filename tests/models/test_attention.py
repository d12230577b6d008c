"""Every form of attention gives the same numbers and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexivit_jax import errors
from flexivit_jax.models import FlexiViT, attention

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
    return jax.grad(lambda q, k, v: (attention.FORMS[form](q, k, v) * weight).sum(), (0, 1, 2))(
      *given
    )

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


def test_the_choice_goes_by_backend_tokens_and_dtype():
  choose = attention.choose
  assert choose("cpu", 226, 226, "float32") == "heads_first"
  assert choose("cpu", 901, 901, "float32") == "one_by_one"
  assert choose("cpu", 1, 901, "float32") == "heads_first"  # a pooling head
  assert choose("gpu", 901, 901, "bfloat16") == "cudnn"
  assert choose("gpu", 901, 901, "float32") == choose("gpu", 26, 26, "bfloat16") == "einsum"
  assert choose("tpu", 901, 901, "bfloat16") == "einsum"


@pytest.mark.parametrize("pool_type", ["tok", "map"])
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
