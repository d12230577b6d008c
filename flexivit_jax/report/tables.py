"""The runs as one sentence, as a plain-text table and as HTML tables."""

import csv
import functools
import html
import io
import itertools
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from flexivit_jax.evaluators.metrics import Metric
from flexivit_jax.report import pareto
from flexivit_jax.report.rows import EvalRow, ReportRun, SizeText, is_trained, order, sides
from flexivit_jax.tables import aligned

DOMINATED = "▼"
# (patch, seqhw): the two tell rows of different image sizes apart.
Key = tuple[SizeText, SizeText]


def shorten(name: str, width: int, dots: str = "…") -> str:
  """Cuts the middle out of a long name: runs differ at either end of their names."""
  if len(name) <= width:
    return name
  head = (width - len(dots) + 1) // 2
  tail = width - len(dots) - head
  return name[:head] + dots + name[len(name) - tail :]


def side(size: SizeText) -> str:
  """Writes 8 as `8` and "8x6" as `8×6`."""
  return str(size).replace("x", "×")


def grid(size: SizeText) -> str:
  """Writes the grid 8 as `8×8`."""
  return "{}×{}".format(*sides(size))


def number(metric: Metric, value: float | None) -> str:
  """Writes a value without its unit: a share in percent to a tenth, whole numbers as such, others to three places."""
  if value is None:
    return "–"
  if metric.unit == "%":
    return f"{100 * value:.1f}"
  if abs(value) >= 1000 or isinstance(value, int):
    return f"{value:,.0f}"
  return f"{value:.3f}" if value == 0 or abs(value) >= 0.0005 else f"{value:.3g}"


def span(metric: Metric, low: float, high: float | None = None) -> str:
  """Writes one value, or a range of values, with the unit."""
  ends = [number(metric, low), number(metric, low if high is None else high)]
  return "–".join(dict.fromkeys(ends)) + (f"\u00a0{metric.unit}" if metric.unit else "")


def quantity(metric: Metric) -> str:
  """What the metric is, in a word where it can be: "accuracy" of "top-1 accuracy"."""
  return metric.long.removeprefix(metric.short).strip() or metric.long


def stem(metric: Metric) -> str:
  """How names of files with this metric begin."""
  word = quantity(metric)
  return word if word == "accuracy" else re.sub(r"\W+", "_", metric.name)


def capital(text: str) -> str:
  """Begins a heading with a capital, unless its first word has a spelling of its own: mIoU."""
  return text[:1].upper() + text[1:] if text.partition(" ")[0].islower() else text


def heading(metric: Metric) -> str:
  """What a heading calls the metric: its short name where the long one begins with it, else the long one."""
  return capital(metric.short if metric.long.startswith(metric.short) else metric.long)


def unit(metric: Metric) -> str:
  """Returns " (%)" to follow the metric's name, "" without a unit."""
  return f" ({metric.unit})" if metric.unit else ""


def finding(runs: Sequence[ReportRun]) -> str:
  """Returns the result as one sentence, computed from the rows."""
  metric = runs[0].metric
  low = " Lower is better." if metric.better == "min" else ""
  if len(runs) <= 3:
    return "; ".join(_finding(run) for run in runs) + "." + low
  merits = ((min(metric.merit(row.value) for row in run.rows), run.name) for run in runs)
  worst = [(metric.merit(merit), name) for merit, name in sorted(merits, reverse=True)]
  rest = span(metric, *sorted((worst[-1][0], worst[1][0])))
  return (
    f"{worst[0][1]} is the best of {len(runs)} runs at its worst patch size: "
    f"{span(metric, worst[0][0])}; the others {'rise' if low else 'fall'} to {rest}.{low}"
  )


def _finding(run: ReportRun) -> str:
  trained = [row for row in run.rows if is_trained(run, row) is not False]
  other = [row for row in run.rows if is_trained(run, row) is False]
  if len(run.rows) == 1:
    never = ", where it was never trained" if other else ""
    return f"{run.name}: {_span(run, run.rows)} at patch size {side(run.rows[0].patch)}{never}"
  if not other:
    return f"{run.name}: {_span(run, trained)} at all {len(trained)} patch sizes"
  if not trained:
    return f"{run.name}: {_span(run, other)} at {len(other)} patch sizes, trained at none of them"
  here = f"its own patch size ({side(trained[0].patch)})"
  if len(trained) > 1:
    here = f"the {len(trained)} patch sizes it was trained at"
  there = f"the {len(other)} others" if len(other) > 1 else "the other"
  return f"{run.name}: {_span(run, trained)} at {here}, {_span(run, other)} at {there}"


