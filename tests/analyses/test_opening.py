"""The command line that analyses share."""

import sys

import pytest

from flexivit_jax.analyses import opening
from flexivit_jax.errors import UserError


def test_an_argument_that_none_knows_is_an_error(monkeypatch, capsys):
  given = ["tool", "run", "--config=configs/digits.py", "--out=out", "--examplez=3"]
  monkeypatch.setattr(sys, "argv", given)
  with pytest.raises(SystemExit):
    opening.open_checkpoint(opening.parser("Text."))
  assert "unknown argument --examplez=3" in capsys.readouterr().err


def test_values_of_the_config_may_be_given(monkeypatch):
  """A key that it does not have is told with it: it has reached the config."""
  given = ["tool", "run", "--config=configs/digits.py", "--out=out", "--config.nothing.here=3"]
  monkeypatch.setattr(sys, "argv", given)
  with pytest.raises(opening.config.errors.UserError, match=r"nothing\.here"):
    opening.open_checkpoint(opening.parser("Text."))


def test_the_main_evaluation_is_one_that_classifies():
  evals = {"val": {"seqhw": (5,)}, "knn": {"type": "knn"}, "a": {"type": "fewshot"}}
  assert opening.main_section({"evals": evals}) == {"seqhw": (5,)}
  evals["test"] = {"seqhw": (8,)}
  assert opening.main_section({"evals": evals}) == {"seqhw": (8,)}
  with pytest.raises(UserError, match=r"classifies; the config has \['knn'\]"):
    opening.main_section({"evals": {"knn": {"type": "knn"}}})
