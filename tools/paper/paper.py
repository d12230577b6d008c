"""Writes docs/paper.md: each claim of the paper, how we know of it, our evidence, a verdict, full-scale commands.

python tools/paper/paper.py            writes docs/paper.md and docs/images/paper_*.png
python tools/paper/paper.py --check    writes nothing; fails where docs/paper.md is not what would be written

What it says of a claim is in tools/paper/paper_claims.toml. Measured numbers are looked up in the tables and sentences
of docs/, published ones in `flexivit_jax.paper.published`, commands in `flexivit_jax.paper.reproduce`.
"""

import argparse
import collections
import pathlib
import re
import sys
import tomllib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from flexivit_jax import cli, errors
from flexivit_jax.paper import published
from flexivit_jax.paper.items import ITEMS, Item
from flexivit_jax.report.plots import COLORS, FAINT, GRID, INK
from flexivit_jax.weights.registry import PUBLISHED

ROOT = pathlib.Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
CLAIMS = pathlib.Path(__file__).with_name("paper_claims.toml")
VERDICTS = (
  "reproduced", "in part", "not reproduced", "not tried", "not testable", "not decided", "not in this project"
)  # fmt: skip
FEW = 4  # commands or published numbers of an item that are all shown
TOP1 = "top-1 in %"
PATCH = "patch size in pixels"
PALETTE = (*COLORS, INK)
MARKERS = "os^DvpX"
NUMBER = r"-?\d+(?:\.\d+)?"


class Table(NamedTuple):
  """A Markdown table: header cells, and the cells of each row by its first."""

  where: str
  header: list[str]
  rows: dict[str, list[str]]


class Cell(NamedTuple):
  """A number with its range over runs; without one, all three are equal."""

  value: float
  low: float
  high: float


class Line(NamedTuple):
  """What was measured of one model, by column: cells, also as they are written, and places on the x axis."""

  name: str
  source: str  # a link to where it is from
  cells: dict[str, Cell]
  x: dict[str, float]
  text: dict[str, str]
  published: bool = False


class Claim(NamedTuple):
  """Keys of tools/paper/paper_claims.toml, which explains them."""

  group: str
  title: str
  claim: str
  known: str
  items: list[str]
  verdict: str = ""
  bullet: str = ""
  quotes: Sequence[Mapping[str, str]] = ()
  images: Sequence[str] = ()
  setting: str = ""  # goes with lines
  lines: Sequence[Mapping[str, str]] = ()
  plot: str = ""
  x: str = PATCH
  y: str = TOP1
  difference: str = ""
  against: str = ""
  note: str = ""


# --- what is in docs/ ---


def read_page(name: str) -> str:
  """The text of a page of docs/."""
  return (DOCS / f"{name}.md").read_text()


def find_table(text: str, *, heading: str, first: str, after: str = "") -> Table:
  """The first table of a section whose first header cell is `first`, after the text `after`.

  Raises:
    UserError: no such section, text or table; rows that do not have as many cells as the header.
  """
  section = re.search(
    rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL
  )
  if section is None:
    raise errors.UserError(
      f"No section {heading!r} is left; tools/paper/paper_claims.toml needs it."
    )
  where = f"{heading!r}" + (f" after {after!r}" if after else "")
  start = section[1].find(after)
  for block in re.findall(r"(?:^\|.*\n)+", section[1][start:], re.MULTILINE) if start >= 0 else ():
    header, _, *rows = [
      [c.strip() for c in row.strip("|").split("|")] for row in block.splitlines()
    ]
    if header[0] == first:
      table = Table(f"table {first!r} of {where}", header, {row[0]: row for row in rows})
      if any(len(row) != len(header) for row in rows):
        raise errors.UserError(f"The {table.where} has rows that are not of {len(header)} cells.")
      return table
  raise errors.UserError(
    f"No table {first!r} is left in {where}; tools/paper/paper_claims.toml needs it."
  )


def find_row(table: Table, label: str) -> list[str]:
  """The cells of a row, its label first; a UserError that lists the labels for one that is not there."""
  if label not in table.rows:
    raise errors.unknown(f"row of the {table.where}", label, table.rows)
  return table.rows[label]