def _span(run: ReportRun, rows: Sequence[EvalRow]) -> str:
  return span(run.metric, min(row.value for row in rows), max(row.value for row in rows))


def text(runs: Sequence[ReportRun]) -> str:
  """Returns the metric, a line a run and a column a patch size; `*` marks trained sizes."""
  metric = runs[0].metric
  title = metric.short + (f" in {metric.unit}" if metric.unit else "")
  title += " (lower is better)" if metric.better == "min" else ""
  keys, cells = _pivot(runs)
  names = [shorten(run.name, 40, "...") for run in runs]
  # A mark, or a space in its place, ends each cell.
  heads = [(title, "grid"), *((f"patch {p} ", f"{_plain(s)} ") for p, s in keys)]
  body = (
    [name, *(_cell_text(run, cells.get((run.name, key))) for key in keys)]
    for run, name in zip(runs, names, strict=True)
  )
  above = (
    [name, *(f"{number(metric, values.get(key)) if key in values else '-'} " for key in keys)]
    for name, values in ceilings(runs)
  )
  lines = aligned([*zip(*heads, strict=True), *body, *above], "<>", least=[0, *(7 for _ in keys)])
  lines.insert(2, "-" * max(map(len, lines[:2])))
  if any(run.trained is not None for run in runs):
    lines.append("* trained at this size")
  for run in runs:
    lines += [_cascade_text(run, row) for row in run.cascades]
  return "\n".join(lines)


def csv_of(runs: Sequence[ReportRun], axis: str) -> str:
  """The points of a figure as CSV: the axis, the metric, and the ends of its interval.

  Args:
    runs: as they are drawn, of one metric.
    axis: "patch" or "gflops".
  """
  name = runs[0].metric.name
  places = ["patch", "seqhw", "depth", "cascade"] + (["gflops"] if axis == "gflops" else [])
  file = io.StringIO(newline="")
  writer = csv.writer(file, lineterminator="\n")
  writer.writerow(["run", *places, name, "low", "high", "n"])
  for run in runs:
    for row in run.points:
      at = ["" if getattr(row, place) is None else getattr(row, place) for place in places]
      writer.writerow([run.name, *at, row.value, *(row.interval or ("", "")), row.n])
  return file.getvalue()


def _cascade_text(run: ReportRun, row: EvalRow) -> str:
  stages = row.cascade.replace("→", ">")
  return (
    f"{shorten(run.name, 40, '...')}, cascade {stages} by {row.setting}: {span(run.metric, row.value)},"
    f" {_digits(row.gflops)} GFLOPs, {_digits(row.ms)} ms"
  ).replace("\u00a0", " ")


def _plain(seqhw: SizeText) -> str:
  return grid(seqhw).replace("×", "x")


def _cell_text(run: ReportRun, row: EvalRow | None) -> str:
  if row is None:
    return "- "
  return number(run.metric, row.value) + ("*" if is_trained(run, row) else " ")


def _pivot(runs: Sequence[ReportRun]) -> tuple[list[Key], dict[tuple[str, Key], EvalRow]]:
  cells = {(run.name, (row.patch, row.seqhw)): row for run in runs for row in run.rows}
  keys = {key for _, key in cells}
  return sorted(keys, key=lambda key: (order(key[0]), order(key[1]))), cells


def matrix(runs: Sequence[ReportRun]) -> str:
  """Returns the HTML table of the metric: a row a run, a column a patch size, best of a column bold."""
  keys, cells = _pivot(runs)
  best_of = max if runs[0].metric.better == "max" else min
  best = {key: best_of(c.value for (_, k), c in cells.items() if k == key) for key in keys}
  tint = _tints(runs)
  head = "".join(
    f'<th scope="col">{side(patch)}<small>{grid(seqhw)}</small></th>' for patch, seqhw in keys
  )
  lines = []
  for i, run in enumerate(runs):
    row = "".join(_cell_html(run, cells.get((run.name, key)), best[key], tint) for key in keys)
    lines.append(f"<tr>{_name_cell(i, run)}{row}</tr>")
  for name, values in ceilings(runs):
    row = "".join(_ceiling_cell(runs[0].metric, values.get(key)) for key in keys)
    lines.append(f'<tr class="ceiling"><th scope="row">{html.escape(name)}</th>{row}</tr>')
  return (
    '<table class="matrix"><thead><tr><th scope="col">patch <small>grid</small></th>'
    f"{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
  )


