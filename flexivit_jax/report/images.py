"""Sample images of runs of classification: some that a size gets wrong, with the class that each size gives them."""

import html
from collections.abc import Sequence

from flexivit_jax.report.rows import EvalRow, ReportRun, key_of
from flexivit_jax.report.segments import picture
from flexivit_jax.report.tables import grid, shorten, side


def section(runs: Sequence[ReportRun]) -> str:
  """Returns the part of the page about single images; "" if no run has samples."""
  return "".join(_of_run(run) for run in runs if run.images)


def _of_run(run: ReportRun) -> str:
  # A run of several depths is several curves with the samples of all.
  rows = [row for row in run.rows if key_of(row) in run.images]
  if not rows:
    return ""
  return f"<section><h2>Images that a size gets wrong: {html.escape(run.name)}</h2>{_table(run, rows)}</section>"


def _table(run: ReportRun, rows: Sequence[EvalRow]) -> str:
  columns = [run.images[key_of(row)] for row in rows]
  pictures = [picture(one.file, f"image {one.file.stem}") for one in columns[0]]
  if not any(pictures):
    folder = html.escape(columns[0][0].file.parent.name)
    return f'<p class="note">Its sample images are not beside its eval.json, in {folder}/.</p>'
  head = "".join(
    f'<th scope="col">{side(row.patch)}<small>{grid(row.seqhw)}</small></th>' for row in rows
  )
  lines = []
  for samples, shown in zip(zip(*columns, strict=True), pictures, strict=True):
    label = samples[0].label
    true = "no class" if label is None else _name(run, label)
    cells = "".join(
      f'<td class="{"right" if one.right else "wrong"}"><b>{"✓" if one.right else "✗"}</b>'
      f'<span class="hidden">{"right: " if one.right else "wrong: "}</span>{_name(run, one.predicted)}</td>'
      for one in samples
    )
    lines.append(f'<tr><th scope="row">{true}</th><td>{shown or "–"}</td>{cells}</tr>')
  missing = pictures.count("")
  some = f" Missing pictures: {missing}." if missing else ""
  return (
    '<div class="scroll" tabindex="0" role="region" aria-label="Images that a size gets wrong">'
    f'<table class="looked"><thead><tr><th scope="col">class</th><th scope="col">image</th>{head}</tr></thead>'
    f"<tbody>{''.join(lines)}</tbody></table></div>"
    '<p class="note">Drawn from all of the data: images that some sizes get right and others wrong before those that'
    f" all get wrong. The table is sorted by class.{some}</p>"
  )


def _name(run: ReportRun, k: int) -> str:
  name = run.classes[k] if k < len(run.classes) else f"class {k}"
  return f'<span title="{html.escape(name)}">{html.escape(shorten(name, 24))}</span>'