def parse(cell: str) -> Cell | None:
  """Returns the numbers of "42.9", "**42.9**" or "42.9 (42.8 to 43.0)"; None of "-", which was not measured."""
  plain = cell.replace("*", "").strip()
  if plain == "-":
    return None
  found = re.fullmatch(rf"({NUMBER})(?: \(({NUMBER}) to ({NUMBER})\))?", plain)
  if found is None:
    raise errors.UserError(f"{cell!r} is no number; expected one like 42.9 or 42.9 (42.8 to 43.0).")
  value = float(found[1])
  return Cell(value, float(found[2] or value), float(found[3] or value))


def place(label: str) -> float | None:
  """The patch size or grid of a column: 24 of "24 px (2x2)", 6 of "8x8 (6 px)", 48 of "48", 2 of "2 x 2"; else None."""
  found = re.search(r"(\d+) px", label) or re.match(r"(\d+)(?: x \d+)?$", label)
  return float(found[1]) if found else None


def wrapped(words: str) -> str:
  """A pattern for words that may be on two lines."""
  return r"\s+".join(map(re.escape, words.split()))


def places_after(text: str, words: str) -> list[float]:
  """The numbers, with commas, that follow `words`."""
  found = re.search(wrapped(words) + r"\s+((?:\d+,\s+)*\d+)", text)
  if found is None:
    raise errors.UserError(
      f"No numbers follow {words!r} any more; tools/paper/paper_claims.toml needs them."
    )
  return [float(number) for number in found[1].split(",")]


def find_text(text: str, begins: str) -> str:
  """The paragraph or bullet that begins so, on one line, without the dash of a bullet."""
  found = re.search(
    rf"^(?:- )?{wrapped(begins)}.*?(?=\n\n|\n- |\n<img|\Z)", text, re.MULTILINE | re.DOTALL
  )
  if found is None:
    raise errors.UserError(
      f"Nothing begins with {begins!r} any more; tools/paper/paper_claims.toml needs it."
    )
  return " ".join(found[0].removeprefix("- ").split())


def find_image(name: str) -> str:
  """The tag of a picture, with its text, from the page of docs/ that shows it."""
  for page in sorted(DOCS.glob("*.md")):
    found = re.search(rf'<img src="images/{name}\.png".*?>', page.read_text())
    if found and page.name != "paper.md":
      return found[0]
  raise errors.UserError(
    f"No page shows images/{name}.png any more; tools/paper/paper_claims.toml needs it."
  )


def read_line(spec: Mapping[str, str], tables: Mapping[str, Mapping[str, str]]) -> Line:
  """What a line of a claim refers to."""
  if "published" in spec:
    return published_line(spec)
  about = dict(tables[spec["table"]])
  page = about.pop("page")
  text, source = read_page(page), f"[{page}]({page}.md#{slug(about['heading'])})"
  table = find_table(text, **about)
  row = dict(zip(table.header, find_row(table, spec["row"]), strict=True))
  x = {label: at for label in table.header[1:] if (at := place(label)) is not None}
  if "x_after" in spec:
    x = dict(zip(x, places_after(text, spec["x_after"]), strict=True))
  cells = {label: cell for label in x if (cell := parse(row[label])) is not None}
  return Line(
    spec["name"], source, cells, x, {label: row[label].replace("*", "") for label in cells}
  )


def published_line(spec: Mapping[str, str]) -> Line:
  """The published top-1 of one model in one setting, by patch size."""
  known = published.read(spec["published"])
  values = {
    str(v.patch): v.value
    for v in known
    if (v.model, v.setting, v.metric) == (spec["model"], spec["setting"], "top1")
  }
  if not values:
    raise errors.UserError(
      f"{spec['published']} has no top1 of {spec['model']!r}, {spec['setting']!r}."
    )
  cells = {patch: Cell(v, v, v) for patch, v in values.items()}
  x = {patch: float(patch) for patch in values}
  text = {patch: f"{v:.1f}" for patch, v in values.items()}
  return Line(spec["name"], "flexivit_jax.paper.published", cells, x, text, published=True)


# --- pictures ---


