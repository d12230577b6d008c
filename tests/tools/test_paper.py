"""docs/paper.md is what tools/paper/paper.py writes, of every item, from tables that must be there."""

import re
import runpy
import sys

import numpy as np
import pytest

from flexivit_jax.errors import UserError
from flexivit_jax.paper.reproduce import ITEMS

TEXT = """# Page

## Results

| top-1 in % | 24 px (2x2) | 8 px (6x6) | steps |
|---|---|---|---|
| old | 1.0 | 2.0 | 5 |

Later:

| top-1 in % | 24 px (2x2) | 8 px (6x6) | steps |
|---|---|---|---|
| new | **42.9** (42.9 to 43.0) | - | 5 |

(MFLOPs: the four
sizes 6, 10; others 7.)

- *A claim* (figure 8): reproduced: it
  holds.
- Another.

## Other
"""


@pytest.fixture(scope="module")
def tool(pytestconfig):
  return runpy.run_path(str(pytestconfig.rootpath / "tools" / "paper" / "paper.py"))


def run(tool, monkeypatch, *arguments):
  monkeypatch.setattr(sys, "argv", ["paper.py", *map(str, arguments)])
  tool["main"]()


def test_the_page_is_up_to_date(tool, monkeypatch):
  run(tool, monkeypatch, "--check")


def test_the_check_fails_where_the_page_differs(tool, monkeypatch, tmp_path, repository):
  page = (repository / "docs" / "paper.md").read_text()
  (tmp_path / "paper.md").write_text(page.replace("42.9", "43.9"))
  with pytest.raises(SystemExit, match="not up to date; run `make paper`"):
    run(tool, monkeypatch, "--check", f"--out={tmp_path}")
  assert [path.name for path in tmp_path.iterdir()] == ["paper.md"]


def test_the_page_and_its_pictures_are_written(tool, monkeypatch, tmp_path, repository):
  run(tool, monkeypatch, f"--out={tmp_path}")
  page = (tmp_path / "paper.md").read_text()
  assert page == (repository / "docs" / "paper.md").read_text()
  shown = set(re.findall(r'src="images/(paper_\w+\.png)"', page))
  assert {path.name for path in (tmp_path / "images").iterdir()} == shown
  assert {path.name for path in (repository / "docs" / "images").glob("paper_*")} == shown


def test_every_item_and_every_verdict_is_on_the_page(tool, repository):
  page = (repository / "docs" / "paper.md").read_text()
  for name, item in ITEMS.items():
    assert f"`{name}` ({item.title})" in page
    assert all(command in page for command in item.how[:1])
  verdicts = re.findall(r"\*\*Verdict: (.+)\.\*\*", page)
  assert len(verdicts) == len(re.findall("^### ", page, re.MULTILINE))
  assert all(verdict.startswith(tool["VERDICTS"]) for verdict in verdicts)
  anchors = set(map(tool["slug"], re.findall("^### (.+)", page, re.MULTILINE)))
  assert set(re.findall(r"\]\(#([^)]+)\)", page)) <= anchors


def test_an_item_that_no_claim_names_is_an_error(tool):
  with pytest.raises(UserError, match=r"No claim .* names .*fig25"):
    tool["write_page"]("", [], {})


@pytest.mark.parametrize(
  ("cell", "numbers"),
  [
    ("42.9", (42.9, 42.9, 42.9)),
    ("**65.5**", (65.5, 65.5, 65.5)),
    ("42.9 (42.9 to 43.0)", (42.9, 42.9, 43.0)),
    ("**46.0** (45.9 to 46.0)", (46.0, 45.9, 46.0)),
    ("-0.5", (-0.5, -0.5, -0.5)),
    ("-", None),
  ],
)
def test_cells_are_numbers_with_their_range(tool, cell, numbers):
  assert tool["parse"](cell) == numbers


