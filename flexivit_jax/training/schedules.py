"""Durations in any unit -> steps, and schedules: step -> factor in [0, 1].

A schedule takes Python integers on the host (it then uses NumPy and returns a float) or JAX arrays
under jit (float32). `total_steps` may be an array too, so that a longer run need not be compiled
again. Source of the formulas: big_vision utils.py `create_learning_rate_schedule` and `steps`.
"""

import inspect
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flexivit_jax.errors import UserError, unknown

Number = int | float | np.number | np.ndarray | jax.Array
Duration = int | float | None
Schedule = Callable[..., Any]  # (step, total_steps=<that of the run>) -> factor in [0, 1]


def to_steps(
  name: str,
  *,
  steps: Duration = None,
  epochs: Duration = None,
  examples: Duration = None,
  percent: Duration = None,
  batch_size: int | float | None = None,
  dataset_size: int | None = None,
  total_steps: int | None = None,
  default: int | None = None,
) -> int:
  """Returns the steps of a duration that is given in exactly one unit.

  Args:
    name: of the duration, e.g. "warmup": the user's keys are `warmup_steps`, `warmup_epochs`, ...
    steps: a whole number of steps.
    epochs: passes over the data set; steps = round(epochs * dataset_size / batch_size).
    examples: images; steps = round(examples / batch_size).
    percent: fraction in [0, 1] of the run, as in big_vision; steps = round(percent * total_steps).
    batch_size: global, images a step; a mean where steps differ.
    dataset_size: images in the training split.
    total_steps: of the run.
    default: the result when no unit is given; without it, none given is an error.

  Rounding never turns a positive duration into 0 steps.

  Raises:
    UserError: none or several units given, a value out of range, or a needed size is absent.
  """
  units = {"steps": steps, "epochs": epochs, "examples": examples, "percent": percent}
  given = {unit: value for unit, value in units.items() if value is not None}
  if not given and default is not None:
    return default
  if len(given) != 1:
    got = ", ".join(f"{name}_{unit}={value}" for unit, value in given.items()) or "none"
    raise UserError(f"Got {got}; give exactly one of {', '.join(f'{name}_{u}' for u in units)}.")
  unit, value = given.popitem()
  _check_duration(f"{name}_{unit}", unit, value)
  if unit == "steps":
    return int(value)
  sizes = {"batch_size": batch_size, "dataset_size": dataset_size, "total_steps": total_steps}
  needs = {"epochs": ("dataset_size", "batch_size"), "examples": ("batch_size",)}
  for size in needs.get(unit, ("total_steps",)):
    if sizes[size] is None:
      raise UserError(f"{name}_{unit}={value} needs {size}, which is not known; use {name}_steps.")
  exact = {
    "epochs": lambda: value * dataset_size / batch_size,
    "examples": lambda: value / batch_size,
    "percent": lambda: value * total_steps,
  }[unit]()
  return max(1, round(exact)) if value else 0


def cosine(step: Number, *, total_steps: Number, warmup_steps: int) -> Number:
  """Half a cosine from 1 at the end of the warm-up to 0 at the end of the run."""
  progress = _progress(step, total_steps, warmup_steps)
  return 0.5 * (1.0 + _xp(progress).cos(np.pi * progress))


def linear(
  step: Number, *, total_steps: Number, warmup_steps: int, linear_end: int | float = 0.0
) -> Number:
  """A straight line from 1 at the end of the warm-up to `linear_end` at the end of the run."""
  return linear_end + (1.0 - linear_end) * (1.0 - _progress(step, total_steps, warmup_steps))


def polynomial(
  step: Number,
  *,
  total_steps: Number,
  warmup_steps: int,
  power: int | float = 0.9,
  polynomial_end: int | float = 0.0,
) -> Number:
  """(1 - progress) ** power from 1 at the end of the warm-up to `polynomial_end` at the end of the run.

  Source: DeepLab (arXiv 1606.00915); Segmenter's rule, (lr - lowest) * (1 - step / total) ** 0.9 + lowest, is
  polynomial_end=lowest / lr.
  """
  left = 1.0 - _progress(step, total_steps, warmup_steps)
  return polynomial_end + (1.0 - polynomial_end) * left**power


def rsqrt(
  step: Number, *, total_steps: Number, warmup_steps: int, timescale: int = 10_000
) -> Number:
  """1 / sqrt(1 + t / timescale), t the steps since the warm-up; knows no end: add a cooldown."""
  del total_steps
  xp = _xp(step)
  return 1.0 / xp.sqrt(1.0 + xp.maximum(step - warmup_steps, 0) / timescale)


def constant(step: Number, *, total_steps: Number, warmup_steps: int) -> Number:
  """Always 1."""
  del total_steps, warmup_steps
  return 1.0 + 0.0 * step


SCHEDULES: dict[str, Schedule] = {
  "cosine": cosine,
  "linear": linear,
  "polynomial": polynomial,
  "rsqrt": rsqrt,
  "constant": constant,
}