def draw(path: pathlib.Path, claim: Claim, lines: Sequence[Line]) -> None:
  """A line for each model, its name at its right end, bars where there is a range."""
  with plt.rc_context({"font.family": "DejaVu Sans", "font.size": 9, "text.color": INK}):
    figure, axes = plt.subplots(figsize=(6.4, 3.4))
    figure.subplots_adjust(left=0.08, right=0.62, top=0.9, bottom=0.15)
    for i, line in enumerate(lines):
      draw_line(axes, line, PALETTE[i], MARKERS[i])
    style(axes, claim, sorted({x for line in lines if not line.published for x in line.x.values()}))
    name_lines(axes, lines)
    figure.savefig(path, dpi=150, metadata={"Software": None})
    plt.close(figure)


def points(line: Line) -> tuple[np.ndarray, np.ndarray]:
  """Places `[n]` and (value, low, high) `[n, 3]`, from left to right."""
  pairs = sorted((line.x[label], cell) for label, cell in line.cells.items())
  return np.array([x for x, _ in pairs]), np.array([cell for _, cell in pairs])


def draw_line(axes: Axes, line: Line, color: str, marker: str) -> None:
  """Published numbers are dashed and have no filled marks."""
  x, y = points(line)
  face, dash = ("white", "--") if line.published else (color, "-")
  axes.plot(
    x, y[:, 0], dash, marker=marker, color=color, markerfacecolor=face, markersize=5, linewidth=1.6
  )
  if (ranged := y[:, 1] < y[:, 2]).any():
    off = np.abs(y[ranged, 1:].T - y[ranged, 0])
    axes.errorbar(
      x[ranged], y[ranged, 0], yerr=off, fmt="none", color=color, capsize=3, linewidth=1
    )


def style(axes: Axes, claim: Claim, ticks: Sequence[float]) -> None:
  """A log axis with a tick at each size that leaves room for its number."""
  axes.set_xscale("log")
  shown: list[float] = []
  for x in ticks:
    if not shown or x / shown[-1] > 1.12:
      shown.append(x)
  axes.set_xticks(shown, [f"{x:g}" for x in shown])
  axes.minorticks_off()
  axes.set_xlabel(claim.x, color=FAINT)
  axes.set_title(claim.y, loc="left", fontsize=9, color=FAINT)
  axes.grid(axis="y", color=GRID, linewidth=0.7)
  axes.set_axisbelow(True)
  axes.tick_params(color=FAINT, labelcolor=INK)
  axes.spines[["top", "right", "left"]].set_visible(False)
  axes.spines["bottom"].set_color(FAINT)


def name_lines(axes: Axes, lines: Sequence[Line]) -> None:
  """Names beside the right ends, moved apart where they would touch."""
  low, high = axes.get_ylim()
  ends = [(float(x[-1]), float(y[-1, 0])) for x, y in map(points, lines)]
  heights = spread([(y - low) / (high - low) for _, y in ends])
  for i, at in enumerate(heights):
    axes.annotate(
      lines[i].name, ends[i], (1.06, at), textcoords="axes fraction", color=PALETTE[i], va="center", weight="bold",
      fontsize=8, annotation_clip=False,
      arrowprops={"arrowstyle": "-", "color": PALETTE[i], "linewidth": 0.7, "linestyle": ":", "relpos": (0, 0.5)},
    )  # fmt: skip


def spread(heights: Sequence[float], gap: float = 0.075, top: float = 1.05) -> list[float]:
  """The heights, moved up until they are `gap` apart, then down where they are above `top`."""
  order = np.argsort(heights, kind="stable")
  found, at = np.array(heights, float), -np.inf
  for i in order:
    at = found[i] = max(at + gap, found[i])
  at = top + gap
  for i in order[::-1]:
    at = found[i] = min(at - gap, found[i])
  return found.tolist()


# --- the page ---


def describe(claim: Claim, lines: Sequence[Line]) -> str:
  """The picture in words."""
  said = [f"{claim.y[0].upper()}{claim.y[1:]} against {claim.x}."]
  for line in lines:
    x, y = points(line)
    values = ", ".join(f"{value:g} at {at:g}" for at, value in zip(x, y[:, 0], strict=True))
    said.append(f"{line.name[0].upper()}{line.name[1:]}: {values}.")
  return " ".join(said)


