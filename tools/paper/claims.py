"""Writes docs/paper.md: each claim of the paper, how we know of it, our evidence, a verdict, full-scale commands.

python tools/paper/claims.py            writes docs/paper.md and docs/images/paper_*.png
python tools/paper/claims.py --check    writes nothing; fails where docs/paper.md is not what would be written

What it says of a claim is in tools/paper/claims.toml. Measured numbers are looked up in results/, published ones in
`flexivit_jax.paper.published`, commands in `flexivit_jax.paper.reproduce`.
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
import tables
from matplotlib.axes import Axes

from flexivit_jax import cli, errors
from flexivit_jax.paper import published
from flexivit_jax.paper.items import ITEMS, Item
from flexivit_jax.report.plots import COLORS, FAINT, GRID, INK
from flexivit_jax.weights.registry import PUBLISHED

DOCS = tables.ROOT / "docs"
CLAIMS = pathlib.Path(__file__).with_name("claims.toml")
VERDICTS = (
  "reproduced", "in part", "not reproduced", "not tried", "not testable", "not decided", "not in this project"
)  # fmt: skip
FEW = 4  # commands or published numbers of an item that are all shown
TOP1 = "top-1 in %"
PATCH = "patch size in pixels"
PALETTE = (*COLORS, INK)
MARKERS = "os^DvpX"


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
  """Keys of claims.toml, which explains them."""

  group: str
  title: str
  claim: str
  known: str
  items: list[str]
  verdict: str = ""
  because: str = ""
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


# --- what was measured, and what docs/ say of it ---


def find_text(page: str, begins: str) -> str:
  """The paragraph or bullet of a page of docs/ that begins so, on one line, without the dash of a bullet."""
  start = r"\s+".join(map(re.escape, begins.split()))
  found = re.search(
    rf"^(?:- )?{start}.*?(?=\n\n|\n- |\n<img|\Z)",
    tables.without_sources((DOCS / f"{page}.md").read_text()),
    re.MULTILINE | re.DOTALL,
  )
  if found is None:
    raise errors.UserError(f"Nothing on {page}.md begins with {begins!r}; claims.toml needs it.")
  return " ".join(found[0].removeprefix("- ").split())


def find_image(name: str) -> str:
  """The tag of a picture, with its text, from the page of docs/ that shows it."""
  for page in sorted(DOCS.glob("*.md")):
    found = re.search(rf'<img src="images/{name}\.png".*?>', page.read_text())
    if found and page.name != "paper.md":
      return found[0]
  raise errors.UserError(f"No page shows images/{name}.png; claims.toml needs it.")


def read_line(spec: Mapping[str, str], known: Mapping[str, Mapping[str, str]]) -> Line:
  """What a line of a claim refers to.

  Raises:
    UserError: no row of the file begins with `row`.
  """
  if "published" in spec:
    return published_line(spec)
  about = {"label": "{patch}", "x": "patch", "y": "top1", **known[spec["table"]], **spec}
  rows = tables.read(about["file"])
  if "row" in about:
    firsts = [next(iter(row.values())) for row in rows]
    rows = [row for row, first in zip(rows, firsts, strict=True) if first == about["row"]]
    if not rows:
      raise errors.unknown(f"row of {about['file']}.csv", about["row"], set(firsts))
  x = {about["label"].format_map(row): float(row[about["x"]]) for row in rows}
  measured = {label: row for label, row in zip(x, rows, strict=True) if row[about["y"]]}
  return Line(
    name=about["name"],
    source=f"[{about['page']}]({about['page']}.md#{slug(about['heading'])})",
    cells={label: cell_of(row, about["y"]) for label, row in measured.items()},
    x=x,
    text={label: text_of(row, about["y"]) for label, row in measured.items()},
  )


def cell_of(row: tables.Row, y: str) -> Cell:
  """The value of a row, with the range of a file that has ranges."""
  return Cell(*(float(row.get(name) or row[y]) for name in (y, "low", "high")))


def text_of(row: tables.Row, y: str) -> str:
  """The same as it is written."""
  return f"{row[y]} ({row['low']} to {row['high']})" if row.get("low") else row[y]


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
  return tables.markdown([claim.y, *columns], rows)


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


def verdict_of(claim: Claim) -> str:
  """The verdict; of a claim that has none, whether the project could try it.

  Raises:
    UserError: a verdict that is none of VERDICTS.
  """
  untried = any(map(can_be_done, claim.items))
  verdict = claim.verdict or ("not tried at this scale" if untried else "not in this project")
  if not verdict.startswith(VERDICTS):
    raise errors.UserError(
      f"{claim.title!r}: {verdict!r} is no verdict; known are {', '.join(VERDICTS)}."
    )
  return verdict


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
  parts += [f"> {find_text(**quote)}" for quote in claim.quotes]
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
    raise errors.UserError(f"No claim of claims.toml names {', '.join(sorted(missing))}.")
  homes: dict[str, str] = {}
  summary = []
  body: list[str] = []
  for number, claim in enumerate(claims, start=1):
    heading = f"{number}. {claim.title}"
    for name in claim.items:
      homes.setdefault(name, heading)
    verdict = verdict_of(claim)
    names = ", ".join(f"`{name}`" for name in claim.items) or "-"
    summary.append([f"[{heading}](#{slug(heading)})", names, verdict])
    if number == 1 or claim.group != claims[number - 2].group:
      body.append(f"## {claim.group}")
    body += [f"### {heading}", f"**Claim.** {claim.claim} Known from: {claim.known}."]
    body += evidence(claim, lines[claim.title])
    because = " ".join(tables.without_sources(claim.because).split())
    body.append(f"**Verdict: {verdict}.** {because}".strip())
    body += [claim.note] if claim.note else []
    body += full_scale(claim, homes, heading)
  return (
    "\n\n".join([intro.strip(), tables.markdown(["claim", "item", "verdict"], summary), *body])
    + "\n"
  )


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
