"""A metric against patch size and against compute, drawn by matplotlib without its global state."""

import io
import math
import textwrap
from collections.abc import Sequence, Set
from typing import Any, NamedTuple

from flexivit_jax.report import pareto
from flexivit_jax.report.rows import EvalRow, ReportRun, is_trained, order, sides
from flexivit_jax.report.tables import shorten, side, unit

Axes = Any  # of matplotlib, which is imported late
Figure = Any  # likewise
AXES = ("patch", "gflops")
WIDE = (5.2, 3.4)  # inches: one column of a page, half of a screen
NARROW = (3.6, 3.3)  # inches: a phone of 390 px shows it at its natural text size
INK, FAINT, GRID, PAPER = "#1b1f24", "#5d6670", "#e3e6ea", "#ffffff"
# Okabe & Ito's colour-blind-safe hues, the light ones darkened until text in them reads on white.
COLORS = ("#0072b2", "#d55e00", "#00805d", "#a23b8f", "#8a6d00", "#55565e")
_MARKERS = "os^Dvp"  # a second sign beside the hue, for grey prints
_LARGE, _SMALL = 6.0, 3.2  # points: of a point, and of one that others dominate
_LABELS = {"patch": "patch size (pixels)", "gflops": "compute of one image (GFLOPs, log scale)"}
_POINT = 72  # points an inch
_LINE = 11  # points between lines of tick labels


class Drawing(NamedTuple):
  """One figure: `svg` with text as outlines, `page_svg` with text as text, `png` at 200 dpi."""

  svg: str
  page_svg: str
  png: bytes


class _Frame(NamedTuple):
  """Margins and axes size in points."""

  left: float
  bottom: float
  width: float
  height: float
  labels: tuple[str, ...]  # the runs' names, wrapped


class _Scale(NamedTuple):
  """The vertical axis: its title, its ends, and the text of each tick."""

  title: str
  low: float
  high: float
  ticks: dict[float, str]


def draw(runs: Sequence[ReportRun], axis: str, size: tuple[float, float]) -> Drawing:
  """Draws the metric of each run against "patch" (pixels) or "gflops"; `size` is in inches."""
  import matplotlib
  from matplotlib.figure import Figure

  with matplotlib.rc_context(style()):
    figure = Figure(figsize=size)
    scale = _scale(runs, size)
    frame = _frame(runs, size, scale)
    ax = figure.add_axes(_rect(frame, size))
    places = [_places(runs, run, axis) for run in runs]
    _set_y(ax, scale, frame)
    if lines := _set_x(ax, runs, axis, places, frame):
      frame = frame._replace(
        bottom=frame.bottom + _LINE * lines, height=frame.height - _LINE * lines
      )
      ax.set_position(_rect(frame, size))
    beaten = pareto.dominated(runs, axis) if axis in pareto.COSTS else {}
    _ceilings(ax, runs, places)
    for i, (run, place) in enumerate(zip(runs, places, strict=True)):
      _curve(ax, i, run, place, {row for _, row in place if beaten.get(pareto.Point(i, row))})
      if axis == "gflops":
        _cascades(ax, i, run, {row for row in run.cascades if beaten.get(pareto.Point(i, row))})
    _name_curves(ax, places, frame)
    _explain_markers(ax, runs, any(beaten.values()))
    return _save(figure)


def style() -> dict[str, Any]:
  """Returns matplotlib's settings of every figure: the same file on every machine."""
  return {
    "backend": "agg",
    "font.family": "DejaVu Sans",  # ships with matplotlib: the same figure on every machine
    "font.size": 8.5,
    "svg.hashsalt": "flexivit",  # the same ids, hence the same file, every time
    "text.color": INK,
    "axes.labelcolor": FAINT,
    "axes.edgecolor": FAINT,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
  }


