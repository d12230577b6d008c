"""Average precisions of classes, of sizes of objects and of groups, and sample pictures, of runs of detection."""

import html
from collections.abc import Sequence

from flexivit_jax.report.rows import EvalRow, ReportRun, key_of
from flexivit_jax.report.segments import named, picture
from flexivit_jax.report.tables import grid, side

MOST_LINES = 60  # classes of a table
_PIXELS = {
  "small": "small, below 32² pixels",
  "medium": "medium, below 96²",
  "large": "large",
}
_TOKENS = {
  "below_1": "less than a token",
  "1_to_4": "1 to 4 tokens",
  "4_to_16": "4 to 16 tokens",
  "above_16": "more than 16 tokens",
}


def section(runs: Sequence[ReportRun]) -> str:
  """Returns the part of the page about boxes; "" if no run has them."""
  return "".join(_of_run(run) for run in runs if run.aps)


def _of_run(run: ReportRun) -> str:
  # A run of several depths is several curves with the tables of all.
  rows = [row for row in run.rows if key_of(row) in run.aps]
  if not rows:
    return ""
  return (
    f"<section><h2>Objects by size and class: {html.escape(run.name)}</h2>"
    f"{_by_part(run, rows)}{_by_class(run, rows)}{_samples(run, rows)}</section>"
  )


def _by_part(run: ReportRun, rows: Sequence[EvalRow]) -> str:
  """A line for each size of objects and each group of classes that some row has."""
  lines = {f"ap50_tokens_{name}": f"AP50 of {text}" for name, text in _TOKENS.items()}
  lines |= {f"ap_{name}": f"AP of {text}" for name, text in _PIXELS.items()}
  every = dict.fromkeys(name for row in rows for name in run.parts[key_of(row)])
  for name in every:
    if name not in lines:
      kind, _, group = name.partition("_")
      lines[name] = f"{kind.upper()} of {group}"
  body = [
    _line(html.escape(text), [run.parts[key_of(row)].get(name) for row in rows])
    for name, text in lines.items()
    if name in every
  ]
  if not body:
    return ""
  return _table("Average precision by size of the object", _head(rows), body) + (
    '<p class="note">Average precision (%) of boxes that cover so many tokens of the column’s patch size (at an'
    " overlap of 0.5; the same object covers more tokens at a finer size), of boxes of so many pixels of the file,"
    " and of groups of classes; – where there is no such box.</p>"
  )


def _by_class(run: ReportRun, rows: Sequence[EvalRow]) -> str:
  """The classes that have boxes, those with the most first."""
  order = sorted((k for k, n in enumerate(run.boxes) if n), key=lambda k: -run.boxes[k])
  scored = [k for k in order if any(run.aps[key_of(row)][k] is not None for row in rows)]
  body = [
    _line(named(run, k), [run.aps[key_of(row)][k] for row in rows], f"<td>{run.boxes[k]:,}</td>")
    for k in scored[:MOST_LINES]
  ]
  more = f" The {MOST_LINES} with the most boxes of {len(scored)}; all are in eval.json." * (
    len(scored) > MOST_LINES
  )
  none = len(run.boxes) - len(scored)
  lacking = f" Without a box that counts: {none} of {len(run.boxes)} classes." if none else ""
  head = f'{_head(rows)}<th scope="col">boxes<small>&nbsp;</small></th>'
  return (
    f"<h3>AP of each class</h3>{_table('AP of each class', head, body)}"
    f'<p class="note">Average precision (%) of each class, that with the most boxes first.{more}{lacking}</p>'
  )


def _head(rows: Sequence[EvalRow]) -> str:
  return "".join(
    f'<th scope="col">{side(row.patch)}<small>{grid(row.seqhw)}</small></th>' for row in rows
  )


def _line(name: str, values: Sequence[float | None], last: str = "") -> str:
  cells = "".join(
    "<td>–</td>" if v is None else f'<td style="--tint:{100 * v:.0f}%">{100 * v:.1f}</td>'
    for v in values
  )
  return f'<tr><th scope="row">{name}</th>{cells}{last}</tr>'


def _table(label: str, head: str, body: Sequence[str]) -> str:
  return (
    f'<div class="scroll" tabindex="0" role="region" aria-label="{label}"><table class="classes"><thead><tr>'
    f'<th scope="col">patch <small>grid</small></th>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'
  )


def _samples(run: ReportRun, rows: Sequence[EvalRow]) -> str:
  """The sample images with their boxes, and with what is found at each size, a line for each image."""
  columns = [run.samples[key_of(row)] for row in rows]
  number = min(map(len, columns))
  if not number:
    return ""
  heads = ["boxes", *(f"patch {side(row.patch)}" for row in rows)]
  pictures = []
  for i in range(number):
    files = [column[i] for column in columns]
    stem = files[0].name.partition("_")[0]
    true = files[0].with_name(f"{stem}_true.jpg")
    pictures += [picture(file, head) for file, head in zip([true, *files], heads, strict=True)]
  if not any(pictures):
    folder = html.escape(columns[0][0].parent.name)
    return f'<p class="note">Its sample pictures are not beside its eval.json, in {folder}/.</p>'
  missing = pictures.count("")
  some = f" {missing} pictures are missing." if missing else ""
  top = "".join(f"<b>{head}</b>" for head in heads)
  cells = "".join(one or "<span>–</span>" for one in pictures)
  return (
    "<h3>Sample detections</h3>"
    '<div class="scroll" tabindex="0" role="region" aria-label="Sample detections">'
    f'<div class="masks photos" style="--n:{len(heads)}">{top}{cells}</div></div>'
    f'<p class="note">The first images of the data with their boxes, and the best that is found at each size.{some}</p>'
  )