@pytest.mark.parametrize("cell", ["", "many", "42.9 (42.9)", "1.2e3", "42.9 %"])
def test_a_cell_of_another_shape_is_an_error(tool, cell):
  with pytest.raises(UserError, match=re.escape(f"{cell!r} is no number")):
    tool["parse"](cell)


def test_tables_are_found_by_heading_first_cell_and_what_is_before(tool):
  find = tool["find_table"]
  assert list(find(TEXT, heading="Results", first="top-1 in %").rows) == ["old"]
  table = find(TEXT, heading="Results", first="top-1 in %", after="Later:")
  assert tool["find_row"](table, "new") == ["new", "**42.9** (42.9 to 43.0)", "-", "5"]
  with pytest.raises(UserError, match=r"row of the table .* after 'Later:'.*'old'.*new"):
    tool["find_row"](table, "old")
  for where in (
    {"heading": "Resul", "first": "top-1 in %"},
    {"heading": "Other", "first": "top-1 in %"},
    {"heading": "Results", "first": "top-5 in %"},
    {"heading": "Results", "first": "top-1 in %", "after": "Never:"},
  ):
    with pytest.raises(UserError, match="is left"):
      find(TEXT, **where)
  with pytest.raises(UserError, match="rows that are not of 4 cells"):
    find(TEXT.replace("| 2.0 | 5 |", "| 2.0 |"), heading="Results", first="top-1 in %")


def test_ranges_that_do_not_overlap_are_computed(tool):
  """Those that meet do; a column that one of the two has no range at is not compared."""

  def line(name, *cells):
    text = dict(zip(("a", "b", "c"), cells, strict=True))
    return tool["Line"](name, "", {c: tool["parse"](t) for c, t in text.items()}, {}, text)

  lines = [
    line("base", "2.0 (1.0 to 3.0)", "2.0 (1.0 to 3.0)", "2.0 (1.0 to 3.0)"),
    line("high", "4.0 (3.1 to 5.0)", "4.0 (3.0 to 5.0)", "9.0"),
    line("low", "2.0 (1.0 to 3.0)", "0.5 (0.1 to 0.9)", "5.0 (5.0 to 5.0)"),
    line("same", "2.0 (1.0 to 3.0)", "2.0 (1.0 to 3.0)", "2.0 (1.0 to 3.0)"),
  ]
  claim = tool["Claim"]("", "Title", "", "", [], against="base")
  assert tool["apart"](claim, lines).endswith(
    "of base: high above at a; low above at c, below at b."
  )
  assert tool["apart"](claim, lines[::3]).endswith("of base: nowhere.")
  with pytest.raises(UserError, match=r"line of 'Title' 'bse'.*Did you mean 'base'"):
    tool["apart"](claim._replace(against="bse"), lines)


def test_names_keep_their_distance_and_stay_below_the_top(tool):
  spread = tool["spread"]
  assert spread([0.5, 0.1], gap=0.1) == [0.5, 0.1]
  np.testing.assert_allclose(spread([0.5, 0.1, 0.12], gap=0.1), [0.5, 0.1, 0.2])
  np.testing.assert_allclose(spread([1.0, 0.98, 0.97, 0.2], gap=0.1, top=1.0), [1.0, 0.9, 0.8, 0.2])


def test_sentences_and_places_are_found_or_missed(tool):
  assert tool["find_text"](TEXT, "*A claim*") == "*A claim* (figure 8): reproduced: it holds."
  assert tool["places_after"](TEXT, "the four sizes") == [6, 10]
  with pytest.raises(UserError, match="Nothing begins with 'A claim'"):
    tool["find_text"](TEXT, "A claim")
  with pytest.raises(UserError, match="No numbers follow 'the four depths'"):
    tool["places_after"](TEXT, "the four depths")
  labels = ("24 px (2x2)", "8x8 (6 px)", "48", "2 x 2", "FLOPs", "wall time, one core")
  assert list(map(tool["place"], labels)) == [24, 6, 48, 2, None, None]
