"""Accuracy of each class, and which classes are confused, for runs whose evaluation has `per_class=True`."""

import html
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from flexivit_jax.evaluators.metrics import TOP1
from flexivit_jax.report.rows import EvalRow, ReportRun, key_of
from flexivit_jax.report.tables import grid, shorten, side, span

MOST_CELLS = 30  # classes of a confusion matrix that is drawn; with more classes, pairs are listed
MOST_LINES = 60  # classes of a table
MOST_PAIRS = 20


def section(runs: Sequence[ReportRun]) -> str:
  """Returns the part of the page about classes; "" if no run has counted them."""
  return "".join(_of_run(run) for run in runs if run.confusions)


def _of_run(run: ReportRun) -> str:
  rows = [row for row in run.rows if key_of(row) in run.confusions]
  if not rows:
    return ""
  best = max(rows, key=lambda row: _accuracy(run, row))
  counts = run.confusions[key_of(best)]
  mixed = _heat(run.classes, counts) if len(counts) <= MOST_CELLS else _pairs(run.classes, counts)
  title = "Which class is taken for which" if len(counts) <= MOST_CELLS else "Most confused pairs"
  return (
    f"<section><h2>Classes: {html.escape(run.name)}</h2>"
    f'<div class="scroll" tabindex="0" role="region" aria-label="Accuracy of each class">'
    f"{_accuracies(run, rows)}</div>{_note(run, rows)}"
    f"<h3>{title}, at patch size {side(best.patch)} ({span(TOP1, _accuracy(run, best))})</h3>"
    f'<div class="scroll" tabindex="0" role="region" aria-label="{title}">{mixed}</div></section>'
  )


def _accuracy(run: ReportRun, row: EvalRow) -> float:
  return float(run.confusions[key_of(row)].trace()) / row.n


def accuracies(counts: Int[np.ndarray, "k k"]) -> Float[np.ndarray, "k"]:
  """Returns the accuracy of each class; NaN for a class without examples."""
  n = counts.sum(axis=1)
  return np.where(n > 0, counts.diagonal() / np.maximum(n, 1), np.nan)


def worst_first(tables: Sequence[Int[np.ndarray, "k k"]]) -> list[int]:
  """Returns the classes with examples, sorted by mean accuracy over the tables, the lowest first."""
  mean = np.mean([accuracies(counts) for counts in tables], axis=0)
  return [int(k) for k in np.argsort(mean, kind="stable") if not np.isnan(mean[k])]


def confused(counts: Int[np.ndarray, "k k"]) -> list[tuple[int, int, int]]:
  """Returns (class, predicted class, count) of all errors, the most frequent first."""
  wrong = counts - np.diag(counts.diagonal())
  pairs = [(int(i), int(j), int(wrong[i, j])) for i, j in np.argwhere(wrong)]
  return sorted(pairs, key=lambda pair: -pair[2])


def _accuracies(run: ReportRun, rows: Sequence[EvalRow]) -> str:
  tables = [run.confusions[key_of(row)] for row in rows]
  n = tables[0].sum(axis=1)
  shares = [accuracies(counts) for counts in tables]
  head = "".join(
    f'<th scope="col">{side(row.patch)}<small>{grid(row.seqhw)}</small></th>' for row in rows
  )
  lines = []
  for k in worst_first(tables)[:MOST_LINES]:
    cells = "".join(
      f'<td style="--tint:{100 * values[k]:.0f}%">{100 * values[k]:.1f}</td>' for values in shares
    )
    lines.append(f'<tr><th scope="row">{_name(run.classes[k])}</th>{cells}<td>{n[k]:,}</td></tr>')
  return (
    f'<table class="classes"><thead><tr><th scope="col">patch <small>grid</small></th>{head}'
    f'<th scope="col">n<small>images</small></th></tr></thead><tbody>{"".join(lines)}</tbody></table>'
  )


def _note(run: ReportRun, rows: Sequence[EvalRow]) -> str:
  tables = [run.confusions[key_of(row)] for row in rows]
  counted = len(worst_first(tables))
  more = (
    f" The {MOST_LINES} worst of {counted}; all are in eval.json." if counted > MOST_LINES else ""
  )
  empty = len(run.classes) - counted
  none = f" {empty} classes have no image here." if empty else ""
  return (
    f'<p class="note">Top-1 (%) of the images of each class, the worst class first.{more}{none}</p>'
  )


def _heat(names: Sequence[str], counts: Int[np.ndarray, "k k"]) -> str:
  """A cell's tint is its share of the images of the class, its row."""
  n = np.maximum(counts.sum(axis=1, keepdims=True), 1)
  shares = 100 * counts / n
  head = "".join(f'<th scope="col">{_name(name)}</th>' for name in names)
  lines = []
  for i, name in enumerate(names):
    cells = "".join(_cell(int(counts[i, j]), shares[i, j], i == j) for j in range(len(names)))
    lines.append(f'<tr><th scope="row">{_name(name)}</th>{cells}</tr>')
  return (
    f'<table class="heat"><thead><tr><th scope="col">class <small>predicted →</small></th>{head}</tr></thead>'
    f"<tbody>{''.join(lines)}</tbody></table>"
  )


def _cell(count: int, share: float, right: bool) -> str:
  kind = ' class="zero"' if not count else "" if right else ' class="wrong"'
  return f'<td{kind} style="--tint:{share:.0f}%">{count}</td>'


def _pairs(names: Sequence[str], counts: Int[np.ndarray, "k k"]) -> str:
  n = counts.sum(axis=1)
  lines = [
    f'<tr><th scope="row">{_name(names[i])}</th><td>{_name(names[j])}</td><td>{count:,}</td>'
    f"<td>{100 * count / n[i]:.1f}</td></tr>"
    for i, j, count in confused(counts)[:MOST_PAIRS]
  ]
  heads = (("class", ""), ("predicted", ""), ("times", ""), ("of the class", "%"))
  head = "".join(f'<th scope="col">{name}<small>{unit}</small></th>' for name, unit in heads)
  return (
    f'<table class="pairs"><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table>'
  )


def _name(name: str) -> str:
  return f'<span title="{html.escape(name)}">{html.escape(shorten(name, 28))}</span>'