def table_of(claim: Claim, lines: Sequence[Line]) -> str:
  """The lines as a Markdown table, with the columns of the first; the difference of the last two as its last row."""
  columns = list(lines[0].x)
  rows = [[line.name, *(line.text.get(c, "-") for c in columns)] for line in lines]
  if claim.difference:
    old, new = lines[-2:]
    gains = (new.cells[c].value - old.cells[c].value for c in columns)
    rows.append([claim.difference, *(f"{gain:+.1f}" for gain in gains)])
  head, *body = (f"| {' | '.join(row)} |" for row in [[claim.y, *columns], *rows])
  return "\n".join([head, "|" + "---|" * (1 + len(columns)), *body])


def apart(claim: Claim, lines: Sequence[Line]) -> str:
  """At which columns the range over runs of each line is above or below that of the line `against`.

  Raises:
    UserError: no line of that name.
  """
  named = {line.name: line for line in lines}
  if claim.against not in named:
    raise errors.unknown(f"line of {claim.title!r}", claim.against, named)
  base = named.pop(claim.against)
  said = [f"{name} {where}" for name, line in named.items() if (where := sides(base, line))]
  found = "; ".join(said) or "nowhere"
  return f"Ranges over runs that do not overlap with that of {claim.against}: {found}."


def sides(base: Line, line: Line) -> str:
  """At which columns the range of a line is above and below that of another; of those that have ranges."""
  both = [c for c in base.text if all(" to " in each.text.get(c, "") for each in (base, line))]
  found = {
    "above": [c for c in both if line.cells[c].low > base.cells[c].high],
    "below": [c for c in both if line.cells[c].high < base.cells[c].low],
  }
  return ", ".join(f"{side} at {', '.join(at)}" for side, at in found.items() if at)


def verdict_of(claim: Claim) -> tuple[str, str]:
  """The verdict, and what the bullet of docs/results.md says beyond it.

  Raises:
    UserError: a verdict that is none of VERDICTS.
  """
  verdict, rest = claim.verdict, ""
  if claim.bullet:
    found = re.fullmatch(r"\*.+?\*[^:]*: (.+)", find_text(read_page("results"), claim.bullet))
    rest = found[1] if found else ""
    if not verdict:
      verdict, rest = [*re.split(r"[.:] ", rest, maxsplit=1), ""][:2]
  elif not verdict:
    verdict = (
      "not tried at this scale" if any(map(can_be_done, claim.items)) else "not in this project"
    )
  if not verdict.startswith(VERDICTS):
    raise errors.UserError(
      f"{claim.title!r}: {verdict!r} is no verdict; known are {', '.join(VERDICTS)}."
    )
  return verdict, rest[:1].upper() + rest[1:]


def can_be_done(name: str) -> bool:
  """Whether the project has a command for an item."""
  return bool(ITEMS[name].how or ITEMS[name].evaluation)


def commands_of(name: str) -> list[str]:
  """The commands of an item; of many, the first and the last."""
  item = ITEMS[name]
  how = list(item.how)
  if len(how) > FEW:
    how = [how[0], f"# {len(how) - 2} more: flexivit reproduce {name}", how[-1]]
  if item.evaluation is None:
    return how
  brought = [f" --checkpoint '{s}=FILE'" for s in item.evaluation.subjects if s not in PUBLISHED]
  return [f"flexivit reproduce {name} --data_dir DIR --out OUT{''.join(brought)}", *how]


def known_of(item: Item) -> str:
  """The published numbers: the few, or how many of each kind."""
  values = [value for name in item.published for value in published.read(name)]
  if not values:
    return "no number that we know"
  if len(values) > FEW:
    kinds = collections.Counter(value.kind for value in values)
    return f"{len(values)} numbers ({', '.join(f'{n} {kind}' for kind, n in kinds.items())})"
  return "; ".join(
    f"{v.model} ({v.setting})"
    + ("" if v.patch is None else f" at patch {v.patch}")
    + f": {v.value:g}{'' if v.error is None else f' +- {v.error:g}'} {v.unit} ({v.kind})"
    for v in values
  )


