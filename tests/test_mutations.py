"""`tools/maintain/mutations.py`: its table fits the code as it is, and a fragment alone is replaced."""

import ast
import collections
import runpy

import pytest


@pytest.fixture
def tool(repository):
  return runpy.run_path(str(repository / "tools" / "maintain" / "mutations.py"))


def test_every_mutation_of_the_table_is_found_once_in_the_code(tool, repository):
  """Whoever rewrites such a line writes the table's row anew: the same bug in the new words."""
  assert tool["check"](repository) == []


def test_the_table_has_so_many_of_each_area(tool):
  rows = tool["read"](tool["TABLE"])
  number = collections.Counter(row["area"] for row in rows if not row["rejected"])
  assert number == {area: n for area, (n, _) in tool["AREAS"].items()}
  assert sum(number.values()) == 60 and len({tool["key"](row) for row in rows}) == len(rows)


SOURCE = '''
class Schedule:
  """A docstring with low < high in it."""

  floor: float = 0.5

  def draw(self, low: int, high: int = 2, *, step: int = 1) -> int:
    """Not here: low < high."""
    if low < high:  # low < high
      raise ValueError(f"{low < high}")
    return min(low, key=lambda x: x - step) * (high - low)
'''


@pytest.mark.parametrize(
  ("function", "old", "new", "line"),
  [
    ("Schedule.draw", "low < high", "low <= high", "    if (low <= high):  # low < high"),
    ("Schedule.draw", "high=2", "high=3", "low: int, high: int = (3), *, step: int = 1) -> int:"),
    ("Schedule.draw", "high - low", "high + low", "* ((high + low))"),
    ("Schedule.draw", "x - step", "x", "key=lambda x: (x)) *"),
    ("Schedule", "floor: float = 0.5", "floor: float = 5.0", "  floor: float = 5.0\n"),
  ],
)
def test_a_fragment_is_replaced_where_it_stands_alone(function, old, new, line, tool, tmp_path):
  path = tmp_path / "flexivit_jax" / "training" / "schedules.py"
  path.parent.mkdir(parents=True)
  path.write_text(SOURCE)
  row = {"mutation": "one", "room": "schedules", "function": function, "old": old, "new": new}
  file, piece = tool["find"](tmp_path, row)
  mutated = tool["replaced"](SOURCE, piece, row)
  assert file == path and line in mutated and ast.parse(mutated)
  assert len(set(mutated.splitlines()) - set(SOURCE.splitlines())) == 1
  gone = tool["find"](tmp_path, row | {"old": "high < low"})
  assert gone == f"one: {function} has 'high < low' 0 times, expected once"


def test_a_mutation_is_caught_by_the_test_that_fails(tool, tmp_path):
  file = tmp_path / "tests" / "test_schedules.py"
  file.parent.mkdir()
  file.write_text("def test_good():\n  pass\n\ndef test_bad():\n  assert 1 - 1 == 2\n")
  assert tool["failure"](tmp_path, [file]) == "tests/test_schedules.py::test_bad"