def ceilings(runs: Sequence[ReportRun]) -> list[tuple[str, dict[Key, float]]]:
  """Returns a name and the ceiling at each size, see `Metric.ceiling_of`; once for runs of which it is the same."""
  found: list[tuple[str, dict[Key, float]]] = []
  for run in runs:
    values = {
      (row.patch, row.seqhw): value
      for row in run.rows
      if run.ceiling and (value := row.of(run.ceiling.name)) is not None
    }
    near = (other for _, other in found if _agree(values, other))
    if values and (same := next(near, None)) is not None:
      same |= values
    elif values:
      found.append((run.name, values))
  if len(found) == 1:
    return [("ceiling", found[0][1])]
  return [(f"ceiling of {name}", values) for name, values in found]


def _agree(one: dict[Key, float], other: dict[Key, float]) -> bool:
  return all(abs(one[key] - other[key]) < 1e-6 for key in one.keys() & other.keys())


def _ceiling_cell(metric: Metric, value: float | None) -> str:
  return '<td class="none">–</td>' if value is None else f"<td>{number(metric, value)}</td>"


def _tints(runs: Sequence[ReportRun]) -> Callable[[float], float]:
  """Returns the tint of a value, 0 to 1: more is better. That of an accuracy is the accuracy itself."""
  metric = runs[0].metric
  if metric.unit == "%":
    return lambda value: value if metric.better == "max" else 1 - value
  merits = [metric.merit(row.value) for run in runs for row in run.rows]
  low, width = min(merits), max(merits) - min(merits)
  return lambda value: (metric.merit(value) - low) / width if width else 0.5


def _cell_html(
  run: ReportRun, row: EvalRow | None, best: float, tint: Callable[[float], float]
) -> str:
  if row is None:
    return '<td class="none">–</td>'
  value = _bold(number(run.metric, row.value), row.value == best)
  mark = {True: '<i class="mark">●</i>', False: '<i class="mark">○</i>', None: ""}
  # The page's style mixes this share of the run-neutral accent.
  return f'<td style="--tint:{100 * tint(row.value):.0f}%">{mark[is_trained(run, row)]}{value}</td>'


class _Column(NamedTuple):
  head: str
  unit: str
  show: Callable[[EvalRow], str]
  value: Callable[[EvalRow], float | None]
  best: Callable[[list[float]], float] | None = None  # max, min or None: nothing to win
  cost: str | None = None  # one of `pareto.COSTS`: cells of points that others dominate are marked


def _digits(value: float | None) -> str:
  """Writes three significant digits, without an exponent where the number is large."""
  if value is None:
    return "–"
  return f"{value:,.0f}" if value >= 1000 else f"{value:#.3g}".rstrip(".")


def _interval(metric: Metric, row: EvalRow) -> str:
  if row.interval is None:
    return "–"
  low, high = row.interval
  return f"{number(metric, low)}–{number(metric, high)}"


def has_intervals(runs: Sequence[ReportRun]) -> bool:
  """Whether any row has an interval of the metric that is drawn."""
  return any(row.interval is not None for run in runs for row in run.rows)


def _patch(row: EvalRow) -> str:
  """The patch; of a cascade its signal and risk."""
  return row.setting or side(row.patch)


def _grid(row: EvalRow) -> str:
  """The grid; of a cascade those of its stages."""
  return row.cascade or grid(row.seqhw)


_SIZES = (
  _Column("patch", "px", _patch, lambda r: None),
  _Column("grid", "tokens", _grid, lambda r: None),
)
_COSTS = (
  _Column("tokens", "", lambda r: f"{r.tokens}", lambda r: float(r.tokens), min),
  _Column("cost", "GFLOPs", lambda r: _digits(r.gflops), lambda r: r.gflops, min, "gflops"),
  _Column("time", "ms", lambda r: _digits(r.ms), lambda r: r.ms, min, "ms"),
  _Column("n", "images", lambda r: f"{r.n:,}", lambda r: None),
)


def _metric_columns(runs: Sequence[ReportRun]) -> list[_Column]:
  """Returns the columns of the metric that is drawn, of its interval, and of the other metrics, fractions first."""
  drawn = runs[0].metric
  every = {drawn.name: drawn}
  for metric in itertools.chain.from_iterable(run.metrics for run in runs):
    every.setdefault(metric.name, metric)
  _, *others = every.values()
  others.sort(key=lambda metric: metric.unit != "%")
  first, *rest = map(_metric_column, [drawn, *others])
  interval = _Column(
    "95 % interval", drawn.unit, functools.partial(_interval, drawn), lambda r: None
  )
  return [first, *([interval] if has_intervals(runs) else []), *rest]


