"""Classes and sample masks of runs whose evaluation is of segmentation."""

import base64
import html
from collections.abc import Sequence
from pathlib import Path

from flexivit_jax.data.class_colours import hex_colour
from flexivit_jax.report.rows import EvalRow, ReportRun, key_of
from flexivit_jax.report.tables import grid, shorten, side

MOST_LINES = 60  # classes of a table
_KINDS = {".jpg": "image/jpeg", ".png": "image/png"}


def section(runs: Sequence[ReportRun]) -> str:
  """Returns the part of the page about classes and masks; "" if no run has them."""
  return "".join(_of_run(run) for run in runs if run.ious)


def _of_run(run: ReportRun) -> str:
  # A run of several depths is several curves with the tables of all.
  rows = [row for row in run.rows if key_of(row) in run.ious]
  if not rows:
    return ""
  return (
    f"<section><h2>IoU of each class: {html.escape(run.name)}</h2>"
    '<div class="scroll" tabindex="0" role="region" aria-label="IoU of each class">'
    f"{_table(run, rows)}</div>{_note(run)}{_masks(run, rows)}</section>"
  )


def _ordered(run: ReportRun) -> list[int]:
  """The classes that the masks have, that with the most pixels first."""
  return sorted((k for k, n in enumerate(run.pixels) if n), key=lambda k: -run.pixels[k])


def _table(run: ReportRun, rows: Sequence[EvalRow]) -> str:
  head = "".join(
    f'<th scope="col">{side(row.patch)}<small>{grid(row.seqhw)}</small></th>' for row in rows
  )
  total, lines = sum(run.pixels), []
  for k in _ordered(run)[:MOST_LINES]:
    values = [run.ious[key_of(row)][k] or 0.0 for row in rows]
    cells = "".join(f'<td style="--tint:{100 * v:.0f}%">{100 * v:.1f}</td>' for v in values)
    share = f"{100 * run.pixels[k] / total:.2g}"
    lines.append(f'<tr><th scope="row">{named(run, k)}</th>{cells}<td>{share}</td></tr>')
  return (
    f'<table class="classes"><thead><tr><th scope="col">patch <small>grid</small></th>{head}'
    f'<th scope="col">pixels<small>%</small></th></tr></thead><tbody>{"".join(lines)}</tbody></table>'
  )


def named(run: ReportRun, k: int) -> str:
  """Returns the name of a class beside its colour."""
  name = run.classes[k]
  key = f'<span class="square" style="--c:{hex_colour(k)}"></span>'
  text = f'<span title="{html.escape(name)}">{html.escape(shorten(name, 24))}</span>'
  return f'<span class="named">{key}{text}</span>'


def _note(run: ReportRun) -> str:
  there = len(_ordered(run))
  more = f" The {MOST_LINES} largest of {there} classes; all are in eval.json." * (
    there > MOST_LINES
  )
  absent = [html.escape(run.classes[k]) for k, n in enumerate(run.pixels) if not n]
  none = f" No pixel here, and in no mean over classes: {', '.join(absent)}." if absent else ""
  return (
    '<p class="note">Intersection over union (%) of each class in one table of all images, the class with the most'
    f" pixels first.{more}{none}</p>"
  )


def _masks(run: ReportRun, rows: Sequence[EvalRow]) -> str:
  """The sample images, their masks and what is predicted at each size, a line for each image."""
  columns = [run.samples[key_of(row)] for row in rows]
  number = min(map(len, columns))
  if not number:
    return ""
  heads = ["image", "mask", *(f"patch {side(row.patch)}" for row in rows)]
  lines, missing = [], 0
  for i in range(number):
    files = [column[i] for column in columns]
    stem = files[0].name.partition("_")[0]
    first = [files[0].with_name(f"{stem}_image.jpg"), files[0].with_name(f"{stem}_true.png")]
    pictures = [picture(file, head) for file, head in zip(first + files, heads, strict=True)]
    missing += pictures.count("")
    lines += [picture or "<span>–</span>" for picture in pictures]
  if missing == len(lines):
    return f'<p class="note">Its sample masks are not beside its eval.json, in {files[0].parent.name}/.</p>'
  some = f" {missing} pictures are missing." if missing else ""
  top = "".join(f"<b>{head}</b>" for head in heads)
  return (
    "<h3>Sample masks</h3>"
    '<div class="scroll" tabindex="0" role="region" aria-label="Sample masks">'
    f'<div class="masks" style="--n:{len(heads)}">{top}{"".join(lines)}</div></div>'
    f'<p class="note">The first images of the data; black is no class.{some}</p>'
  )


def picture(file: Path, what: str) -> str:
  """Returns the picture in the page itself; "" where there is no such file."""
  if not file.is_file():
    return ""
  data = base64.b64encode(file.read_bytes()).decode()
  return f'<img alt="{what}" src="data:{_KINDS[file.suffix]};base64,{data}">'
