"""The runs as one sentence, as a plain-text table and as HTML tables."""

import html
from collections.abc import Callable, Sequence
from typing import NamedTuple

from flexivit_jax.evaluators.intervals import binomial
from flexivit_jax.report import pareto
from flexivit_jax.report.runs import EvalRow, ReportRun, SizeText, is_trained, order, sides
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


def percent(low: float, high: float | None = None) -> str:
  """Writes one rate, or a range of rates, to a tenth of a percent."""
  ends = [f"{100 * low:.1f}", f"{100 * (low if high is None else high):.1f}"]
  return "–".join(dict.fromkeys(ends)) + "\u00a0%"


def finding(runs: Sequence[ReportRun]) -> str:
  """Returns the result as one sentence, computed from the rows."""
  if len(runs) <= 3:
    return "; ".join(_finding(run) for run in runs) + "."
  worst = sorted(((min(row.top1 for row in run.rows), run.name) for run in runs), reverse=True)
  rest = percent(worst[-1][0], worst[1][0])
  return (
    f"{worst[0][1]} is the best of {len(runs)} runs at its worst patch size: "
    f"{percent(worst[0][0])}; the others fall to {rest}."
  )


def _finding(run: ReportRun) -> str:
  trained = [row for row in run.rows if is_trained(run, row) is not False]
  other = [row for row in run.rows if is_trained(run, row) is False]
  if len(run.rows) == 1:
    never = ", where it was never trained" if other else ""
    return f"{run.name}: {_span(run.rows)} at patch size {side(run.rows[0].patch)}{never}"
  if not other:
    return f"{run.name}: {_span(trained)} at all {len(trained)} patch sizes"
  if not trained:
    return f"{run.name}: {_span(other)} at {len(other)} patch sizes, trained at none of them"
  here = f"its own patch size ({side(trained[0].patch)})"
  if len(trained) > 1:
    here = f"the {len(trained)} patch sizes it was trained at"
  there = f"the {len(other)} others" if len(other) > 1 else "the other"
  return f"{run.name}: {_span(trained)} at {here}, {_span(other)} at {there}"


def _span(rows: Sequence[EvalRow]) -> str:
  return percent(min(row.top1 for row in rows), max(row.top1 for row in rows))


def text(runs: Sequence[ReportRun]) -> str:
  """Returns top-1 in percent, a line a run and a column a patch size; `*` marks trained sizes."""
  keys, cells = _pivot(runs)
  names = [shorten(run.name, 40, "...") for run in runs]
  # A mark, or a space in its place, ends each cell.
  heads = [("top-1 in %", "grid"), *((f"patch {p} ", f"{_plain(s)} ") for p, s in keys)]
  body = (
    [name, *(_cell_text(run, cells.get((run.name, key))) for key in keys)]
    for run, name in zip(runs, names, strict=True)
  )
  lines = aligned([*zip(*heads, strict=True), *body], "<>", least=[0, *(7 for _ in keys)])
  lines.insert(2, "-" * max(map(len, lines[:2])))
  if any(run.trained is not None for run in runs):
    lines.append("* trained at this size")
  return "\n".join(lines)


def _plain(seqhw: SizeText) -> str:
  return grid(seqhw).replace("×", "x")


def _cell_text(run: ReportRun, row: EvalRow | None) -> str:
  if row is None:
    return "- "
  return f"{100 * row.top1:.1f}" + ("*" if is_trained(run, row) else " ")


def _pivot(runs: Sequence[ReportRun]) -> tuple[list[Key], dict[tuple[str, Key], EvalRow]]:
  cells = {(run.name, (row.patch, row.seqhw)): row for run in runs for row in run.rows}
  keys = {key for _, key in cells}
  return sorted(keys, key=lambda key: (order(key[0]), order(key[1]))), cells


