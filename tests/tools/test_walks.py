"""`tools/maintain/walks.py` counts stays and climbs; the run that it follows is not started here."""

import runpy

import pytest


@pytest.fixture
def tool(repository):
  return runpy.run_path(str(repository / "tools" / "maintain" / "walks.py"))


@pytest.mark.parametrize(
  ("walk", "counted"),
  [
    ([], (0, 0, 0)),
    (["train", "train", "data"], (2, 2, 0)),
    (["data", "train", "data", "resize", "unknown"], (5, 4, 1)),
  ],
)
def test_a_climb_goes_to_a_higher_room(tool, walk, counted):
  assert tool["count"](walk, {"train": 0, "data": 1, "resize": 2}) == counted


def test_the_heights_are_those_of_the_import_order(tool, repository):
  heights = tool["heights_of"](repository / "setup.cfg")
  assert heights["__main__"] == 0
  assert heights["commands"] < heights["train"] < heights["data"] == heights["running"]