def _frame(runs: Sequence[ReportRun], size: tuple[float, float], scale: _Scale) -> _Frame:
  w, h = (_POINT * side for side in size)
  labels = tuple(wrap(run.name, 18 if w > 300 else 13) for run in runs)
  longest = max(len(line) for label in labels for line in label.split("\n"))
  left = max(33.0, 14 + 5.0 * max(map(len, scale.ticks.values())))
  # A longer title does not fit beside the signs, and stands in a line of its own.
  top = 29.0 if len(scale.title) <= 18 else 41.0
  bottom, right = 34.0, 14 + 5.4 * longest
  return _Frame(left, bottom, w - left - right, h - top - bottom, labels)


def _rect(frame: _Frame, size: tuple[float, float]) -> tuple[float, float, float, float]:
  w, h = (_POINT * side for side in size)
  return frame.left / w, frame.bottom / h, frame.width / w, frame.height / h


def _save(figure: Figure) -> Drawing:
  import matplotlib

  nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
  svgs = {}
  for text_as in ("path", "none"):
    with matplotlib.rc_context({"svg.fonttype": text_as}), io.StringIO() as file:
      figure.savefig(file, format="svg", metadata=nothing)
      svgs[text_as] = file.getvalue()
  png = io.BytesIO()
  figure.savefig(png, format="png", dpi=200, metadata={"Software": None})
  return Drawing(svg=svgs["path"], page_svg=svgs["none"], png=png.getvalue())


def _ranks(runs: Sequence[ReportRun]) -> dict[object, int] | None:
  """Returns the patches' places on an even axis; None where all are squares: a log axis."""
  patches = {row.patch for run in runs for row in run.rows}
  if all(len(set(sides(patch))) == 1 for patch in patches):
    return None
  return {patch: i for i, patch in enumerate(sorted(patches, key=order))}


def _places(runs: Sequence[ReportRun], run: ReportRun, axis: str) -> list[tuple[float, EvalRow]]:
  """Returns the rows of a run with their x, from left to right."""
  if axis == "gflops":
    return sorted(((row.gflops, row) for row in run.rows), key=lambda place: place[0])
  ranks = _ranks(runs)
  return [(float(ranks[r.patch] if ranks else sides(r.patch)[0]), r) for r in run.rows]


def _scale(runs: Sequence[ReportRun], size: tuple[float, float]) -> _Scale:
  metric, rows = runs[0].metric, [row for run in runs for row in run.points]
  about = unit(metric) + (", lower is better" if metric.better == "min" else "")
  room = int((_POINT * size[0] - 15) / 4.6)  # characters
  title = (
    metric.long if len(metric.long + about) <= room else shorten(metric.short, room - len(about))
  )
  title += about
  if metric.unit == "%":
    above = [v for run in runs for row in run.rows if (v := _above(run, row)) is not None]
    return _Scale(title, *_of_fractions([*(row.value for row in rows), *above]))
  return _Scale(title, *of_numbers([v for row in rows for v in (row.value, *(row.interval or ()))]))


def _of_fractions(values: Sequence[float]) -> tuple[float, float, dict[float, str]]:
  """Returns the ends and the ticks of an axis in percent."""
  low = 0.0 if min(values) < 0.6 else math.floor(20 * min(values) - 0.2) / 20
  high = 1.0 if low == 0 and max(values) > 0.6 else math.ceil(20 * max(values) + 0.5) / 20
  high = min(1.0, high)
  step = next(s for s in (0.01, 0.02, 0.05, 0.1, 0.2) if (high - low) / s <= 6)
  ticks = [i * step for i in range(math.ceil(low / step - 1e-9), int(high / step + 1e-9) + 1)]
  return low, high, {tick: f"{100 * tick:.0f}" for tick in ticks}


