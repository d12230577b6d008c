"""Grids that do not fit are errors that say which ones do. Those that fit: test_flexivit.py, on images."""

import re

import pytest

from flexivit_jax.errors import UserError
from flexivit_jax.models import grid


@pytest.mark.parametrize(
  ("size", "message"),
  [
    (
      dict(stride=4),
      "stride=4: patches of (6, 6) pixels do not end at the edge of the image (24, 36);"
      " strides with which they do: 1, 2, 3, 6.",
    ),
    (dict(stride=0), "stride=0: patches"),
    (dict(stride=-3), "stride=-3: patches"),
    (dict(stride=3, patch_hw=(4, 8)), "strides with which they do: 1, 2, 4."),
    (dict(stride=4, patch_hw=(24, 6)), "strides with which they do: 1, 2, 3, 5, 6, 10, 15, 30."),
    (
      dict(stride=1, patch_hw=(25, 6)),
      "Patches of (25, 6) pixels do not fit into the image (24, 36)",
    ),
    (dict(stride=1, patch_hw=(0, 6)), "Patches of (0, 6) pixels do not fit"),
    (dict(stride=3, seqhw=4), "With stride the grid is what fits; give no seqhw and no grid_hw."),
    (dict(stride=3, grid_hw=(4, 4)), "With stride the grid is what fits"),
  ],
)
def test_strides_that_do_not_fit_are_errors(size, message):
  with pytest.raises(UserError, match=re.escape(message)):
    grid.which_grid((24, 36), (6, 6), **size)
