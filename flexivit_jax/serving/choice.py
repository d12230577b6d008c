"""Which size a request gets that names none: by its budget, its deadline, and the load. Pure."""

import math
from collections.abc import Callable
from typing import NamedTuple

from flexivit_jax import errors
from flexivit_jax.budget import choose
from flexivit_jax.budget.choose import Budget
from flexivit_jax.budget.profile import Profile, Row
from flexivit_jax.sizes import SeqHw, size_text


class Policy(NamedTuple):
  """What a server knows and is allowed.

  Attributes:
    sizes: those that are served.
    profile: what they give and cost; its rows are of served sizes and batches alone. None: not known.
    floor: accuracy that a size must give at least, by the worse end of its interval, where load or a deadline chooses
      it; None: load chooses none, a deadline any.
    target: seconds after which an answer without a deadline is predicted too late, so that a coarser size is taken.
  """

  sizes: tuple[SeqHw, ...]
  profile: Profile | None = None
  floor: float | None = None
  target: float = 1.0


class Choice(NamedTuple):
  """A size for a request; `batch` where its budget is for batches of so many images; `degraded` by load."""

  size: SeqHw
  batch: int | None = None
  degraded: bool = False


def restricted(
  profile: Profile,
  sizes: tuple[SeqHw, ...],
  batches: tuple[int, ...],
  way: tuple[str, str] = ("jax", "float32"),
) -> Profile:
  """Returns a profile with rows of these sizes, batches and (runtime, dtype) alone.

  Raises:
    UserError: a size that it does not have.
  """
  rows = [r for r in profile.rows if r.size in sizes and (r.runtime, r.dtype) == way]
  if missing := [size for size in sizes if size not in {row.size for row in rows}]:
    raise errors.UserError(
      f"The profile has no seqhw={size_text(missing[0])}; it has"
      f" {', '.join(str(size_text(s)) for s in dict.fromkeys(r.size for r in profile.rows))}. Serve these, or measure"
      " all with `flexivit profile`."
    )
  return profile._replace(rows=tuple(row for row in rows if row.batch in batches))


def check(policy: Policy) -> Policy:
  """Returns the policy; raises a UserError for a floor without a profile, or that no size reaches."""
  if policy.floor is None:
    return policy
  if policy.profile is None:
    raise errors.UserError("--accuracy_floor needs a profile; make one with `flexivit profile`.")
  if not _above(policy, policy.profile, list(policy.profile.rows)):
    best = max(map(policy.profile.safe, policy.profile.rows), key=policy.profile.merit)
    raise errors.UserError(
      f"--accuracy_floor={policy.floor:g}: no size reaches it; the best reaches {best:.4g}."
    )
  return policy


def chosen(
  policy: Policy,
  budget: Budget | None,
  finish: Callable[[SeqHw, int | None], float],
  now: float,
  deadline: float = math.inf,
) -> Choice | None:
  """Returns the size for a request that names none, or None: none would be done by the deadline.

  It is the most accurate one, by the rule of `budget.choose`, of those within the budget that are predicted to be done
  in time: by the deadline, or under load by the target of the policy. With a floor, the time to a deadline is not used
  up by fine sizes: those that would be done in its second half give way to that which is done first, or whoever comes
  next would be refused. If no size is in time, and there is no deadline, it is that which is done first.

  Args:
    policy: of the server.
    budget: of the request.
    finish: predicts when a size, in batches of so many images or of any, would be done.
    now: the time.
    deadline: of the request.

  Raises:
    UserError: no profile, and several sizes; no size is within the budget.
  """
  profile = policy.profile
  if profile is None:
    return _only(policy, budget)
  rows = list(profile.rows)
  if budget is not None:
    choose.choose(profile, budget)  # raises where none fits
    limits = budget.given().items()
    rows = [r for r in rows if all(choose.excess(profile, r, *limit) <= 1 for limit in limits)]
  best = choose.best(profile, rows)
  elastic = math.isfinite(deadline) or policy.floor is not None
  if not elastic:
    return _choice(best, best, budget)
  allowed = _above(policy, profile, rows) or [best]
  until = deadline if math.isfinite(deadline) else now + policy.target
  end = {row: finish(row.size, row.batch if budget else None) for row in allowed}
  in_time = [row for row in allowed if end[row] <= until]
  if not in_time and math.isfinite(deadline):
    return None
  if policy.floor is not None and math.isfinite(deadline):
    in_time = [row for row in in_time if end[row] - now <= (deadline - now) / 2]
  if in_time:
    return _choice(choose.best(profile, in_time), best, budget)
  return _choice(min(allowed, key=end.__getitem__), best, budget)


def _only(policy: Policy, budget: Budget | None) -> Choice:
  if budget is None and len(policy.sizes) == 1:
    return Choice(policy.sizes[0])
  sizes = ", ".join(str(size_text(size)) for size in policy.sizes)
  raise errors.UserError(
    f"this server has no profile to choose a size by; name one with seqhw=, of {sizes}"
  )


def _above(policy: Policy, profile: Profile, rows: list[Row]) -> list[Row]:
  if policy.floor is None:
    return rows
  floor = profile.merit(policy.floor)
  return [row for row in rows if profile.merit(profile.safe(row)) >= floor]


def _choice(row: Row, best: Row, budget: Budget | None) -> Choice:
  return Choice(row.size, row.batch if budget else None, row.size != best.size)
