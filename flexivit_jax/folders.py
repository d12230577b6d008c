"""Files of our own: where those are kept that can be made or fetched again, and how small ones are written."""

import contextlib
import os
import pathlib

from flexivit_jax import errors


def cache_folder() -> pathlib.Path:
  """$FLEXIVIT_CACHE, else flexivit_jax in $XDG_CACHE_HOME, else in ~/.cache."""
  if folder := os.environ.get("FLEXIVIT_CACHE"):
    return pathlib.Path(folder).expanduser()
  return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "flexivit_jax"


def write(file: pathlib.Path, text: str) -> None:
  """Writes a file whole, or leaves it as it was.

  Raises:
    UserError: it cannot be written, as on a full disk; with the path.
  """
  part = file.with_name(file.name + ".tmp")
  try:
    part.write_text(text)
    part.replace(file)
  except OSError as e:
    with contextlib.suppress(OSError):
      part.unlink(missing_ok=True)
    raise errors.UserError(f"{file} cannot be written: {e.strerror}.") from e
