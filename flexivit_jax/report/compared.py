"""Whether runs differ: each run against the first, size by size, with intervals and p-values.

The runs of one page are compared by a metric that is the share of images that are right. SciPy is imported at use.
"""

import csv
import html
import io
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from flexivit_jax.errors import UserError
from flexivit_jax.evaluators import image_scores, intervals
from flexivit_jax.evaluators.image_scores import ImageScores
from flexivit_jax.evaluators.metrics import TOP1
from flexivit_jax.report.rows import EvalRow, ReportRun, key_of
from flexivit_jax.report.tables import grid, side

ALPHA = 0.05
_NORMAL = 1.959963984540054  # the normal distribution's quantile at 97.5 %


class Difference(NamedTuple):
  """First run minus other at one size, fractions: the interval is of this size alone, `holm` over the sizes.

  `only` are how many images only the first got right, and only the other; None where images are not paired.
  """

  row: EvalRow
  value: float
  interval: tuple[float, float]
  p: float
  holm: float
  only: tuple[int, int] | None


class Comparison(NamedTuple):
  """Two runs. `note` says how they were compared, or why not; then there are no differences."""

  first: str
  other: str
  paired: bool
  note: str
  differences: tuple[Difference, ...]


def compare(runs: Sequence[ReportRun]) -> list[Comparison]:
  """Returns the comparisons of the first run with each other one; none where top-1 is not what is drawn."""
  if len(runs) < 2 or runs[0].metric.name != TOP1.name:
    return []
  return [_pair(runs[0], other) for other in runs[1:]]


def mcnemar(b: int, c: int) -> float:
  """Returns the p-value of the exact test that both of two runs get images right that the other gets wrong as often.

  Two-sided binomial test. Source: McNemar 1947, Psychometrika 12.

  Args:
    b: number of images that only the first gets right.
    c: number of those that only the other gets right.
  """
  from scipy import stats

  return float(stats.binomtest(b, b + c, 0.5).pvalue) if b + c else 1.0


def paired_interval(b: int, c: int, n: int) -> tuple[float, float]:
  """Returns the 95 % interval of the difference of two accuracies on the same n images.

  Wald's, after half an image is added to each of the four cells. Source: Agresti & Min 2005, Statistics in Medicine 24.
  """
  middle, n2 = (b - c) / (n + 2), n + 2
  half = _NORMAL * math.sqrt((b + c + 1) - (b - c) ** 2 / n2) / n2
  return max(-1.0, middle - half), min(1.0, middle + half)


def unpaired(k1: int, n1: int, k2: int, n2: int) -> tuple[float, tuple[float, float]]:
  """Returns the p-value of Fisher's exact test of two rates, and the 95 % interval of their difference.

  The interval is made of Wilson's of both. Source: Newcombe 1998, Statistics in Medicine 17, method 10.

  Args:
    k1, n1: images that are right, and images, of the first.
    k2, n2: of the other.
  """
  from scipy import stats

  p1, p2 = k1 / n1, k2 / n2
  (l1, u1), (l2, u2) = intervals.wilson(k1, n1), intervals.wilson(k2, n2)
  ends = (p1 - p2 - math.hypot(p1 - l1, u2 - p2), p1 - p2 + math.hypot(u1 - p1, p2 - l2))
  return float(stats.fisher_exact([[k1, n1 - k1], [k2, n2 - k2]]).pvalue), ends


def holm(ps: Sequence[float]) -> list[float]:
  """Returns p-values corrected for their number, in the same order. Source: Holm 1979, Scand. J. Statistics 6."""
  adjusted, least = [0.0] * len(ps), 0.0
  for place, i in enumerate(sorted(range(len(ps)), key=lambda i: ps[i])):
    least = max(least, min(1.0, (len(ps) - place) * ps[i]))
    adjusted[i] = least
  return adjusted


def _pair(first: ReportRun, other: ReportRun) -> Comparison:
  def refused(note: str) -> Comparison:
    return Comparison(first.name, other.name, False, note, ())

  for key in ("dataset", "split"):
    values = first.facts.get(key), other.facts.get(key)
    if values[0] != values[1]:
      names = " and ".join(str(value or "unknown") for value in values)
      return refused(f"Not compared: the {key} is not the same, {names}.")
  others = {key_of(row): row for row in other.rows}
  pairs = [(row, others[key_of(row)]) for row in first.rows if key_of(row) in others]
  if not pairs:
    return refused("Not compared: no size was evaluated in both.")
  try:
    found, note = _paired(first, other, pairs), "Paired: the same images were scored."
  except UserError as error:
    found, note = _unpaired(pairs), f"Not paired: {error}"
  corrected = holm([difference.p for difference in found])
  done = (d._replace(holm=p) for d, p in zip(found, corrected, strict=True))
  return Comparison(first.name, other.name, found[0].only is not None, note, tuple(done))


