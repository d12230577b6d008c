"""Folders that appear under their name only when they are complete, and the hashes of the files in them."""

import contextlib
import hashlib
import pathlib
import shutil
from collections.abc import Iterable, Iterator, Mapping

from flexivit_jax import errors


@contextlib.contextmanager
def new(out: pathlib.Path) -> Iterator[pathlib.Path]:
  """Gives a hidden folder to write into, which takes the name `out` at the end; nothing is left after an error.

  Raises:
    UserError: there is something of that name already.
  """
  if out.exists():
    raise errors.UserError(f"{out} is there already; remove it or give another name.")
  part = out.with_name(f".{out.name}.part")
  shutil.rmtree(part, ignore_errors=True)  # of an earlier try that was cut off
  part.mkdir(parents=True)
  try:
    yield part
    part.rename(out)
  finally:
    shutil.rmtree(part, ignore_errors=True)


def sha256(path: pathlib.Path) -> str:
  """Of a file's content, in hex."""
  with path.open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def check(folder: pathlib.Path, names: Iterable[str], digests: Mapping[str, str]) -> None:
  """Raises a UserError for the first file that is missing, or whose content is not what it was."""
  for name in names:
    if not (folder / name).is_file() or sha256(folder / name) != digests.get(name):
      raise errors.UserError(
        f"{folder / name} is missing or damaged (wrong sha256); copy or export it again."
      )