def of_numbers(values: Sequence[float]) -> tuple[float, float, dict[float, str]]:
  """Returns the ends and the ticks of an axis of any numbers: 3 to 8 round ones, with 0 where that is near."""
  low, high = min(values), max(values)
  if 0 <= low < 0.5 * high:
    low = 0.0
  if 0.5 * low < high <= 0:
    high = 0.0
  width = (high - low) or abs(high) or 1.0
  power = 10.0 ** math.floor(math.log10(width / 5))
  step = next(m * power for m in (1, 2, 5, 10) if m * power >= width / 5)
  first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
  if first == last:
    first, last = first - (low != 0), last + 1
  places = max(0, -math.floor(math.log10(step) + 1e-9))
  scientific = max(abs(first), abs(last)) * step >= 1e5 or step < 1e-4
  write = (lambda v: f"{v:.3g}") if scientific else (lambda v: f"{v:.{places}f}")
  return first * step, last * step, {i * step: write(i * step) for i in range(first, last + 1)}


def _set_y(ax: Axes, scale: _Scale, frame: _Frame) -> None:
  ax.set_ylim(scale.low, scale.high)
  ax.set_yticks([*scale.ticks], [*scale.ticks.values()])
  ax.grid(axis="y", color=GRID, linewidth=0.7)
  ax.set_axisbelow(True)
  ax.tick_params(length=0, pad=5)
  for name in ("top", "left", "right"):
    ax.spines[name].set_visible(False)
  at = {"xycoords": "axes fraction", "textcoords": "offset points", "ha": "left"}
  x = 11 - frame.left
  ax.annotate(scale.title, (0, 1), xytext=(x, 18), color=FAINT, parse_math=False, **at)


def _set_x(
  ax: Axes,
  runs: Sequence[ReportRun],
  axis: str,
  places: Sequence[Sequence[tuple[float, EvalRow]]],
  frame: _Frame,
) -> int:
  """Sets the horizontal axis; returns how many extra lines its tick labels took."""
  from matplotlib.ticker import NullFormatter, NullLocator

  values = {x: side(row.patch) for place in places for x, row in place}
  if axis == "gflops":
    values |= {row.gflops: "" for run in runs for row in run.cascades}
  even = axis == "patch" and _ranks(runs) is not None
  low, high = min(values), max(values)
  if even:
    ax.set_xlim(low - 0.3, high + 0.3)
  else:
    pad = (high / low) ** 0.06 if high > low else 1.5
    ax.set_xscale("log")
    ax.set_xlim(low / pad, high * pad)
  ticks = values if axis == "patch" else _log_ticks(low, high)
  ax.xaxis.set_minor_locator(NullLocator())
  ax.set_xticks(sorted(ticks))
  ax.xaxis.set_major_formatter(NullFormatter())
  ax.tick_params(axis="x", length=3, color=FAINT)
  deepest = _write_ticks(ax, ticks, frame)
  at = {"xycoords": "axes fraction", "textcoords": "offset points", "ha": "center", "va": "top"}
  ax.annotate(_LABELS[axis], (0.5, 0), xytext=(0, -20 - _LINE * deepest), color=FAINT, **at)
  return deepest


def _log_ticks(low: float, high: float) -> dict[float, str]:
  """Returns 1, 2, 5 x 10^k inside the range, or the ends themselves where fewer than two are."""
  decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
  ticks = [m * 10.0**k for k in decades for m in (1, 2, 5)]
  inside = [tick for tick in ticks if low / 1.1 <= tick <= high * 1.1]
  return {tick: f"{tick:.3g}" for tick in (inside if len(inside) > 1 else {low, high})}


def _write_ticks(ax: Axes, ticks: dict[float, str], frame: _Frame) -> int:
  """Writes tick labels, in a second line where they would touch; returns the last line used.

  Neighbours such as 15 and 16 are 9 points apart on a phone. A label that fits neither line is left
  out; its tick stays.
  """
  ends = [-math.inf, -math.inf]
  deepest = 0
  for x, label in sorted(ticks.items()):
    at = frame.width * ax.transAxes.inverted().transform(ax.transData.transform((x, 0)))[0]
    half = 2.8 * len(label)
    line = next((i for i, end in enumerate(ends) if at - half > end + 3), None)
    if line is None:
      continue
    ends[line], deepest = at + half, max(deepest, line)
    ax.annotate(
      label,
      (x, 0),
      xycoords=ax.get_xaxis_transform(),
      xytext=(0, -6 - _LINE * line),
      textcoords="offset points",
      ha="center",
      va="top",
      color=INK,
      parse_math=False,
    )
  return deepest


