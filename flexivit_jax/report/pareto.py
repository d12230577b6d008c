"""Pareto fronts: the points of all runs for which no other point is at least as good at no more cost."""

from collections.abc import Sequence
from typing import NamedTuple

from flexivit_jax.report.fields import Json
from flexivit_jax.report.rows import EvalRow, ReportRun
from flexivit_jax.report.runs import to_json

# Costs of a point, and the facts that two runs must share for a comparison of this cost.
COSTS = {"gflops": ("dataset", "split"), "ms": ("dataset", "split", "device")}


class Point(NamedTuple):
  """A row of a run, or one of its cascades; `run` is the index of the run."""

  run: int
  row: EvalRow


def groups(runs: Sequence[ReportRun], cost: str) -> dict[tuple[str, ...], list[Point]]:
  """Returns the points with this cost, grouped by shared facts and sorted by cost; unknown facts are ""."""
  grouped: dict[tuple[str, ...], list[Point]] = {}
  for i, run in enumerate(runs):
    facts = tuple(run.facts.get(fact, "") for fact in COSTS[cost])
    points = [Point(i, row) for row in run.points if getattr(row, cost) is not None]
    grouped.setdefault(facts, []).extend(points)
  order = lambda point: (getattr(point.row, cost), merit(runs, point))  # noqa: E731
  return {facts: sorted(points, key=order) for facts, points in grouped.items() if points}


def merit(runs: Sequence[ReportRun], point: Point) -> float:
  """The value of a point, negative where smaller values are better: larger is better."""
  return runs[point.run].metric.merit(point.row.value)


def dominated(runs: Sequence[ReportRun], cost: str) -> dict[Point, bool]:
  """Whether another point of the group is at least as good at no more cost, and better in one of the two."""

  def beats(one: Point, other: Point) -> bool:
    (a, x), (b, y) = ((getattr(point.row, cost), merit(runs, point)) for point in (one, other))
    return x >= y and a <= b and (x > y or a < b)

  return {
    point: any(beats(other, point) for other in points)
    for points in groups(runs, cost).values()
    for point in points
  }


def fronts(runs: Sequence[ReportRun], cost: str) -> dict[tuple[str, ...], list[Point]]:
  """Returns the points of each group that no other dominates, sorted by cost."""
  beaten = dominated(runs, cost)
  return {
    facts: [point for point in points if not beaten[point]]
    for facts, points in groups(runs, cost).items()
  }


def to_json_all(runs: Sequence[ReportRun]) -> list[Json]:
  """Returns the runs as in report.json: rows with "interval" (null: none) and "dominated" (null if "ms" is)."""
  beaten = {cost: dominated(runs, cost) for cost in COSTS}
  contents = []
  for i, run in enumerate(runs):
    written = to_json(run)
    items = written["rows"] + written.get("cascades", [])
    for row, item in zip(run.points, items, strict=True):
      item["interval"] = row.interval
      item["dominated"] = {cost: beaten[cost].get(Point(i, row)) for cost in COSTS}
    contents.append(written)
  return contents
