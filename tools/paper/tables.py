"""Rewrites the tables and the quoted numbers of README.md and docs/ from results/*.csv.

python tools/paper/tables.py            rewrites the pages
python tools/paper/tables.py --check    writes nothing; fails where a page does not say what results/ says

A table stands between two comments. The first names its file; the table shows all of it, or one value by two keys:

<!-- table: attention.csv -->
<!-- table: digits.csv rows="{model}" columns="{patch} px" cells="{top1}" last=steps best=top1 -->
<!-- end -->

rows, columns, cells: what is written at the left, above, and in a cell, with columns of the file in braces;
corner: the first header cell; last: a column that is the same in a whole row, shown at the end; best: the column
whose largest value of those below each other is bold; bold: a column that says "yes" where a cell is bold. A value
that the file leaves empty is "-", a pair of keys that it does not have is blank.

The source of a number in a sentence follows it, without a space: 97.8<!-- digits[flexivit, 4].top1 -->. In brackets
are the first cells of the row, after them the name of the column. " - " and " / " between two sources are calculated.
The number keeps as many decimals as it has.
"""

import argparse
import csv
import decimal
import pathlib
import re
import shlex
import sys
from collections.abc import Iterable, Mapping
from decimal import Decimal

from flexivit_jax import cli, errors

ROOT = pathlib.Path(__file__).resolve().parents[2]
RESULTS = ROOT / "results"
TABLE = re.compile(
  r"^( *)<!-- table: ([^\n]+) -->\n(?:(?! *<!--).*\n)*? *<!-- end -->$", re.MULTILINE
)
COMMENT = re.compile(
  r"(?P<number>(?<![\w.,])-?\d[\d,]*(?:\.\d+)?)?<!-- (?P<source>.*?) -->", re.DOTALL
)
SOURCE = re.compile(r"(\w+)\[([^\[\]]*)\]\.([^\[\]]+)")
OPTIONS = ("rows", "columns", "cells", "corner", "last", "best", "bold")
Row = Mapping[str, str]


def pages() -> list[pathlib.Path]:
  """The files that quote results/."""
  return [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), *ROOT.glob("tools/paper/*.toml")]


def read(name: str) -> list[Row]:
  """The rows of results/NAME.csv.

  Raises:
    UserError: no such file; rows that do not have as many cells as the header.
  """
  known = {file.stem: file for file in RESULTS.glob("*.csv")}
  if name not in known:
    raise errors.unknown("file of results/", name, known)
  with known[name].open(newline="") as file:
    header, *rows = csv.reader(file)
  if ragged := [row for row in rows if len(row) != len(header)]:
    raise errors.UserError(f"{name}.csv: {ragged[0]} is not of {len(header)} cells.")
  return [dict(zip(header, row, strict=True)) for row in rows]


def value(source: str) -> Decimal:
  """The number that NAME[KEY, ...].COLUMN names, or two such calculated.

  Raises:
    UserError: another form; no row or several begin with these keys; no such column; a cell that is no number.
  """
  terms = re.split(r" ([-/]) ", " ".join(source.split()))
  result = look_up(terms[0])
  for sign, term in zip(terms[1::2], terms[2::2], strict=True):
    result = result - look_up(term) if sign == "-" else result / look_up(term)
  return result


def look_up(source: str) -> Decimal:
  """The number that NAME[KEY, ...].COLUMN names."""
  parsed = SOURCE.fullmatch(source)
  if parsed is None:
    raise errors.UserError(f"{source!r} is no source of a number; expected NAME[KEY, ...].COLUMN.")
  name, inside, column = parsed.groups()
  keys = [key.strip() for key in inside.split(",")]
  rows = [row for row in read(name) if list(row.values())[: len(keys)] == keys]
  if len(rows) != 1:
    first = ", ".join(dict.fromkeys(next(iter(row.values())) for row in read(name)))
    raise errors.UserError(
      f"{source!r}: {len(rows)} rows of {name}.csv begin with {keys}, expected one."
      f" Its rows begin with: {first}."
    )
  if column not in rows[0]:
    raise errors.unknown(f"column of {name}.csv", column, rows[0])
  try:
    return Decimal(rows[0][column])
  except decimal.InvalidOperation as e:
    raise errors.UserError(f"{source!r} is {rows[0][column]!r}, which is no number.") from e


def quote(number: str, source: str) -> str:
  """The value of a source, with the commas and as many decimals as `number` has."""
  places = Decimal(1).scaleb(-len(number.partition(".")[2]))
  rounded = value(source).quantize(places, decimal.ROUND_HALF_UP)
  return f"{rounded:,}" if "," in number else f"{rounded}"


