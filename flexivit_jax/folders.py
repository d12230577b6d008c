"""Where files are kept that can be made or fetched again."""

import os
import pathlib


def cache_folder() -> pathlib.Path:
  """$FLEXIVIT_CACHE, else flexivit_jax in $XDG_CACHE_HOME, else in ~/.cache."""
  if folder := os.environ.get("FLEXIVIT_CACHE"):
    return pathlib.Path(folder).expanduser()
  return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "flexivit_jax"