def make(
  *,
  total_steps: int,
  decay_type: str = "cosine",
  warmup_steps: Duration = None,
  warmup_epochs: Duration = None,
  warmup_examples: Duration = None,
  warmup_percent: Duration = None,
  cooldown_steps: Duration = None,
  cooldown_epochs: Duration = None,
  cooldown_examples: Duration = None,
  cooldown_percent: Duration = None,
  timescale_steps: Duration = None,
  timescale_epochs: Duration = None,
  timescale_examples: Duration = None,
  timescale_percent: Duration = None,
  linear_end: int | float | None = None,
  power: int | float | None = None,
  polynomial_end: int | float | None = None,
  batch_size: int | float | None = None,
  dataset_size: int | None = None,
) -> Schedule:
  """Returns `schedule(step, total_steps=total_steps)` -> factor in [0, 1].

  The factor is `decay * min(1, step / warmup) * min(1, (total - step) / cooldown)`; the first step
  of a run is step 0. Warm-up, cooldown (default: none) and the rsqrt timescale are durations, see
  `to_steps`; those in percent are counted from this `total_steps` once and for all. `linear_end`, `power` and
  `polynomial_end` are arguments of the decays; an end is a fraction of the peak: for lr=1e-3 and a lowest rate of 1e-5
  it is 0.01.

  Raises:
    UserError: unknown `decay_type`, a bad duration, warm-up and cooldown longer than the run, or an
      option that the decay does not use.
  """
  if decay_type not in SCHEDULES:
    raise unknown("decay_type", decay_type, SCHEDULES)
  decay = SCHEDULES[decay_type]
  durations = {
    "warmup": (warmup_steps, warmup_epochs, warmup_examples, warmup_percent),
    "cooldown": (cooldown_steps, cooldown_epochs, cooldown_examples, cooldown_percent),
    "timescale": (timescale_steps, timescale_epochs, timescale_examples, timescale_percent),
  }
  sizes: dict[str, Any] = dict(
    batch_size=batch_size, dataset_size=dataset_size, total_steps=total_steps
  )
  steps = {
    name: to_steps(
      name, steps=given[0], epochs=given[1], examples=given[2], percent=given[3], default=0, **sizes
    )
    for name, given in durations.items()
  }
  warmup, cooldown = steps["warmup"], steps["cooldown"]
  _check_fits(total_steps, warmup, cooldown)
  timescale = steps["timescale"] if any(x is not None for x in durations["timescale"]) else None
  options = _options(
    decay, timescale=timescale, linear_end=linear_end, power=power, polynomial_end=polynomial_end
  )

  def schedule(step: Number, total_steps: Number = total_steps) -> Number:
    factor = decay(step, total_steps=total_steps, warmup_steps=warmup, **options)
    return factor * _ramps(step, total_steps, warmup, cooldown)

  return schedule


def _ramps(step: Number, total_steps: Number, warmup: int, cooldown: int) -> Number:
  xp = _xp(step, total_steps)
  up = xp.minimum(1.0, step / warmup) if warmup else 1.0
  # Clipped at 0 (the reference is not): a step after the end must not climb the gradient.
  down = xp.clip((total_steps - step) / cooldown, 0.0, 1.0) if cooldown else 1.0
  return up * down


def _progress(step: Number, total_steps: Number, warmup_steps: int) -> Number:
  xp = _xp(step, total_steps)
  # The steps are subtracted as integers, so that float32 loses nothing in long runs.
  done = (step - warmup_steps) / xp.maximum(total_steps - warmup_steps, 1)
  return xp.clip(done, 0.0, 1.0)


def _xp(*values: Number) -> Any:
  return jnp if any(isinstance(value, jax.Array) for value in values) else np


def _check_duration(key: str, unit: str, value: int | float) -> None:
  if not (math.isfinite(value) and value >= 0):
    raise UserError(f"{key}={value}; expected a finite number >= 0.")
  if unit == "steps" and value != int(value):
    raise UserError(f"{key}={value}; expected a whole number of steps.")
  if unit == "percent" and value > 1:
    raise UserError(
      f"{key}={value}; it is a fraction of the run: write {value / 100} for {value} %."
    )


def _check_fits(total_steps: int, warmup: int, cooldown: int) -> None:
  # Runs of 0 or 1 steps, to evaluate or to debug, keep the schedule of the real run.
  if total_steps > 1 and warmup + cooldown > total_steps:
    raise UserError(
      f"Warm-up of {warmup} and cooldown of {cooldown} steps do not fit into {total_steps} steps;"
      " shorten them, or give them in percent."
    )


def _options(decay: Schedule, **given: int | float | None) -> dict[str, int | float]:
  options = {key: value for key, value in given.items() if value is not None}
  for key in options:
    if key not in inspect.signature(decay).parameters:
      raise UserError(f"{key} has no effect with decay_type={decay.__name__!r}; remove it.")
  if options.get("timescale") == 0:
    raise UserError("timescale is 0 steps; expected > 0.")
  for key in ("linear_end", "polynomial_end"):
    if not 0.0 <= options.get(key, 0.0) <= 1.0:
      raise UserError(f"{key}={options[key]}; expected a fraction in [0, 1].")
  if not 0.0 < options.get("power", 1.0) < math.inf:
    raise UserError(f"power={options['power']}; expected a finite number > 0.")
  return options