def without_sources(text: str) -> str:
  """The text as a reader sees it."""
  return COMMENT.sub(lambda found: found["number"] or "", text)


def markdown(header: Iterable[str], body: Iterable[Iterable[str]]) -> str:
  """A Markdown table."""
  header = list(header)
  lines = [f"| {' | '.join(row)} |" for row in (header, *body)]
  lines.insert(1, "|" + "---|" * len(header))
  return "\n".join(lines).replace("|  ", "| ")


def table(spec: str) -> str:
  """The table that a comment asks for.

  Raises:
    UserError: an option that is none of OPTIONS; a name of a column that the file does not have.
  """
  name, *given = shlex.split(spec)
  options = dict(option.split("=", 1) for option in given)
  if strange := options.keys() - set(OPTIONS):
    raise errors.unknown("option of a table", min(strange), OPTIONS)
  rows = read(name.removesuffix(".csv"))
  try:
    return pivot(rows, **options) if options else plain(rows)
  except KeyError as e:
    raise errors.unknown(f"column of {name}", e.args[0], rows[0]) from e


def plain(rows: list[Row]) -> str:
  """All of a file."""
  return markdown(rows[0], ([cell or "-" for cell in row.values()] for row in rows))


def pivot(
  all_rows: list[Row],
  *,
  rows: str,
  columns: str,
  cells: str,
  last: str = "",
  best: str = "",
  bold: str = "",
  corner: str = "",
) -> str:
  """One value by two keys, both in the order in which they come in the file."""
  heads = list(dict.fromkeys(columns.format_map(row) for row in all_rows))
  keys = list(dict.fromkeys(rows.format_map(row) for row in all_rows))
  row_of = {(rows.format_map(row), columns.format_map(row)): row for row in all_rows}
  highest = {
    head: max(float(row[best] or "-inf") for key, row in row_of.items() if key[1] == head)
    for head in heads
    if best
  }

  def cell(key: str, head: str) -> str:
    row = row_of.get((key, head))
    if row is None:
      return ""
    if not all(row[name] for name in re.findall(r"{(.+?)}", cells)):
      return "-"
    text = cells.format_map(row)
    if (bold and row[bold] == "yes") or (best and float(row[best]) == highest[head]):
      return re.sub(r"\S+", r"**\g<0>**", text, count=1)
    return text

  body = [[key, *(cell(key, head) for head in heads)] for key in keys]
  if last:
    pairs = dict.fromkeys((rows.format_map(row), row[last]) for row in all_rows)
    if len(pairs) > len(keys):
      raise errors.UserError(f"{last!r} is not the same in all rows of a key: {list(pairs)}.")
    body = [[*line, number] for line, (_, number) in zip(body, pairs, strict=True)]
  return markdown([corner, *heads, *filter(None, [last])], body)


def update(text: str) -> str:
  """The text with all tables and numbers as results/ has them.

  Raises:
    UserError: a table without its end; a source that follows no number; what `table` and `value` raise.
  """
  if not len(TABLE.findall(text)) == text.count("<!-- table: ") == text.count("<!-- end -->"):
    raise errors.UserError("A table needs a line <!-- table: ... --> above and <!-- end --> below.")

  def new_table(found: re.Match[str]) -> str:
    indent, spec = found.groups()
    shown = [f"<!-- table: {spec} -->", *table(spec).splitlines(), "<!-- end -->"]
    return "\n".join(indent + line for line in shown)

  def new_number(found: re.Match[str]) -> str:
    if found["source"] == "end" or found["source"].startswith("table: "):
      return found[0]
    if found["number"] is None:
      raise errors.UserError(f"No number is right before <!-- {found['source']} -->.")
    return f"{quote(found['number'], found['source'])}<!-- {found['source']} -->"

  return COMMENT.sub(new_number, TABLE.sub(new_table, text))


def stale(text: str, new: str) -> str:
  """The first line that differs: its number, what it says and what it should say."""
  pairs = zip(text.splitlines(), new.splitlines(), strict=False)
  for number, (old_line, new_line) in enumerate(pairs, start=1):
    if old_line != new_line:
      return f"line {number} says\n  {old_line}\nand results/ say\n  {new_line}"
  return "a table has more or fewer rows than its file"


def main() -> None:
  """Rewrites, or checks."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--check", action="store_true", help="write nothing")
  args = parser.parse_args()
  for page in pages():
    text = page.read_text()
    try:
      new = update(text)
    except errors.UserError as e:
      raise errors.UserError(f"{page.relative_to(ROOT)}: {e}") from e
    if args.check and new != text:
      sys.exit(f"{page.relative_to(ROOT)}: {stale(text, new)}\nRun `make paper`.")
    if new != text:
      page.write_text(new)


if __name__ == "__main__":
  cli.tool(main)