def _metric_column(metric: Metric) -> _Column:
  best = None if metric.ceiling_of else max if metric.better == "max" else min
  value: Callable[[EvalRow], float | None] = lambda row: row.of(metric.name)  # noqa: E731
  return _Column(metric.short, metric.unit, lambda row: number(metric, value(row)), value, best)


def full(runs: Sequence[ReportRun]) -> str:
  """Returns the HTML table of all rows and columns: best of a column bold, costs of dominated points marked."""
  rows = [row for run in runs for row in run.points]
  columns = [*_SIZES, *_metric_columns(runs), *_COSTS]
  best = [_best(column, rows) for column in columns]
  beaten = {cost: pareto.dominated(runs, cost) for cost in pareto.COSTS}
  head = "".join(
    f'<th scope="col">{html.escape(c.head)}<small>{html.escape(c.unit)}</small></th>'
    for c in columns
  )
  groups = []
  for i, run in enumerate(runs):
    name = _name_cell(i, run, rows=len(run.points))
    lines = []
    for row in run.points:
      point = pareto.Point(i, row)
      marked = [bool(c.cost and beaten[c.cost].get(point)) for c in columns]
      lines.append("".join(map(_full_cell, columns, best, [row] * len(columns), marked)))
    groups.append(f"<tbody><tr>{name}{'</tr><tr>'.join(lines)}</tr></tbody>")
  return (
    f'<table class="full"><thead><tr><th scope="col">run</th>{head}</tr></thead>'
    f"{''.join(groups)}</table>"
  )


def _best(column: _Column, rows: Sequence[EvalRow]) -> float | None:
  values = [value for row in rows if (value := column.value(row)) is not None]
  # A column of equal values has no winner; to print all of it bold would say there is one.
  return column.best(values) if column.best and len(set(values)) > 1 else None


def _full_cell(column: _Column, best: float | None, row: EvalRow, marked: bool) -> str:
  won = best is not None and column.value(row) == best
  mark = f'<i class="mark">{DOMINATED}</i>' if marked else ""
  return f"<td>{mark}{_bold(column.show(row), won)}</td>"


def front(runs: Sequence[ReportRun], cost: str) -> str:
  """Returns an HTML table for each group of `pareto.fronts`: from which cost on which run and patch size to use."""
  found = pareto.fronts(runs, cost)
  metric = runs[0].metric
  names = [("from", {"gflops": "GFLOPs", "ms": "ms"}[cost]), ("run", ""), ("patch", "px")]
  names += [("grid", "tokens"), (metric.short, metric.unit)]
  names += [("95 % interval", metric.unit)] if has_intervals(runs) else []
  head = "".join(
    f'<th scope="col">{html.escape(name)}<small>{html.escape(small)}</small></th>'
    for name, small in names
  )
  tables = []
  for facts, points in found.items():
    title = " · ".join(filter(None, facts)) if len(found) > 1 else ""
    caption = f"<caption>{html.escape(title)}</caption>" if title else ""
    lines = "".join(_front_line(runs, point, cost) for point in points)
    tables.append(
      f'<table class="front">{caption}<thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table>'
    )
  return "".join(tables)


def _front_line(runs: Sequence[ReportRun], point: pareto.Point, cost: str) -> str:
  row, metric = point.row, runs[0].metric
  cells = [_patch(row), _grid(row), number(metric, row.value)]
  cells += [_interval(metric, row)] if has_intervals(runs) else []
  return (
    f'<tr><th scope="row">{_digits(getattr(row, cost))}</th>'
    f'<td class="name">{_name(point.run, runs[point.run])}</td>'
    f"{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
  )


def _bold(value: str, won: bool) -> str:
  return f"<b>{value}</b>" if won else value


def _name_cell(i: int, run: ReportRun, rows: int = 1) -> str:
  scope = f'"rowgroup" rowspan="{rows}"' if rows > 1 else '"row"'
  return f'<th scope={scope} title="{html.escape(run.name)}">{_name(i, run)}</th>'


def _name(i: int, run: ReportRun) -> str:
  key = f'<span class="key" style="--c:var(--run{i % 6})"></span>'
  return f"{key}{html.escape(shorten(run.name, 28))}"
