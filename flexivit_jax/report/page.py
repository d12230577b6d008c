"""The report as one self-contained HTML page; its layout and style are in page.html."""

import html
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from string import Template

from flexivit_jax.evaluators.metrics import Metric
from flexivit_jax.report import boxes, classes, images, pareto, plots, segments, tables
from flexivit_jax.report.rows import ReportRun, is_trained

_VARIABLES = {
  plots.INK: "ink",
  plots.FAINT: "faint",
  plots.GRID: "grid",
  plots.PAPER: "paper",
  **{color: f"run{i}" for i, color in enumerate(plots.COLORS)},
}
_AGAINST = {"patch": "patch size", "gflops": "GFLOPs"}


def render(
  runs: Sequence[ReportRun],
  *,
  wide: Mapping[str, plots.Drawing],
  narrow: Mapping[str, plots.Drawing],
  command: str,
  sections: str = "",
) -> str:
  """Returns the page.

  Args:
    runs: in the order of their curves.
    wide, narrow: a figure for each of `plots.AXES`.
    command: for the footer.
    sections: HTML that stands before the tables of classes.
  """
  template = Template((resources.files(__package__) / "page.html").read_text(encoding="utf-8"))
  metric = runs[0].metric
  alt = {axis: f"{tables.capital(metric.long)} against {_AGAINST[axis]}" for axis in plots.AXES}
  charts = {
    axis: inline(wide[axis].page_svg, f"{axis}-wide", "wide", alt[axis])
    + inline(narrow[axis].page_svg, f"{axis}-narrow", "narrow", alt[axis])
    for axis in plots.AXES
  }
  quantity = html.escape(tables.capital(tables.quantity(metric)))
  return template.substitute(
    charts,
    title=f"{quantity} at every patch size",
    quantity=quantity,
    head=html.escape(tables.heading(metric)),
    unit=html.escape(tables.unit(metric)),
    best="most accurate" if _is_accuracy(metric) else "best",
    intervals=_intervals(runs),
    eyebrow=html.escape(" · ".join(["flexivit report", *_data(runs)])),
    finding=html.escape(tables.finding(runs)),
    matrix=tables.matrix(runs),
    marks=_marks(runs),
    ceiling=_ceiling(runs),
    full=tables.full(runs),
    fronts=_fronts(runs),
    compared=_compared(runs),
    dominated=_dominated(runs),
    facts=_facts(runs, command),
    sections=sections,
    classes=classes.section(runs)
    + images.section(runs)
    + segments.section(runs)
    + boxes.section(runs),
  )


def inline(svg: str, prefix: str, css_class: str, label: str) -> str:
  """Makes matplotlib's SVG part of a page: own ids, colours from the page's variables, no size."""
  body = svg[svg.index("<svg") :]
  head, rest = body.split(">", 1)
  box = re.search(r'viewBox="[^"]*"', head)
  head = (
    f'<svg class="{css_class}" role="img" aria-label="{html.escape(label)}" {box[0] if box else ""}'
  )
  rest = re.sub(r'\bid="', f'id="{prefix}-', rest)
  rest = re.sub(r"url\(#", f"url(#{prefix}-", rest)
  rest = re.sub(r'href="#', f'href="#{prefix}-', rest)
  for color, name in _VARIABLES.items():
    rest = rest.replace(color, f"var(--{name})")
  return f"{head}>{rest}"


def _data(runs: Sequence[ReportRun]) -> list[str]:
  """Returns the data set and split, where the runs agree about them."""
  sets = {tuple(run.facts[k] for k in ("dataset", "split") if k in run.facts) for run in runs}
  return list(sets.pop()) if len(sets) == 1 else []


def _marks(runs: Sequence[ReportRun]) -> str:
  if {is_trained(run, row) for run in runs for row in run.rows} == {None}:
    return ""
  return "● a size the run was trained at, ○ one it was not."


def _fronts(runs: Sequence[ReportRun]) -> str:
  """Returns the tables of each cost that is known of some point."""
  titles = {"gflops": "by compute", "ms": "by time"}
  by_cost = {cost: tables.front(runs, cost) for cost in pareto.COSTS}
  return "".join(
    f'<div class="scroll" tabindex="0" role="region" aria-label="Pareto front {titles[cost]}"><h3>{titles[cost]}</h3>'
    f"{table}</div>"
    for cost, table in by_cost.items()
    if table
  )


def _compared(runs: Sequence[ReportRun]) -> str:
  if all(len(pareto.groups(runs, cost)) <= 1 for cost in pareto.COSTS):
    return ""
  return " Only points of the same data set and split are compared, in time only those of the same device."


def _dominated(runs: Sequence[ReportRun]) -> str:
  if not any(any(pareto.dominated(runs, cost).values()) for cost in pareto.COSTS):
    return ""
  good = "accurate" if _is_accuracy(runs[0].metric) else "good"
  return (
    f" {tables.DOMINATED} dominated: another point is at least as {good} at no more of this cost."
  )


def _ceiling(runs: Sequence[ReportRun]) -> str:
  """What the ceiling is, where there is one."""
  names = dict.fromkeys(run.ceiling.long for run in runs if run.ceiling)
  return "".join(f" The ceiling is the {html.escape(name)}." for name in names)


def _is_accuracy(metric: Metric) -> bool:
  return tables.quantity(metric) == "accuracy"


def _intervals(runs: Sequence[ReportRun]) -> str:
  """How the intervals were made, where there are some."""
  if not tables.has_intervals(runs):
    return ""
  metric = runs[0].metric
  extreme = " (Wilson’s where all or none are right)" if metric.interval == "binomial" else ""
  return (
    " Intervals, here and as bands in the figures, are 95 % bootstrap intervals of"
    f" {html.escape(metric.short)} over the n images{extreme}."
  )


def _facts(runs: Sequence[ReportRun], command: str) -> str:
  pairs = [(run.name, _describe(run.facts)) for run in runs]
  lines = [f"<dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd>" for k, v in pairs if v]
  lines.append(f"<dt>made by</dt><dd><code>{html.escape(command)}</code></dd>")
  return "".join(lines)


def _describe(facts: Mapping[str, str]) -> str:
  parts = [" ".join(facts[k] for k in ("dataset", "split") if k in facts)]
  parts += [f"step {_thousands(facts['step'])}"] if "step" in facts else []
  parts += [f"{_thousands(facts['params'])} parameters"] if "params" in facts else []
  parts += [facts["device"]] if "device" in facts else []
  parts += [f"jax {facts['jax']}"] if "jax" in facts else []
  parts += [facts["command"]] if "command" in facts else []
  parts += [facts["time"]] if "time" in facts else []
  return " · ".join(part for part in parts if part)


def _thousands(number: str) -> str:
  return f"{int(number):,}" if number.isdecimal() else number