def _above(run: ReportRun, row: EvalRow) -> float | None:
  """The ceiling of a row, if there is one."""
  return row.of(run.ceiling.name) if run.ceiling else None


def _ceilings(
  ax: Axes, runs: Sequence[ReportRun], places: Sequence[Sequence[tuple[float, EvalRow]]]
) -> None:
  """Draws what the metric can hardly exceed: once for runs of which it is the same."""
  lines = {
    tuple((x, v) for x, row in place if (v := _above(run, row)) is not None)
    for run, place in zip(runs, places, strict=True)
  }
  for line in sorted(line for line in lines if line):
    x, y = zip(*line, strict=True)
    ax.plot(x, y, "--", color=FAINT, linewidth=1.0, marker="_", markersize=5, zorder=2)
    top = max(range(len(y)), key=lambda i: y[i])
    side_of = "left" if 2 * top < len(y) else "right"
    at = {"xytext": (0, 4), "textcoords": "offset points", "ha": side_of, "va": "bottom"}
    ax.annotate("ceiling", (x[top], y[top]), color=FAINT, fontsize=7.5, **at)


def _curve(
  ax: Axes, i: int, run: ReportRun, place: Sequence[tuple[float, EvalRow]], beaten: Set[EvalRow]
) -> None:
  """Draws a run with its intervals; points in `beaten`, which others dominate, are small."""
  color = COLORS[i % len(COLORS)]
  x = [x for x, _ in place]
  y = [row.value for _, row in place]
  bounds = [row.interval or (math.nan, math.nan) for _, row in place]  # no band where there is none
  low, high = zip(*bounds, strict=True)
  top = 10 + 2 * (9 - i % 9)  # the first run is the one to see
  ax.fill_between(x, low, high, color=color, alpha=0.13, linewidth=0, zorder=top - 8)
  style = "-" if i < len(COLORS) else "--"
  ax.plot(x, y, style, color=color, linewidth=1.8, zorder=top, clip_on=False)
  for at, row in place:
    face = PAPER if is_trained(run, row) is False else color
    marker = _MARKERS[i % len(_MARKERS)]
    ax.plot(
      [at],
      [row.value],
      marker,
      markersize=_SMALL if row in beaten else _LARGE,
      markerfacecolor=face,
      markeredgecolor=color,
      markeredgewidth=1.1 if row in beaten else 1.6,
      zorder=top + 1,
      clip_on=False,
    )


def _cascades(ax: Axes, i: int, run: ReportRun, beaten: Set[EvalRow]) -> None:
  """Draws a run's cascades as a series of its own beside its sizes, in the run's colour: dashed, with crosses."""
  if not run.cascades:
    return
  color, top = COLORS[i % len(COLORS)], 10 + 2 * (9 - i % 9)
  x, y = [row.gflops for row in run.cascades], [row.value for row in run.cascades]
  ax.plot(x, y, ":", color=color, linewidth=1.4, zorder=top, clip_on=False)
  for row in run.cascades:
    ax.plot(
      [row.gflops],
      [row.value],
      "X",
      markersize=_SMALL if row in beaten else _LARGE,
      color=color,
      markeredgecolor=PAPER,
      markeredgewidth=0.6,
      zorder=top + 2,
      clip_on=False,
    )
  at = {"xytext": (-3, 4), "textcoords": "offset points", "ha": "right", "va": "bottom"}
  ax.annotate("cascades", (x[0], y[0]), color=color, fontsize=7.5, zorder=top + 2, **at)


