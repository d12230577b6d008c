"""README.md and docs/ say what results/*.csv says; tools/paper/tables.py finds what differs."""

import csv
import re
import runpy
import sys

import pytest

from flexivit_jax.errors import UserError

MODELS = """run,patch,model,top1,low,high,steps
small,24,"small, fast",50.0,49.5,50.5,10
small,8,"small, fast",61.3,61.0,61.6,10
large,24,large,40.25,,,20
large,8,large,,,,20
large,4,large,70.0,69.0,71.0,20
"""
PAGE = """Text.

<!-- table: models.csv rows="{model}" columns="{patch} px" cells="{top1}" last=steps best=top1 corner="top-1 in %" -->
<!-- end -->

It gains 11.3<!-- models[small, 8].top1 - models[small, 24].top1 --> points, from 50<!-- models[small, 24].top1 --> %.
"""
TABLE = """| top-1 in % | 24 px | 8 px | 4 px | steps |
|---|---|---|---|---|
| small, fast | **50.0** | **61.3** | | 10 |
| large | 40.25 | - | **70.0** | 20 |
"""


@pytest.fixture
def tool(repository, tmp_path, monkeypatch):
  """The tool with a folder of its own."""
  found = runpy.run_path(str(repository / "tools" / "paper" / "tables.py"))
  (tmp_path / "results").mkdir()
  (tmp_path / "docs").mkdir()
  (tmp_path / "results" / "models.csv").write_text(MODELS)
  found["main"].__globals__.update(ROOT=tmp_path, RESULTS=tmp_path / "results")
  return found


def run(tool, monkeypatch, *arguments):
  monkeypatch.setattr(sys, "argv", ["tables.py", *arguments])
  tool["main"]()


def test_the_pages_say_what_was_measured(repository, monkeypatch):
  run(runpy.run_path(str(repository / "tools" / "paper" / "tables.py")), monkeypatch, "--check")


def test_each_file_of_results_is_described(repository):
  files = {file.name for file in (repository / "results").glob("*.csv")}
  described = re.findall(
    r"^\| (\S+\.csv) ", (repository / "results" / "README.md").read_text(), re.M
  )
  assert sorted(described) == sorted(files)


def test_tables_and_numbers_are_written_and_found_current(tool, monkeypatch, tmp_path):
  for page in ("README.md", "docs/page.md"):
    (tmp_path / page).write_text(PAGE)
  run(tool, monkeypatch)
  for page in ("README.md", "docs/page.md"):
    assert (tmp_path / page).read_text() == PAGE.replace("<!-- end -->", f"{TABLE}<!-- end -->")
  run(tool, monkeypatch, "--check")


@pytest.mark.parametrize(
  ("file", "old", "new", "line"),
  [
    ("README.md", "40.25", "40.26", 7),
    ("README.md", "11.3", "11.4", 10),
    ("README.md", "from 50", "from 51", 10),
    ("results/models.csv", "61.3", "61.4", 6),
    ("results/models.csv", "large,4,large,70.0,69.0,71.0,20\n", "", 4),
  ],
)
def test_one_digit_that_changes_is_found(tool, monkeypatch, tmp_path, file, old, new, line):
  (tmp_path / "README.md").write_text(PAGE)
  run(tool, monkeypatch)
  changed = tmp_path / file
  assert changed.read_text().count(old) == 1
  changed.write_text(changed.read_text().replace(old, new))
  before = (tmp_path / "README.md").read_text()
  with pytest.raises(SystemExit, match=rf"README.md: line {line} says\n(.*\n)*Run `make paper`"):
    run(tool, monkeypatch, "--check")
  assert (tmp_path / "README.md").read_text() == before


def test_a_file_is_shown_as_it_is_where_nothing_else_is_asked_for(tool, tmp_path):
  with (tmp_path / "results" / "plain.csv").open("w", newline="") as file:
    csv.writer(file).writerows([["n", "ms"], [1, 0.50], [2, ""]])
  text = "- Item:\n\n  <!-- table: plain.csv -->\n  <!-- end -->\n"
  lines = "  | n | ms |\n  |---|---|\n  | 1 | 0.5 |\n  | 2 | - |\n"
  assert tool["update"](text) == text.replace("  <!-- end", f"{lines}  <!-- end")
  cells = 'models.csv rows="{run}" columns="{patch}" cells="{top1} ({low} to {high})" bold=low'
  shown = tool["table"](cells.replace(" bold=low", ""))
  assert "| small | 50.0 (49.5 to 50.5) | 61.3 (61.0 to 61.6) | |" in shown
  assert "| large | - | - | 70.0 (69.0 to 71.0) |" in shown


def test_numbers_keep_their_form(tool, tmp_path):
  (tmp_path / "results" / "big.csv").write_text("key,n\na,12345.678\nb,5\n")
  quote = tool["quote"]
  assert quote("1,000", "big[a].n") == "12,346"
  assert quote("0.0", "big[a].n") == "12345.7"
  assert quote("1.00", "big[b].n / big[b].n") == "1.00"
  assert tool["without_sources"](PAGE).endswith("It gains 11.3 points, from 50 %.\n")


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("5<!-- models[small, 8] -->", "expected NAME"),
    ("5<!-- model[small, 8].top1 -->", "Did you mean 'models'"),
    ("5<!-- models[small].top1 -->", "2 rows .* expected one"),
    ("5<!-- models[smal, 8].top1 -->", "0 rows .*begin with: small, large"),
    ("5<!-- models[small, 8].top2 -->", "Did you mean 'top1'"),
    ("5<!-- models[large, 8].top1 -->", "is '', which is no number"),
    ("5 <!-- models[small, 8].top1 -->", "No number is right before"),
    ("1.2e5<!-- models[small, 8].top1 -->", "No number is right before"),
    ("<!-- table: models.csv -->\n| a |\n", "needs a line"),
    ("<!-- table: models.csv -->\n<!-- table: models.csv -->\n<!-- end -->\n", "needs a line"),
    ("<!-- table: models.csv row=run -->\n<!-- end -->\n", "option of a table 'row'.*'rows'"),
    (
      '<!-- table: models.csv rows="{run}" columns="{patch}" cells="{top1}" last=low -->\n<!-- end -->\n',
      "'low' is not the same",
    ),
    ('<!-- table: models.csv rows="{ru}" columns="" cells="" -->\n<!-- end -->\n', "'ru'.*'run'"),
  ],
)
def test_what_is_wrong_is_said(tool, text, message):
  with pytest.raises(UserError, match=message):
    tool["update"](text)


def test_a_row_that_is_too_short_is_an_error(tool, tmp_path):
  (tmp_path / "results" / "models.csv").write_text(MODELS + "large,large\n")
  with pytest.raises(UserError, match=r"models.csv: \['large', 'large'\] is not of 7 cells"):
    tool["read"]("models")
