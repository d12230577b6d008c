"""What a value may be where a function's annotation says so, and how that is said."""

import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pytest

from flexivit_jax import annotations
from flexivit_jax.objectives.distill import Teacher

Size = int | tuple[int, int]
A_SIZE = "an integer or (an integer, an integer)"


@pytest.mark.parametrize(
  ("kind", "good", "bad", "text"),
  [
    (int, [3, -1, np.int64(3)], [3.0, True, "3", None, (3,)], "an integer"),
    (float, [3, 3.5, float("nan"), np.float32(1)], [True, "x", None], "a number"),
    (int | float, [3, 3.5], [True, "x", None], "a number"),
    (bool, [True, False], [1, 0, "True", None], "True or False"),
    (str, ["", "x"], [1, None, ("x",)], "a string"),
    (int | None, [3, None], ["x", 3.0], "an integer or None"),
    (Literal["a", 1], ["a", 1], ["b", True, 1.0], "'a' or 1"),
    (tuple[int, int], [(1, 2), [1, 2]], [(1,), (1, 2, 3), (1, 2.5), 1, "ab"], r"(an integer, an integer)"),
    (tuple[float, ...], [(), (1, 2.5)], [("x",), 1, "ab"], "a tuple, each a number"),
    (Sequence[Size], [(3, (4, 5)), [3]], [7, (3, (4,)), ("a",)], f"a tuple, each {A_SIZE}"),
    (Sequence[Sequence[Any]], [((".*", 1.0),), ()], ["x", 3, (3,)], "a tuple, each a tuple"),
    (Mapping[str, Any], [{}, {"a": 1}], [3, "x", ()], "a section of keys and values"),
    (Teacher, [{"checkpoint": "x"}], [3, "x", None], "a section of keys and values"),
    (str | os.PathLike[str], ["x", pathlib.Path("x")], [3], "a string or a path"),
  ],
)  # fmt: skip
def test_values(kind, good, bad, text):
  assert all(annotations.fits(value, kind) for value in good)
  assert not any(annotations.fits(value, kind) for value in bad)
  assert annotations.text(kind) == text
