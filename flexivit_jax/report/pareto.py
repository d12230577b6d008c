"""Which points, of any of the runs, are worth their cost: no other is at least as accurate at no more cost."""

from collections.abc import Sequence
from typing import NamedTuple

from flexivit_jax.evaluators.intervals import bootstrap
from flexivit_jax.report.runs import EvalRow, Json, ReportRun, to_json

# What a point costs, and which facts two runs have to share for their points to be compared in it.
COSTS = {"gflops": ("dataset", "split"), "ms": ("dataset", "split", "device")}


class Point(NamedTuple):
  """A row of a run; `run` is its place among the runs."""

  run: int
  row: EvalRow


def groups(runs: Sequence[ReportRun], cost: str) -> dict[tuple[str, ...], list[Point]]:
  """The points with a known cost by the facts that they share, from cheap to dear; a fact that no one knows is ""."""
  found: dict[tuple[str, ...], list[Point]] = {}
  for i, run in enumerate(runs):
    facts = tuple(run.facts.get(fact, "") for fact in COSTS[cost])
    points = [Point(i, row) for row in run.rows if getattr(row, cost) is not None]
    found.setdefault(facts, []).extend(points)
  order = lambda point: (getattr(point.row, cost), point.row.top1)  # noqa: E731
  return {facts: sorted(points, key=order) for facts, points in found.items() if points}


def dominated(runs: Sequence[ReportRun], cost: str) -> dict[Point, bool]:
  """Whether another point of the group is at least as accurate at no more cost, and better in one of the two."""
  return {
    point: any(_beats(other.row, point.row, cost) for other in points)
    for points in groups(runs, cost).values()
    for point in points
  }


def _beats(one: EvalRow, other: EvalRow, cost: str) -> bool:
  a, b = getattr(one, cost), getattr(other, cost)
  return one.top1 >= other.top1 and a <= b and (one.top1 > other.top1 or a < b)


def fronts(runs: Sequence[ReportRun], cost: str) -> dict[tuple[str, ...], list[Point]]:
  """Of each group the points that none dominates, from cheap to dear."""
  beaten = dominated(runs, cost)
  return {
    facts: [point for point in points if not beaten[point]]
    for facts, points in groups(runs, cost).items()
  }


def to_json_all(runs: Sequence[ReportRun]) -> list[Json]:
  """The runs as report.json holds them: rows with "interval" (`bootstrap`) and "dominated", null where "ms" is."""
  beaten = {cost: dominated(runs, cost) for cost in COSTS}
  found = []
  for i, run in enumerate(runs):
    written = to_json(run)
    for row, item in zip(run.rows, written["rows"], strict=True):
      item["interval"] = bootstrap(row.top1, row.n)
      item["dominated"] = {cost: beaten[cost].get(Point(i, row)) for cost in COSTS}
    found.append(written)
  return found
