import pytest

from flexivit_jax.tables import aligned


def test_columns_are_as_wide_as_their_widest_cell_and_cells_stand_on_their_side():
  rows = [("name", "n", "ms"), ("a", "10", "0.5"), ("long name", "1", "12.25")]
  assert aligned(rows, "<>") == [
    "name        n     ms",
    "a          10    0.5",
    "long name   1  12.25",
  ]
  assert aligned([("a", "b")], "<", gap=" ", least=(3,)) == ["a   b"]
  assert aligned([]) == []


def test_rows_of_other_lengths_are_an_error():
  with pytest.raises(ValueError, match="shorter"):
    aligned([("a", "b"), ("c",)])
