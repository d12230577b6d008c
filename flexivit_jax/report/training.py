"""The training loss at each patch size, from a run's metrics.jsonl: do all sizes learn?"""

import colorsys
import csv
import html
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from flexivit_jax.report import plots
from flexivit_jax.report.page import inline
from flexivit_jax.report.rows import ReportRun
from flexivit_jax.report.tables import shorten

POINTS = 24  # of a curve: each is a mean over so long a piece of the run
RUNS, SIZES = 6, 12  # curves that a page draws; the CSV has all
_SIZE_KEYS = (
  "seqhw",
  "grid_hw",
  "patch_hw",
  "stride_hw",
  "depth",
)  # drawn in a step; `train.py` writes them
_TO = (5.2, 3.0)  # inches


class Curve(NamedTuple):
  """The loss of one size: the middle of each piece of the run, the mean over its steps, and how many these are."""

  size: str
  step: Float[np.ndarray, " p"]
  loss: Float[np.ndarray, " p"]
  steps: tuple[int, ...]


class Training(NamedTuple):
  """The curves of a run, from few tokens to many; `left_out` rows had no finite loss, or could not be read."""

  run: str
  curves: tuple[Curve, ...]
  left_out: int


def read(runs: Sequence[ReportRun]) -> list[Training]:
  """Returns the curves of the runs that have rows of steps beside their eval.json."""
  found, seen = [], set()
  for run in runs:
    file = None if run.file is None else run.file.parent / "metrics.jsonl"
    if (
      file is None or file in seen or not file.is_file()
    ):  # a run of several depths was trained once
      continue
    seen.add(file)
    losses, left_out = _losses(file)
    if losses:
      found.append(Training(run.name, _curves(losses), left_out))
  return found


def _losses(file: Path) -> tuple[dict[str, list[tuple[int, float]]], int]:
  """Returns size -> (step, loss) of each step, and the number of rows without either."""
  losses: dict[str, list[tuple[int, float]]] = {}
  left_out = 0
  with file.open(encoding="utf-8", errors="replace") as rows:
    for line in rows:
      try:
        row = json.loads(line)
        step, loss = row["step"], row["loss"]
        if not isinstance(step, int) or not math.isfinite(loss):
          raise ValueError(line)
        size = ", ".join(f"{key}={row[key]}" for key in _SIZE_KEYS if key in row)
      except KeyError:  # a row of an evaluation alone has no loss
        continue
      except (ValueError, TypeError):
        left_out += 1
        continue
      losses.setdefault(size or "all steps", []).append((step, float(loss)))
  return losses, left_out


def _curves(losses: Mapping[str, list[tuple[int, float]]]) -> tuple[Curve, ...]:
  every = [step for rows in losses.values() for step, _ in rows]
  edges = np.linspace(min(every), max(every) + 1, POINTS + 1)
  curves = []
  for size, rows in losses.items():
    step, loss = np.array(rows, float).T
    piece = np.clip(np.searchsorted(edges, step, "right") - 1, 0, POINTS - 1)
    count = np.bincount(piece, minlength=POINTS)
    kept = count > 0
    middle = np.bincount(piece, step, POINTS)[kept] / count[kept]
    mean = np.bincount(piece, loss, POINTS)[kept] / count[kept]
    curves.append(Curve(size, middle, mean, tuple(count[kept].tolist())))
  return tuple(sorted(curves, key=lambda curve: _order(curve.size)))


def _order(size: str) -> tuple[float, ...]:
  """Few tokens first; of other sizes the numbers in their order."""
  numbers = [
    float(n)
    for n in size.replace("x", " ").replace("=", " ").replace(",", " ").split()
    if n.isdecimal()
  ]
  return (math.prod(numbers), *numbers) if "grid_hw" in size else tuple(numbers)


def csv_of(trainings: Sequence[Training]) -> str:
  """Returns the points of all curves: run, size, step, loss, and the steps that a point is the mean of."""
  out = io.StringIO()
  table = csv.writer(out, lineterminator="\n")
  table.writerow(["run", "size", "step", "loss", "steps"])
  for training in trainings:
    for curve in training.curves:
      for step, loss, steps in zip(curve.step, curve.loss, curve.steps, strict=True):
        table.writerow([training.run, curve.size, f"{step:.6g}", f"{loss:.6g}", steps])
  return out.getvalue()


def section(trainings: Sequence[Training]) -> str:
  """Returns a figure for each run; "" where none has rows of steps."""
  if not trainings:
    return ""
  figures = "".join(_figure(i, training) for i, training in enumerate(trainings[:RUNS]))
  more = f" The page shows {RUNS} of {len(trainings)} runs." if len(trainings) > RUNS else ""
  left_out = sum(training.left_out for training in trainings)
  lost = f" {left_out} rows without a finite loss are left out." if left_out else ""
  return (
    f"<section><h2>Training loss by patch size</h2>{figures}"
    f'<p class="note">Each point is the mean over the steps of one size in one {POINTS}th of the run, as in'
    f" training.csv. Blue to orange is few tokens to many.{more}{lost}</p></section>"
  )


def _figure(i: int, training: Training) -> str:
  shown = training.curves[:: math.ceil(len(training.curves) / SIZES)]
  label = f"Training loss of {training.run} by patch size"
  svg = inline(_draw(shown), f"training{i}", "curves", label)
  return f"<h3>{html.escape(shorten(training.run, 60))}</h3>{svg}"


def _draw(curves: Sequence[Curve]) -> str:
  import matplotlib
  from matplotlib.figure import Figure

  with matplotlib.rc_context(plots.style()), io.StringIO() as file:
    figure = Figure(figsize=_TO)
    ax = figure.add_axes((0.13, 0.15, 0.65, 0.8))
    for i, curve in enumerate(curves):
      # From blue over magenta to orange: all can be seen on white and in dark mode.
      hue = (0.58 + 0.47 * i / max(1, len(curves) - 1)) % 1
      color = colorsys.hls_to_rgb(hue, 0.5, 0.7)
      ax.plot(
        curve.step, curve.loss, "-o", color=color, linewidth=1.2, markersize=2, label=curve.size
      )
    ax.set_xlabel("step")
    ax.set_ylabel("loss")
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=7.5)
    with matplotlib.rc_context({"svg.fonttype": "none"}):
      figure.savefig(
        file, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
      )
    return file.getvalue()
