"""Durations against the reference's step counts, schedules against their formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexivit_jax.errors import UserError
from flexivit_jax.training import schedules


@pytest.mark.parametrize(
  ("epochs", "steps"), [(90, 111_477), (300, 371_588), (600, 743_177), (1200, 1_486_354)]
)
def test_epochs_give_the_steps_of_the_reference_runs(epochs, steps):
  sizes = {"batch_size": 1024, "dataset_size": 1_268_355}
  assert schedules.to_steps("total", epochs=epochs, **sizes) == steps


def test_every_unit():
  sizes = {"batch_size": 10, "dataset_size": 105, "total_steps": 500}
  assert schedules.to_steps("x", steps=7, **sizes) == 7
  assert schedules.to_steps("x", epochs=2, **sizes) == 21
  assert schedules.to_steps("x", examples=48, **sizes) == 5
  assert schedules.to_steps("x", percent=0.1, **sizes) == 50
  assert schedules.to_steps("x", **sizes, default=3) == 3
  # A positive duration never vanishes, an explicit zero stays.
  assert schedules.to_steps("x", examples=1, **sizes) == 1
  assert schedules.to_steps("x", epochs=0, **sizes) == 0


@pytest.mark.parametrize(
  ("kw", "message"),
  [
    ({}, "Got none; give exactly one of warmup_steps, warmup_epochs, warmup_examples"),
    ({"steps": 1, "epochs": 2}, "Got warmup_steps=1, warmup_epochs=2; give exactly one"),
    ({"steps": 0, "percent": 0.0}, "Got warmup_steps=0, warmup_percent=0.0; give exactly one"),
    ({"steps": -1}, "warmup_steps=-1; expected a finite number >= 0"),
    ({"steps": 1.5}, "warmup_steps=1.5; expected a whole number"),
    ({"epochs": float("nan")}, "warmup_epochs=nan; expected a finite number"),
    ({"percent": 10.0}, "warmup_percent=10.0; it is a fraction of the run: write 0.1"),
    ({"epochs": 1}, "warmup_epochs=1 needs dataset_size"),
    ({"epochs": 1, "dataset_size": 9}, "warmup_epochs=1 needs batch_size"),
    ({"percent": 0.5}, "warmup_percent=0.5 needs total_steps"),
  ],
)
def test_bad_durations(kw, message):
  with pytest.raises(UserError) as e:
    schedules.to_steps("warmup", **kw)
  assert message in str(e.value)


def test_cosine_is_the_reference_formula():
  total, warm = 1000, 50
  schedule = schedules.make(total_steps=total, warmup_steps=warm)
  for step in (0, 1, 25, 50, 51, 500, 999, 1000, 1200):
    want = 0.5 * (1 + np.cos(np.pi * np.clip((step - warm) / (total - warm), 0, 1)))
    want *= min(1, step / warm)
    assert schedule(step) == pytest.approx(want, abs=1e-15)
  assert (schedule(0), schedule(warm), schedule(total)) == (0.0, 1.0, 0.0)


@pytest.mark.parametrize(
  ("kw", "want"),
  [
    ({"decay_type": "linear"}, lambda t: 1 - np.clip((t - 20) / 80, 0, 1)),
    ({"decay_type": "linear", "linear_end": 0.1}, lambda t: 1 - 0.9 * np.clip((t - 20) / 80, 0, 1)),
    ({"decay_type": "polynomial"}, lambda t: (1 - np.clip((t - 20) / 80, 0, 1)) ** 0.9),
    (
      {"decay_type": "polynomial", "power": 2, "polynomial_end": 0.1},
      lambda t: 0.1 + 0.9 * (1 - np.clip((t - 20) / 80, 0, 1)) ** 2,
    ),
    ({"decay_type": "rsqrt"}, lambda t: 1 / np.sqrt(1 + max(t - 20, 0) / 10_000)),
    (
      {"decay_type": "rsqrt", "timescale_percent": 0.05},
      lambda t: 1 / np.sqrt(1 + max(t - 20, 0) / 5),
    ),
    ({"decay_type": "constant"}, lambda t: 1.0),
  ],
)
def test_decays_with_warm_up_and_cooldown(kw, want):
  schedule = schedules.make(
    total_steps=100, warmup_percent=0.2, cooldown_examples=30, **kw, **SIZES
  )
  for step in range(110):
    ramps = min(1, step / 20) * np.clip((100 - step) / 10, 0, 1)
    assert schedule(step) == pytest.approx(want(step) * ramps, abs=1e-15)


SIZES = {"batch_size": 3, "dataset_size": 60}


@pytest.mark.parametrize("decay_type", schedules.SCHEDULES)
@pytest.mark.parametrize(("warm", "cool"), [(0, 0), (300, 0), (0, 500), (1, 1), (900, 1100)])
def test_factor_is_in_0_1_and_equal_under_jit(decay_type, warm, cool):
  schedule = schedules.make(
    total_steps=2000, decay_type=decay_type, warmup_steps=warm, cooldown_steps=cool
  )
  on_host = [schedule(step) for step in range(2100)]
  assert all(isinstance(factor, float) and 0.0 <= factor <= 1.0 for factor in on_host)
  on_device = jax.jit(schedule)(jnp.arange(2100))
  assert on_device.dtype == jnp.float32
  np.testing.assert_allclose(on_device, on_host, rtol=0, atol=5e-7)


def test_polynomial_decay_to_a_floor_is_that_of_segmenter():
  lr, lowest, total = 1e-3, 1e-5, 160_000
  schedule = schedules.make(total_steps=total, decay_type="polynomial", polynomial_end=lowest / lr)
  for step in (0, 1, 80_000, 159_999, 160_000):
    want = (lr - lowest) * (1 - step / total) ** 0.9 + lowest
    assert lr * schedule(step) == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("decay_type", ["cosine", "polynomial"])
def test_total_steps_is_dynamic(decay_type):
  traces = []

  @jax.jit
  def factor(step, total):
    traces.append(0)
    return schedule(step, total)

  kw = {"warmup_steps": 10, "decay_type": decay_type}
  schedule = schedules.make(total_steps=100, **kw)
  for total in (100, 200, 1_000_000):
    want = schedules.make(total_steps=total, **kw)(60)
    np.testing.assert_allclose(factor(60, total), want, rtol=1e-6)
  assert len(traces) == 1


def test_late_steps_of_long_runs_are_exact():
  schedule = schedules.make(total_steps=3_453_594, warmup_steps=10_000, decay_type="linear")
  got = jax.jit(schedule)(jnp.int32(3_453_593))
  np.testing.assert_allclose(got, 1 / 3_443_594, atol=1.2e-7)  # A float32 step below 1: 6e-8.


@pytest.mark.parametrize(
  ("kw", "message"),
  [
    ({"decay_type": "cosin"}, "Unknown decay_type 'cosin'.*Did you mean 'cosine'"),
    ({"warmup_steps": 80, "cooldown_steps": 30}, "80 and cooldown of 30 .* into 100 steps"),
    ({"linear_end": 0.1}, "linear_end has no effect with decay_type='cosine'"),
    ({"timescale_steps": 5}, "timescale has no effect with decay_type='cosine'"),
    ({"linear_end": 2.0, "decay_type": "linear"}, r"linear_end=2.0; expected a fraction"),
    ({"polynomial_end": 1e-5}, "polynomial_end has no effect with decay_type='cosine'"),
    ({"polynomial_end": -0.1, "decay_type": "polynomial"}, r"polynomial_end=-0.1; expected a frac"),
    ({"power": 0, "decay_type": "polynomial"}, "power=0; expected a finite number > 0"),
    ({"power": float("nan"), "decay_type": "polynomial"}, "power=nan; expected a finite"),
    ({"timescale_steps": 0, "decay_type": "rsqrt"}, "timescale.*> 0"),
  ],
)
def test_bad_schedules(kw, message):
  with pytest.raises(UserError, match=message):
    schedules.make(total_steps=100, **kw)


def test_runs_of_one_step_keep_the_warm_up_of_the_real_run():
  assert schedules.make(total_steps=1, warmup_steps=5000)(0) == 0.0