def _paired(
  first: ReportRun, other: ReportRun, pairs: Sequence[tuple[EvalRow, EvalRow]]
) -> list[Difference]:
  one, two = _scores(first), _scores(other)
  if len(one.ids) != len(two.ids):
    raise UserError(f"{len(one.ids)} images were scored of one run, {len(two.ids)} of the other.")
  if not np.array_equal(one.ids, two.ids) or not np.array_equal(one.labels, two.labels):
    raise UserError("the images that were scored, or their labels, are not the same.")
  return [_matched(a, _right(one, a, first), _right(two, b, other)) for a, b in pairs]


def _matched(row: EvalRow, one: np.ndarray, two: np.ndarray) -> Difference:
  b, c = int((one > two).sum()), int((two > one).sum())
  ends = paired_interval(b, c, len(one))
  return Difference(row, (b - c) / len(one), ends, mcnemar(b, c), 1.0, (b, c))


def _scores(run: ReportRun) -> ImageScores:
  if run.file is None:
    raise UserError(f"{run.name} has no file.")
  try:
    return image_scores.read(run.file, run.images_sha256)
  except UserError as error:
    raise UserError(f"{run.name}: {error}") from error


def _right(scores: ImageScores, row: EvalRow, run: ReportRun) -> np.ndarray:
  right = scores.right.get(image_scores.size_name(row._asdict()))
  if right is None or len(right) != row.n or int(right.sum()) != round(row.value * row.n):
    raise UserError(f"the scores of images of {run.name} are not those of its eval.json.")
  return right


def _unpaired(pairs: Sequence[tuple[EvalRow, EvalRow]]) -> list[Difference]:
  found = []
  for a, b in pairs:
    p, ends = unpaired(round(a.value * a.n), a.n, round(b.value * b.n), b.n)
    found.append(Difference(a, a.value - b.value, ends, p, 1.0, None))
  return found


def verdict(difference: Difference) -> str:
  """Says what the corrected p-value allows to say."""
  if difference.only == (0, 0):
    return "no difference"
  if difference.holm > ALPHA:
    return "not significant"
  return "first is better" if difference.value > 0 else "other is better"


def csv_of(comparisons: Sequence[Comparison]) -> str:
  """Returns the comparisons as CSV, a line each size."""
  file = io.StringIO(newline="")
  writer = csv.writer(file, lineterminator="\n")
  heads = "first other patch seqhw depth difference low high p p_holm test only_first only_other"
  writer.writerow(heads.split())
  for pair in comparisons:
    test = "McNemar exact" if pair.paired else "Fisher exact"
    for d in pair.differences:
      at = [d.row.patch, d.row.seqhw, "" if d.row.depth is None else d.row.depth]
      only = d.only or ("", "")
      writer.writerow([pair.first, pair.other, *at, d.value, *d.interval, d.p, d.holm, test, *only])
  return file.getvalue()


def section(comparisons: Sequence[Comparison]) -> str:
  """Returns the part of the page about differences; "" where there is nothing to compare."""
  return "".join(map(_html, comparisons))


def _html(pair: Comparison) -> str:
  title = f"{pair.first} minus {pair.other}"
  body = f"<section><h2>{html.escape(title)}: is it chance?</h2>"
  if not pair.differences:
    return body + f'<p class="note">{html.escape(pair.note)}</p></section>'
  heads = [("patch", "grid"), ("difference", "points"), ("95 % interval", "points")]
  heads += [("only first right", "images"), ("only other right", "images")] if pair.paired else []
  heads += [("p", ""), ("p", "Holm"), ("", "")]
  head = "".join(f'<th scope="col">{name}<small>{unit}</small></th>' for name, unit in heads)
  lines = "".join(map(_line, pair.differences))
  return (
    f'{body}<div class="scroll" tabindex="0" role="region" aria-label="{html.escape(title)}"><table>'
    f"<thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>"
    f'<p class="note">{html.escape(pair.note)} {_METHOD[pair.paired]} Intervals are of each size alone; Holm’s p is'
    f" corrected for the {len(pair.differences)} sizes of these two runs, and a difference is called one where it is at"
    f" most {ALPHA:g}. The images vary here, not the seed: another training may differ more.</p></section>"
  )


_METHOD = {
  True: "The test is McNemar’s exact one, the interval that of Agresti and Min.",
  False: "The test is Fisher’s exact one of two rates, the interval Newcombe’s: both take the images of the runs for"
  " independent, which as a rule makes them cautious where these are the same.",
}


def _line(d: Difference) -> str:
  low, high = (f"{100 * end:+.1f}" for end in d.interval)
  only = "".join(f"<td>{count:,}</td>" for count in d.only or ())
  return (
    f'<tr><th scope="row">{side(d.row.patch)} <small>{grid(d.row.seqhw)}</small></th><td>{100 * d.value:+.1f}</td>'
    f"<td>{low} to {high}</td>{only}<td>{d.p:.2g}</td><td>{d.holm:.2g}</td><td>{verdict(d)}</td></tr>"
  )
