"""Follows a config, its sizes and the images through the calls of a start of a run: rooms, stays and climbs.

    python tools/maintain/walks.py [CHECKOUT]

CHECKOUT is a folder with `flexivit_jax/`, `configs/` and `setup.cfg`; default: this one. The tool starts
`configs/digits.py:debug` there and stops before the steps are compiled. It looks at each call of a function
of the package that takes the value: an argument of that name, or a dict with that key; for `settings` the
config itself. A walk is the sequence of rooms (modules and folders at the top of the package) of these calls.
Calls in the same room that follow each other are one stay; a climb is a step to a room that is higher in the
import order of `setup.cfg`.
"""

import argparse
import configparser
import itertools
import os
import pathlib
import re
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import Any, NamedTuple

from flexivit_jax import cli, errors

VALUES = ("settings", "flexi", "seqhw", "image")
LAST = "compile_steps"  # the function before which the run ends


class Walk(NamedTuple):
  """How often a walk stays, in how many rooms, and how often it climbs."""

  stays: int
  rooms: int
  climbs: int


class ReachedError(Exception):
  """The run has come to `LAST`."""


def count(walk: Sequence[str], heights: Mapping[str, int]) -> Walk:
  """Counts a walk.

  Args:
    walk: the rooms of the calls, in order.
    heights: of each room, 0 is the highest; one that is missing is the lowest.
  """
  stays = [room for i, room in enumerate(walk) if i == 0 or walk[i - 1] != room]
  lowest = len(heights)
  steps = [heights.get(room, lowest) for room in stays]
  climbs = sum(after < before for before, after in itertools.pairwise(steps))
  return Walk(len(stays), len(set(stays)), climbs)


def heights_of(setup: pathlib.Path) -> dict[str, int]:
  """Returns the row of each room in the import order, from the top."""
  parser = configparser.ConfigParser()
  parser.read(setup)
  rows = parser["importlinter:contract:layers"]["layers"].split("\n")
  return {name: i for i, row in enumerate(filter(None, rows)) for name in re.findall(r"\w+", row)}


def follow(checkout: pathlib.Path) -> dict[str, list[str]]:
  """Starts the run and returns the rooms of the calls that take each value."""
  os.chdir(checkout)
  sys.path.insert(0, str(checkout))
  # The package that this tool itself uses may be another one.
  for name in [name for name in sys.modules if name.partition(".")[0] == "flexivit_jax"]:
    del sys.modules[name]
  from flexivit_jax import config, train

  package = f"{checkout}{os.sep}flexivit_jax{os.sep}"
  settings: Any = config.load("configs/digits.py:debug")
  walks: dict[str, list[str]] = {name: [] for name in VALUES}

  def look(frame: FrameType, event: str, _: Any) -> None:
    code = frame.f_code
    if event != "call" or not code.co_filename.startswith(package) or code.co_name[0] == "<":
      return
    number = code.co_argcount + code.co_kwonlyargcount
    number += bool(code.co_flags & 4) + bool(code.co_flags & 8)  # *args, **kwargs
    arguments = {name: frame.f_locals.get(name) for name in code.co_varnames[:number]}
    dicts = [value for value in arguments.values() if type(value) is dict]
    room = code.co_filename.removeprefix(package).split(os.sep)[0].removesuffix(".py")
    for name in VALUES:
      inside = any(d is settings if name == "settings" else name in d for d in dicts)
      if inside or name in arguments:
        walks[name].append(room)
    if code.co_name == LAST:
      sys.setprofile(None)
      raise ReachedError

  threading.setprofile(look)
  sys.setprofile(look)
  with tempfile.TemporaryDirectory() as folder:
    try:
      train.train(settings, pathlib.Path(folder) / "run")
    except ReachedError:
      pass
    finally:
      sys.setprofile(None)
      threading.setprofile(None)  # type: ignore[arg-type]
  return walks


def main() -> None:
  """Prints a line for each value."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  here = pathlib.Path(__file__).resolve().parents[2]
  parser.add_argument("checkout", type=pathlib.Path, nargs="?", default=here)
  checkout = parser.parse_args().checkout.resolve()
  if not (checkout / "setup.cfg").is_file():
    raise errors.UserError(f"{checkout} has no setup.cfg; give the top folder of a checkout.")
  heights = heights_of(checkout / "setup.cfg")
  for name, walk in follow(checkout).items():
    stays, rooms, climbs = count(walk, heights)
    print(f"{name:8} {stays} stays in {rooms} rooms, {climbs} climbs")


if __name__ == "__main__":
  cli.tool(main)