def _name_curves(
  ax: Axes,
  places: Sequence[Sequence[tuple[float, EvalRow]]],
  frame: _Frame,
) -> None:
  """Writes each run's name right of the axes, level with its curve's end, apart from the others."""
  size = 8.0 if len(places) <= 6 else 6.5
  heights = [(1.25 * size * len(text.split("\n")) + 2) / frame.height for text in frame.labels]
  ends = [
    ax.transAxes.inverted().transform(ax.transData.transform((place[-1][0], place[-1][1].value)))
    for place in places
  ]
  levels = spread([float(end[1]) for end in ends], heights)
  for i, (text, end, level) in enumerate(zip(frame.labels, ends, levels, strict=True)):
    color = COLORS[i % len(COLORS)]
    x = 1 + 8 / frame.width
    line = {"color": color, "linewidth": 0.8, "clip_on": False, "transform": ax.transAxes}
    ax.plot([end[0], x - 1 / frame.width], [end[1], level], ":", **line)
    at = {"transform": ax.transAxes, "va": "center", "parse_math": False, "linespacing": 1.2}
    ax.text(x + 1 / frame.width, level, text, color=color, size=size, weight="bold", **at)


def wrap(name: str, chars: int) -> str:
  """Breaks a name into at most two lines of about equal length, or three; none is longer than `chars`."""
  name = shorten(name, 2 * chars)
  if len(name) <= chars:
    return name
  for count in (2, 3):
    for width in range(len(name) // count, chars + 1):
      lines = textwrap.wrap(name, width, break_long_words=False)
      if len(lines) <= count and max(map(len, lines)) <= chars:
        return "\n".join(lines)
  return f"{name[:chars]}\n{name[chars:]}"


def spread(levels: Sequence[float], heights: Sequence[float]) -> list[float]:
  """Moves labels of the given heights apart, as little as one pass up and one down can.

  Args:
    levels: where each label's middle wants to be, in [0, 1].
    heights: of the labels in the same unit; where they sum to over 1, the lowest reach below 0.

  Returns:
    The middles, none above 1 - height / 2, in the order of the arguments.
  """
  order = sorted(range(len(levels)), key=lambda i: levels[i])
  placed = dict.fromkeys(order, 0.0)
  floor = -math.inf
  for i in order:
    placed[i] = max(levels[i], floor + heights[i] / 2)
    floor = placed[i] + heights[i] / 2
  ceiling = 1 + max(heights) / 2  # the middle of the top label may sit on the axes' upper edge
  for i in reversed(order):
    placed[i] = min(placed[i], ceiling - heights[i] / 2)
    ceiling = placed[i] - heights[i] / 2
  return [placed[i] for i in range(len(levels))]


def _explain_markers(ax: Axes, runs: Sequence[ReportRun], dominated: bool) -> None:
  """Says what filled and hollow mean, where both are seen, and what small does, where some points are dominated."""
  from matplotlib.lines import Line2D

  shown = []
  if {is_trained(run, row) for run in runs for row in run.rows} >= {True, False}:
    trained = "trained" if dominated else "trained size"  # three signs leave a phone no more room
    shown += [(FAINT, _LARGE, trained), (PAPER, _LARGE, "not trained")]
  if dominated:
    shown += [(FAINT, _SMALL, "dominated")]
  if not shown:
    return
  handles = [
    Line2D(
      [],
      [],
      marker="o",
      linestyle="",
      color=FAINT,
      markerfacecolor=face,
      markersize=size,
      label=label,
    )
    for face, size, label in shown
  ]
  ax.legend(
    handles=handles,
    loc="upper right",
    bbox_to_anchor=(1.0, 1.0),
    bbox_transform=ax.figure.transFigure,
    ncols=len(shown),
    frameon=False,
    fontsize=7.5,
    labelcolor=FAINT,
    handletextpad=0,
    columnspacing=0.4,
    borderaxespad=0.3,
    markerscale=0.75,
  )
