"""The optimizer chain against a plain NumPy re-implementation of the reference's formulas."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

from flexivit_jax import trees
from flexivit_jax.errors import UserError
from flexivit_jax.training import optim, schedules

STEPS = 12
SHAPES = {
  "embedding/kernel": (4, 4, 3, 8),
  "head/bias": (5,),
  "head/kernel": (8, 5),
  "pos_embedding": (1, 9, 8),
}


def _random(rng, scale=1.0):
  return {k: (scale * rng.normal(size=s)).astype(np.float32) for k, s in SHAPES.items()}


def _problem(seed=0):
  rng = np.random.default_rng(seed)
  # Norms on both sides of the clipping threshold.
  return _random(rng), [_random(rng, scale) for scale in (0.01, 3.0) * (STEPS // 2)]


def _run(optimizer, params, grads, jit=False):
  def step(params, state, grad):
    updates, state = optimizer.tx.update(grad, state, params)
    return optax.apply_updates(params, updates), state

  step = jax.jit(step) if jit else step
  params = trees.unflatten({k: jnp.asarray(v) for k, v in params.items()})
  state = optimizer.tx.init(params)
  for grad in grads:
    params, state = step(params, state, trees.unflatten(grad))
  return trees.flatten(params), state


def _make(params, **kw):
  return optim.make(trees.unflatten(params), total_steps=STEPS, **kw)


def _cosine(step, warm):
  ramp = min(1, step / warm) if warm else 1.0
  return 0.5 * (1 + np.cos(np.pi * np.clip((step - warm) / (STEPS - warm), 0, 1))) * ramp


def _reference(
  params, grads, *, lr, wd, clip, warm=0, b1=0.9, b2=0.999, eps=1e-8, mu_dtype=np.float32
):
  """Float64, except for the first moment where that is kept in bfloat16."""
  p = {k: v.astype(np.float64) for k, v in params.items()}
  mu = {k: np.zeros(v.shape, mu_dtype) for k, v in p.items()}
  nu = {k: np.zeros(v.shape) for k, v in p.items()}
  for t, grad in enumerate(grads):
    norm = np.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in grad.values()))
    for k, value in p.items():
      g = grad[k].astype(np.float64) * (min(1, clip / norm) if clip else 1)
      # b1 * mu is a product in mu's own dtype, then added in float32, as in optax.
      decayed = (mu[k] * np.asarray(b1, mu_dtype)).astype(np.float64)
      m = (1 - b1) * g + decayed
      nu[k] = (1 - b2) * g**2 + b2 * nu[k]
      m_hat, nu_hat = m / (1 - b1 ** (t + 1)), nu[k] / (1 - b2 ** (t + 1))
      mu[k] = m.astype(np.float32).astype(mu_dtype)
      u = lr * m_hat / (np.sqrt(nu_hat) + eps)
      u = u + (wd * value if k.endswith("/kernel") else 0)
      p[k] = value - _cosine(t, warm) * u
  return p


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("warm", [0, 4])
def test_adam_f32_equals_numpy(clip, warm):
  params, grads = _problem()
  kw = {"lr": 1e-2, "wd": 1e-2, "clip": clip}
  schedule = {"warmup_steps": warm}
  got, _ = _run(_make(params, **kw, mu_dtype="float32", schedule=schedule), params, grads)
  want = _reference(params, grads, **kw, warm=warm)
  for k in params:
    np.testing.assert_allclose(got[k], want[k], rtol=1e-6, atol=1e-6)


def test_adam_keeps_its_first_moment_in_bfloat16_by_default():
  params, grads = _problem()
  kw = {"lr": 1e-2, "wd": 1e-2, "clip": 1.0}
  got, state = _run(_make(params, **kw), params, grads)
  want = _reference(params, grads, **kw, mu_dtype=ml_dtypes.bfloat16)
  # A rounding of mu that falls the other way is 2^-9 of one update of at most lr.
  for k in params:
    np.testing.assert_allclose(got[k], want[k], rtol=0, atol=2e-5)
    assert np.mean(np.abs(got[k] - want[k])) < 1e-6
  exact = _reference(params, grads, **kw)
  assert max(np.abs(exact[k] - want[k]).max() for k in params) > 1e-4  # The test can fail.
  adam = state[1].inner_state
  assert {x.dtype for x in jax.tree.leaves(adam.mu)} == {jnp.dtype("bfloat16")}
  assert {x.dtype for x in jax.tree.leaves(adam.nu)} == {jnp.dtype("float32")}


def test_decay_is_not_multiplied_by_lr_but_by_the_schedule():
  params, _ = _problem()
  zero = [{k: np.zeros_like(v) for k, v in params.items()}] * 3
  got, _ = _run(_make(params, lr=123.0, wd=0.1), params, zero)
  shrink = np.prod([1 - 0.1 * _cosine(t, 0) for t in range(3)])
  for k in params:
    factor = shrink if k.endswith("/kernel") else 1.0
    np.testing.assert_allclose(got[k], factor * params[k], rtol=1e-6)


def test_wd_and_lr_multipliers_by_regex():
  params, grads = _problem()
  one = {"lr": 0.5, "wd": 0.1, "name": "sgd", "schedule": {"decay_type": "constant"}}
  lr_mults = [("head/.*", 0.1), (".*embedding", 10.0)]
  wd_mults = [("head/.*", 2.0), (".*/kernel", 1.0)]
  got, _ = _run(_make(params, **one, lr_mults=lr_mults, wd_mults=wd_mults), params, grads[:1])
  lr = {"embedding/kernel": 1, "head/bias": 0.1, "head/kernel": 0.1, "pos_embedding": 10}
  wd = {"embedding/kernel": 1, "head/bias": 2, "head/kernel": 2, "pos_embedding": 0}
  for k, p in params.items():
    want = p - (0.5 * lr[k] * grads[0][k] + 0.1 * wd[k] * p)
    np.testing.assert_allclose(got[k], want, rtol=1e-6, atol=1e-6)


def test_schedules_by_regex():
  params, grads = _problem()
  schedule = [("head/.*", {"decay_type": "constant"}), (".*", {"warmup_percent": 0.5})]
  optimizer = _make(params, lr=0.1, name="sgd", schedule=schedule)
  got, _ = _run(optimizer, params, grads)
  for k, p in params.items():
    factors = [1.0 if k.startswith("head") else _cosine(t, STEPS // 2) for t in range(STEPS)]
    want = p - 0.1 * sum(f * g[k] for f, g in zip(factors, grads, strict=True))
    np.testing.assert_allclose(got[k], want, rtol=1e-5, atol=1e-6)
  assert list(optimizer.schedules) == ["head/.*", ".*"]
  assert optimizer.schedules["head/.*"](5) == 1.0
  assert optimizer.schedules[".*"](3) == pytest.approx(_cosine(3, 6))


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_frozen_parameters_keep_every_bit_and_have_no_state(name, jit):
  params, grads = _problem()
  params["pos_embedding"][0, 0, :2] = (-0.0, 0.0)
  schedule = [("embedding/.*", None), ("pos_embedding", None), (".*", {})]
  optimizer = _make(params, lr=0.1, wd=0.1, clip=1.0, name=name, schedule=schedule)
  poisoned = [
    g | {"embedding/kernel": np.full_like(params["embedding/kernel"], np.nan)} for g in grads
  ]
  got, state = _run(optimizer, params, poisoned, jit)
  for k in ("embedding/kernel", "pos_embedding"):
    assert np.asarray(got[k]).tobytes() == params[k].tobytes()
  # The others move as if the frozen ones did not exist: their gradients are not in the norm.
  small, small_grads = _keep(params, "head/"), [_keep(g, "head/") for g in grads]
  alone = _make(small, lr=0.1, wd=0.1, clip=1.0, name=name)
  # Compared jitted with jitted: compiled code may keep bfloat16 products in float32.
  want, small_state = _run(alone, small, small_grads, jit)
  for k in small:
    np.testing.assert_allclose(got[k], want[k], rtol=1e-6, atol=1e-6)
  assert jax.tree.map(jnp.shape, jax.tree.leaves(state)) == jax.tree.map(
    jnp.shape, jax.tree.leaves(small_state)
  )
  assert trees.flatten(optimizer.frozen) == {k: not k.startswith("head/") for k in params}


def _keep(params, prefix):
  return {k: v for k, v in params.items() if k.startswith(prefix)}


@pytest.mark.parametrize("name", ["momentum", "adafactor", "lion"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_first_moment_is_kept_in_the_dtype_asked_for(name, dtype):
  params, _ = _problem()
  optimizer = _make(params, lr=0.01, name=name, mu_dtype=dtype)
  state = jax.eval_shape(optimizer.tx.init, trees.unflatten(params))[1].inner_state
  moment = {
    "momentum": lambda: state.trace,
    "adafactor": lambda: state[1].ema,
    "lion": lambda: state.mu,
  }[name]()
  assert {x.dtype for x in jax.tree.leaves(moment)} == {jnp.dtype(dtype)}


def test_momentum_and_adafactor():
  params, grads = _problem()
  constant = {"schedule": {"decay_type": "constant"}}
  kw = {"lr": 0.01, "name": "momentum", "mu_dtype": "float32", **constant}
  got, _ = _run(_make(params, **kw, b1=0.8), params, grads)
  for k, p in params.items():
    trace, want = 0.0, p.astype(np.float64)
    for grad in grads:
      trace = grad[k] + 0.8 * trace
      want = want - 0.01 * trace
    np.testing.assert_allclose(got[k], want, rtol=1e-5, atol=1e-6)
  # Below the size from which it factors, one step of adafactor is (1 - b1) * g / |g|.
  got, _ = _run(_make(params, lr=0.01, name="adafactor", **constant), params, grads[:1])
  for k, p in params.items():
    np.testing.assert_allclose(got[k], p - 0.001 * np.sign(grads[0][k]), atol=1e-5)


def test_lion_is_the_sign_of_one_average_and_keeps_another():
  params, grads = _problem()
  kw = {"lr": 0.01, "wd": 0.1, "mu_dtype": "float32", "b1": 0.8, "b2": 0.95}
  got, _ = _run(
    _make(params, name="lion", schedule={"decay_type": "constant"}, **kw), params, grads
  )
  for k, p in params.items():
    moment, want = 0.0, p.astype(np.float64)
    for grad in grads:
      sign = np.sign(0.8 * moment + 0.2 * grad[k])
      want = want - (0.01 * sign + (0.1 * want if k.endswith("/kernel") else 0))
      moment = 0.95 * moment + 0.05 * grad[k]
    np.testing.assert_allclose(got[k], want, rtol=1e-5, atol=1e-6)


def test_the_norm_for_single_examples_is_handed_on_and_changes_no_update():
  params, _ = _problem()
  assert _make(params, lr=0.1).clip_each is None
  made = _make(params, lr=0.1, clip_each=0.5)
  assert made.clip_each == 0.5
  init = lambda made: jax.tree.structure(made.tx.init(trees.unflatten(params)))  # noqa: E731
  assert init(made) == init(_make(params, lr=0.1))


def test_adafactor_factors_large_matrices():
  params = {"head": {"kernel": np.zeros((64, 48), np.float32)}}
  optimizer = optim.make(params, total_steps=STEPS, lr=0.1, name="adafactor")
  second = optimizer.tx.init(params)[1].inner_state[0]
  factors = (second.v_row["head"]["kernel"].shape, second.v_col["head"]["kernel"].shape)
  assert set(factors) == {(64,), (48,)}
  assert second.v["head"]["kernel"].size == 1


def test_longer_runs_need_no_new_compilation():
  params, grads = _problem()
  params, grad = trees.unflatten(params), trees.unflatten(grads[0])
  traces = []

  @jax.jit
  def update(state, total_steps):
    traces.append(0)
    return optimizer.tx.update(grad, state, params, total_steps=total_steps)

  kw = {"lr": 0.1, "name": "sgd"}
  optimizer = optim.make(params, total_steps=STEPS, **kw)
  for total in (STEPS, 1000):
    other = optim.make(params, total_steps=total, **kw)
    state = other_state = optimizer.tx.init(params)
    for _ in range(3):
      got, state = update(state, total)
      want, other_state = other.tx.update(grad, other_state, params)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), got, want)
  assert len(traces) == 1


def test_shapes_suffice_and_durations_use_the_data_set():
  shapes = jax.eval_shape(lambda: {"head": {"kernel": jnp.zeros((2, 3))}})
  schedule = {"warmup_epochs": 2, "decay_type": "constant"}
  optimizer = optim.make(
    shapes, total_steps=STEPS, lr=1.0, wd=1.0, schedule=schedule, batch_size=10, dataset_size=20
  )
  want = schedules.make(total_steps=STEPS, decay_type="constant", warmup_steps=4)
  assert [optimizer.schedules[".*"](t) for t in range(6)] == [want(t) for t in range(6)]


@pytest.mark.parametrize(
  ("kw", "message"),
  [
    ({"name": "adamw"}, "Unknown optimizer 'adamw'.*Did you mean 'adam'"),
    ({"name": "sgd", "b1": 0.5}, "optim.b1 has no effect with the optimizer 'sgd'"),
    ({"nesterov": True}, "optim.nesterov has no effect with the optimizer 'adam'"),
    ({"clip": 0}, "clip=0; expected a norm > 0"),
    ({"clip_each": 0}, "optim.clip_each=0; expected a finite norm > 0, or None"),
    ({"clip_each": float("inf")}, "optim.clip_each=inf; expected a finite"),
    ({"wd": 0.1, "wd_mults": [("head/kernl", 1.0)]}, "wd_mults: 'head/kernl' .* head/kernel"),
    ({"lr_mults": [("foot/.*", 1.0)]}, "optim.lr_mults: 'foot/.*' matches no whole name"),
    (
      {"lr_mults": [("head/.*", 0.0)]},
      r"expected > 0; to freeze, use schedule=\(\('head/.*', None",
    ),
    ({"schedule": [("head/.*", {})]}, r"no pattern matches embedding/kernel, pos_emb.* \(2 par"),
    ({"schedule": [(".*", {}), ("head/.*", None)]}, "'head/.*' has no effect, patterns before"),
    ({"schedule": {"decay_type": "cosin"}}, "Unknown decay_type"),
    ({"schedule": {"warmup_step": 5}}, "Unknown key in optim.schedule .* Did you mean 'warmup_st"),
    ({"schedule": {"total_steps": 5}}, "Unknown key in optim.schedule 'total_steps'"),
    ({"mu_dtype": "bf16"}, "Unknown mu_dtype 'bf16'; known: bfloat16, float32"),
  ],
)
def test_mistakes_are_errors(kw, message):
  params, _ = _problem()
  with pytest.raises(UserError, match=message):
    _make(params, **({"lr": 0.1} | kw))
