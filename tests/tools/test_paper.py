"""docs/paper.md is what tools/paper/claims.py writes, of every item, from rows of results/ that must be there."""

import re
import runpy
import shutil
import sys

import numpy as np
import pytest

from flexivit_jax.errors import UserError
from flexivit_jax.paper.reproduce import ITEMS

HEAD = "run,patch,tokens,top1,low,high\n"
ROWS = """new,24,2,42.9,42.9,43.0
new,8,6,-50.0,,
new,6,8,,,
old,24,2,1.0,,
"""
PAGE = """# Page

Before.

- *A claim* (figure 8): 42.9<!-- runs[new, 24].top1 -->: it
  holds.
- Another.
"""


@pytest.fixture
def tool(repository, monkeypatch):
  folder = repository / "tools" / "paper"
  monkeypatch.syspath_prepend(str(folder))  # as Python does where it runs the file
  return runpy.run_path(str(folder / "claims.py"))


@pytest.fixture
def results(tool, monkeypatch, tmp_path):
  """A folder of results and one of pages."""
  monkeypatch.setattr(sys.modules["tables"], "RESULTS", tmp_path)
  tool["main"].__globals__["DOCS"] = tmp_path
  (tmp_path / "runs.csv").write_text(HEAD + ROWS)
  (tmp_path / "page.md").write_text(PAGE)
  return tmp_path


def run(tool, monkeypatch, *arguments):
  monkeypatch.setattr(sys, "argv", ["claims.py", *map(str, arguments)])
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
  for tool_path in re.findall(r"^python (\S+)", page, re.MULTILINE):
    assert (repository / tool_path).is_file()
  verdicts = re.findall(r"\*\*Verdict: (.+)\.\*\*", page)
  assert len(verdicts) == len(re.findall("^### ", page, re.MULTILINE))
  assert all(verdict.startswith(tool["VERDICTS"]) for verdict in verdicts)
  anchors = set(map(tool["slug"], re.findall("^### (.+)", page, re.MULTILINE)))
  assert set(re.findall(r"\]\(#([^)]+)\)", page)) <= anchors


def test_an_item_that_no_claim_names_is_an_error(tool):
  with pytest.raises(UserError, match=r"No claim .* names .*fig25"):
    tool["write_page"]("", [], {})


RUNS = {"file": "runs", "page": "page", "heading": "The heading", "label": "{patch} px"}


def test_lines_are_rows_of_a_file(tool, results):
  spec = {"table": "runs", "row": "new", "name": "Name"}
  line = tool["read_line"](spec, {"runs": RUNS})
  assert line.cells == {"24 px": (42.9, 42.9, 43.0), "8 px": (-50.0, -50.0, -50.0)}
  assert line.text == {"24 px": "42.9 (42.9 to 43.0)", "8 px": "-50.0"}
  assert line.x == {"24 px": 24, "8 px": 8, "6 px": 6}
  assert (line.name, line.source) == ("Name", "[page](page.md#the-heading)")
  line = tool["read_line"](spec | {"x": "tokens", "y": "patch"}, {"runs": RUNS})
  assert line.x == {"24 px": 2, "8 px": 6, "6 px": 8}
  assert line.text["6 px"] == "6"


def test_a_row_or_a_file_that_is_gone_is_an_error(tool, results):
  with pytest.raises(UserError, match=r"row of runs.csv 'nw'; known: new, old. Did you mean 'new'"):
    tool["read_line"]({"table": "runs", "row": "nw", "name": ""}, {"runs": RUNS})
  with pytest.raises(UserError, match=r"file of results/ 'run'"):
    tool["read_line"]({"table": "runs", "name": ""}, {"runs": RUNS | {"file": "run"}})


def test_one_digit_that_changes_in_results_is_found(tool, monkeypatch, tmp_path, repository):
  """A measured number of a figure: the page, and the sentences of claims.toml, are out of date."""
  shutil.copytree(repository / "results", tmp_path, dirs_exist_ok=True)
  changed = tmp_path / "miniature.csv"
  changed.write_text(changed.read_text().replace("50.4", "50.5", 1))
  monkeypatch.setattr(sys.modules["tables"], "RESULTS", tmp_path)
  with pytest.raises(SystemExit, match=r"paper.md is not up to date"):
    run(tool, monkeypatch, "--check")
  claims = (repository / "tools" / "paper" / "claims.toml").read_text()
  assert sys.modules["tables"].update(claims) != claims


def test_ranges_that_do_not_overlap_are_computed(tool):
  """Those that meet do; a column that one of the two has no range at is not compared."""

  def line(name, *cells):
    cells = dict(zip("abc", cells, strict=True))
    numbers = {c: [float(n) for n in re.findall(r"[\d.]+", cell)] for c, cell in cells.items()}
    return tool["Line"](
      name, "", {c: tool["Cell"](*(n * 3)[:3]) for c, n in numbers.items()}, {}, cells
    )

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


def test_sentences_are_found_without_their_sources_or_missed(tool, results):
  assert tool["find_text"]("page", "*A claim*") == "*A claim* (figure 8): 42.9: it holds."
  with pytest.raises(UserError, match=r"Nothing on page.md begins with 'A claim'"):
    tool["find_text"]("page", "A claim")


def test_links_to_sections_lead_somewhere(tool, repository):
  page = (repository / "docs" / "paper.md").read_text()
  links = set(re.findall(r"\]\((\w+\.md)#([^)]+)\)", page))
  assert links
  for name, anchor in links:
    headings = re.findall("^#+ (.+)", (repository / "docs" / name).read_text(), re.MULTILINE)
    assert anchor in set(map(tool["slug"], headings)), f"{name}#{anchor}"
