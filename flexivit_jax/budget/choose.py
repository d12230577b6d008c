"""Which size to take: the most accurate row of a profile that fits a budget."""

import math
from collections.abc import Callable
from typing import NamedTuple

from flexivit_jax import errors
from flexivit_jax.budget.profile import Profile, Row


class Budget(NamedTuple):
  """Limits, joined by "and"; None: no limit.

  Attributes:
    latency_ms: the 90th percentile of a batch's milliseconds is at most this.
    gflops: of one image, at most.
    memory_mb: of the program and the weights, at most.
    accuracy: the worse end of the interval of the profile's metric is at least this good: at least this, or of a metric
      that is better when smaller, at most. A fraction, where the metric is one.
    throughput: images a second, at least.
  """

  latency_ms: float | None = None
  gflops: float | None = None
  memory_mb: float | None = None
  accuracy: float | None = None
  throughput: float | None = None

  def given(self) -> dict[str, float]:
    """The limits that there are, by name."""
    return {name: limit for name, limit in self._asdict().items() if limit is not None}

  def text(self) -> str:
    """The inverse of `parse`."""
    return ",".join(f"{name}={limit:g}" for name, limit in self.given().items())


def parse(text: str) -> Budget:
  """Parses "latency_ms=20,accuracy=0.7".

  Raises:
    UserError: an unknown limit, one that comes twice, no number, none above 0.
  """
  limits: dict[str, float] = {}
  for part in text.split(","):
    name, equals, number = (piece.strip() for piece in part.partition("="))
    if not equals:
      raise errors.UserError(
        f"--budget: {part!r} is no limit; expected NAME=NUMBER, e.g. latency_ms=20,accuracy=0.7."
      )
    if name not in Budget._fields:
      raise errors.unknown("limit of --budget", name, Budget._fields)
    if name in limits:
      raise errors.UserError(f"--budget: {name} is given twice.")
    try:
      limits[name] = float(number)
    except ValueError as e:
      raise errors.UserError(f"--budget: {name}={number!r}; expected a number.") from e
  return checked(Budget(**limits))


def checked(budget: Budget) -> Budget:
  """Returns the budget.

  Raises:
    UserError: without limits, or one that is not a finite number above 0.
  """
  if not budget.given():
    raise errors.UserError(
      f"A budget without limits; give one or more of {', '.join(Budget._fields)}."
    )
  for name, limit in budget.given().items():
    if not (math.isfinite(limit) and limit > 0):
      raise errors.UserError(f"{name}={limit:g}; expected a number above 0.")
  return budget


def choose(profile: Profile, budget: Budget, *, batch: int | None = None) -> Row:
  """Returns the row to take.

  Of the rows within all limits the one with the best value wins. Rows whose value lies within its interval are as good
  as that one: of these the cheapest is taken, by the milliseconds of one image, then by GFLOPs, then the smaller batch.
  Nothing is interpolated between rows.

  Args:
    profile: of the weights, on the device.
    budget: the limits.
    batch: only rows of this many images; None: all.

  Raises:
    UserError: no limit; a limit that the profile cannot judge; no row of this batch; no row that fits: it names the
      nearest one, that which misses its worst limit by the smallest factor.
  """
  limits = checked(budget).given()
  _check_range(profile, limits)
  rows = [row for row in profile.rows if batch in (None, row.batch)]
  if not rows:
    known = ", ".join(str(n) for n in sorted({row.batch for row in profile.rows}))
    raise errors.UserError(f"The profile has no batches of {batch} images; it has {known}.")
  if "memory_mb" in limits and all(row.memory_mb is None for row in rows):
    raise errors.UserError(
      "memory_mb is a limit, but the profile has no memory: its device does not tell. Leave it out."
    )
  fitting = [
    row for row in rows if all(excess(profile, row, *limit) <= 1 for limit in limits.items())
  ]
  if fitting:
    return best(profile, fitting)
  worst: Callable[[Row], float] = lambda row: max(  # noqa: E731
    excess(profile, row, *limit) for limit in limits.items()
  )
  nearest = min(rows, key=worst)
  missed = [
    f"{name} is {measured(profile, nearest, name):.4g}"
    for name, limit in limits.items()
    if excess(profile, nearest, name, limit) > 1
  ]
  raise errors.UserError(
    f"No size fits {budget.text()}. The nearest is {nearest.name}: its {' and its '.join(missed)}."
    " Loosen the budget."
  )


def measured(profile: Profile, row: Row, name: str) -> float:
  """What a limit is compared with: the cautious end of what was measured."""
  if name == "latency_ms":
    return row.ms_p90
  if name == "throughput":
    return row.images_per_s
  if name == "accuracy":
    return profile.safe(row)
  value = row.gflops if name == "gflops" else row.memory_mb
  return math.inf if value is None else value


def excess(profile: Profile, row: Row, name: str, limit: float) -> float:
  """The factor by which a row misses a limit; at most 1 where it keeps it."""
  value = measured(profile, row, name)
  at_least = name == "throughput" or (name == "accuracy" and profile.metric.get("better") != "min")
  if not at_least:
    return value / limit
  return limit / value if value > 0 else math.inf


def _check_range(profile: Profile, limits: dict[str, float]) -> None:
  accuracy = limits.get("accuracy")
  if accuracy is not None and profile.metric.get("unit") == "%" and accuracy > 1:
    raise errors.UserError(
      f"accuracy={accuracy:g}; {profile.metric['name']} is a fraction, expected 0 to 1, e.g."
      f" accuracy={accuracy / 100:g} for {accuracy:g} %."
    )


def best(profile: Profile, rows: list[Row]) -> Row:
  """Returns the cheapest of the rows that are as good as the one with the best value, see `choose`."""
  top = max(rows, key=lambda row: (profile.merit(row.value), -row.ms / row.batch))
  as_good = [row for row in rows if profile.merit(row.value) >= profile.merit(profile.safe(top))]
  return min(as_good, key=lambda row: (row.ms / row.batch, row.gflops, row.batch))