def matrix(runs: Sequence[ReportRun]) -> str:
  """Returns the HTML table of top-1: a row a run, a column a patch size, best of a column bold."""
  keys, cells = _pivot(runs)
  best = {key: max(c.top1 for (_, k), c in cells.items() if k == key) for key in keys}
  head = "".join(
    f'<th scope="col">{side(patch)}<small>{grid(seqhw)}</small></th>' for patch, seqhw in keys
  )
  lines = []
  for i, run in enumerate(runs):
    row = "".join(_cell_html(run, cells.get((run.name, key)), best[key]) for key in keys)
    lines.append(f"<tr>{_name_cell(i, run)}{row}</tr>")
  return (
    '<table class="matrix"><thead><tr><th scope="col">patch <small>grid</small></th>'
    f"{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
  )


def _cell_html(run: ReportRun, row: EvalRow | None, best: float) -> str:
  if row is None:
    return '<td class="none">–</td>'
  value = _bold(f"{100 * row.top1:.1f}", row.top1 == best)
  mark = {True: '<i class="mark">●</i>', False: '<i class="mark">○</i>', None: ""}
  # The tint is the accuracy itself: the page's style mixes this share of the run-neutral accent.
  return f'<td style="--tint:{100 * row.top1:.0f}%">{mark[is_trained(run, row)]}{value}</td>'


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


def _percent(rate: float | None) -> str:
  return "–" if rate is None else f"{100 * rate:.1f}"


def _interval(row: EvalRow) -> str:
  low, high = binomial(row.top1, row.n)
  return f"{100 * low:.1f}–{100 * high:.1f}"


_COLUMNS = (
  _Column("patch", "px", lambda r: side(r.patch), lambda r: None),
  _Column("grid", "tokens", lambda r: grid(r.seqhw), lambda r: None),
  _Column("top-1", "%", lambda r: f"{100 * r.top1:.1f}", lambda r: r.top1, max),
  _Column("95 % interval", "%", _interval, lambda r: None),
  _Column("top-5", "%", lambda r: _percent(r.top5), lambda r: r.top5, max),
  _Column("macro", "%", lambda r: _percent(r.top1_macro), lambda r: r.top1_macro, max),
  _Column("loss", "nats", lambda r: f"{r.loss:.3f}", lambda r: r.loss, min),
  _Column("tokens", "", lambda r: f"{r.tokens}", lambda r: float(r.tokens), min),
  _Column("cost", "GFLOPs", lambda r: _digits(r.gflops), lambda r: r.gflops, min, "gflops"),
  _Column("time", "ms", lambda r: _digits(r.ms), lambda r: r.ms, min, "ms"),
  _Column("n", "images", lambda r: f"{r.n:,}", lambda r: None),
)


def full(runs: Sequence[ReportRun]) -> str:
  """Returns the HTML table of all rows and columns: best of a column bold, costs of dominated points marked."""
  rows = [row for run in runs for row in run.rows]
  optional = {"top-5": [row.top5 for row in rows], "macro": [row.top1_macro for row in rows]}
  absent = {head for head, values in optional.items() if all(v is None for v in values)}
  columns = [c for c in _COLUMNS if c.head not in absent]
  best = [_best(column, rows) for column in columns]
  beaten = {cost: pareto.dominated(runs, cost) for cost in pareto.COSTS}
  head = "".join(f'<th scope="col">{c.head}<small>{c.unit}</small></th>' for c in columns)
  groups = []
  for i, run in enumerate(runs):
    name = _name_cell(i, run, rows=len(run.rows))
    lines = []
    for row in run.rows:
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
  unit = {"gflops": "GFLOPs", "ms": "ms"}[cost]
  head = "".join(
    f'<th scope="col">{name}<small>{small}</small></th>'
    for name, small in (
      ("from", unit), ("run", ""), ("patch", "px"), ("grid", "tokens"), ("top-1", "%"),
      ("95 % interval", "%"),
    )
  )  # fmt: skip
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
  row = point.row
  cells = (side(row.patch), grid(row.seqhw), f"{100 * row.top1:.1f}", _interval(row))
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