def item_lines(name: str) -> list[str]:
  """An item at full scale: title, published numbers, how it differs, commands, where its cost is said."""
  item = ITEMS[name]
  said = f"`{name}` ({item.title}). Published: {known_of(item)}."
  if item.differs:
    said += f" Differs: {item.differs}."
  if item.configs:
    said += f" Cost of training: `flexivit plan {item.configs[0]}`" + (
      " and so on." if len(item.configs) > 1 else "."
    )
  if not can_be_done(name):
    return [f"{said} Not in this project."]
  return [said, "\n".join(["```text", *commands_of(name), "```"])]


def slug(heading: str) -> str:
  """The anchor of a heading on GitHub."""
  return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def evidence(claim: Claim, lines: Sequence[Line]) -> list[str]:
  """Setting, picture, table, what is quoted, pictures of other pages."""
  parts = [f"**Here** ({lines[0].source}). {claim.setting}"] if claim.setting else []
  if claim.plot:
    parts.append(
      f'<img src="images/paper_{claim.plot}.png" width="640" alt="{describe(claim, lines)}">'
    )
  if lines:
    parts.append(table_of(claim, lines))
  if claim.against:
    parts.append(apart(claim, lines))
  parts += map(find_image, claim.images)
  parts += [f"> {find_text(read_page(quote['page']), quote['begins'])}" for quote in claim.quotes]
  return parts


def full_scale(claim: Claim, homes: Mapping[str, str], heading: str) -> list[str]:
  """The items of a claim; those that an earlier claim has shown, as a link."""
  own = [name for name in claim.items if homes[name] == heading]
  others = [f"`{n}`: [above](#{slug(homes[n])})" for n in claim.items if homes[n] != heading]
  parts = [line for name in own for line in item_lines(name)]
  if others:
    parts.append("; ".join(others) + ".")
  return [f"**At full scale.** {parts[0]}", *parts[1:]] if parts else []


def write_page(intro: str, claims: Sequence[Claim], lines: Mapping[str, Sequence[Line]]) -> str:
  """The whole page.

  Raises:
    UserError: an item of `flexivit reproduce --list` that no claim names.
  """
  if missing := ITEMS.keys() - {name for claim in claims for name in claim.items}:
    raise errors.UserError(
      f"No claim of tools/paper/paper_claims.toml names {', '.join(sorted(missing))}."
    )
  homes: dict[str, str] = {}
  summary = ["| claim | item | verdict |", "|---|---|---|"]
  body: list[str] = []
  for number, claim in enumerate(claims, start=1):
    heading = f"{number}. {claim.title}"
    for name in claim.items:
      homes.setdefault(name, heading)
    verdict, rest = verdict_of(claim)
    names = ", ".join(f"`{name}`" for name in claim.items) or "-"
    summary.append(f"| [{heading}](#{slug(heading)}) | {names} | {verdict} |")
    if number == 1 or claim.group != claims[number - 2].group:
      body.append(f"## {claim.group}")
    body += [f"### {heading}", f"**Claim.** {claim.claim} Known from: {claim.known}."]
    body += evidence(claim, lines[claim.title])
    body.append(f"**Verdict: {verdict}.** {rest}".strip())
    body += [claim.note] if claim.note else []
    body += full_scale(claim, homes, heading)
  return "\n\n".join([intro.strip(), "\n".join(summary), *body]) + "\n"


def main() -> None:
  """Writes, or checks."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--check", action="store_true", help="write nothing")
  parser.add_argument("--out", type=pathlib.Path, default=DOCS, help="folder (default: docs)")
  args = parser.parse_args()
  given = tomllib.loads(CLAIMS.read_text())
  claims = [Claim(**claim) for claim in given["claims"]]
  lines = {c.title: [read_line(line, given["tables"]) for line in c.lines] for c in claims}
  page = write_page(given["intro"], claims, lines)
  file = args.out / "paper.md"
  if args.check:
    if not file.is_file() or file.read_text() != page:
      sys.exit(f"{file} is not up to date; run `make paper`.")
    return
  (args.out / "images").mkdir(parents=True, exist_ok=True)
  file.write_text(page)
  for claim in claims:
    if claim.plot:
      draw(args.out / "images" / f"paper_{claim.plot}.png", claim, lines[claim.title])


if __name__ == "__main__":
  cli.tool(main)
