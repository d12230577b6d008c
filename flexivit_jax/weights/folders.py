"""Folders that appear under their name only when they are complete, with the checksums of the files in them.

Whatever is written for others to read, each file is named in MANIFEST, which starts with its own checksum. A record
says what the files are of: RECORD beside weights that other projects read too, EXPORT_RECORD in an export.
"""

import contextlib
import json
import pathlib
import shutil
from collections.abc import Iterator

from flexivit_jax import errors
from flexivit_jax.running import manifest
from flexivit_jax.sizes import from_text
from flexivit_jax.trees import Json

MANIFEST = "flexivit_manifest.txt"
RECORD = "flexivit_record.json"
EXPORT_RECORD = "record.json"


@contextlib.contextmanager
def new(out: pathlib.Path) -> Iterator[pathlib.Path]:
  """Yields a hidden folder to write into, then adds a manifest and renames it to `out`; removes it after an error.

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
    manifest.write(part, manifest.Manifest(manifest.file_sums(part), {}), MANIFEST)
    part.rename(out)
  finally:
    shutil.rmtree(part, ignore_errors=True)


class NoChecksums(errors.UserError):
  """Nothing beside a file says what it should be, so nothing can be compared."""


def unknown(path: pathlib.Path) -> str:
  """Returns the note on files of other projects."""
  return f"No checksums were written beside {path.name}: damage to it would not be noticed."


def is_ours(folder: pathlib.Path, record: str = RECORD) -> bool:
  """Tells whether `new` wrote a folder: it has a manifest or a record."""
  return any((folder / name).is_file() for name in (MANIFEST, record))


def check(folder: pathlib.Path, record: str = RECORD, *, more: bool = True) -> bool:
  """Compares the files of a folder with its manifest; returns False for a folder that is not ours.

  Args:
    folder: with or without a manifest.
    record: the name of its record.
    more: files that the manifest does not name may be there, such as a README.md.

  Raises:
    Damaged: files that differ or are missing, all of them named; or the manifest is.
  """
  if not is_ours(folder, record):
    return False
  try:
    manifest.check_files(folder, manifest.read(folder, MANIFEST), (MANIFEST,), more=more)
  except manifest.Damaged as damage:
    ways_out = ["Copy or write it again."]
    if record == RECORD:
      ways_out.append(
        f"If it was changed on purpose, remove {MANIFEST} and {RECORD}: it is then another project's."
      )
    raise manifest.Damaged(" ".join([str(damage), *ways_out])) from damage
  return True


def read_export(folder: pathlib.Path, format_: str) -> Json:
  """Returns the record of an export, whose files are as they were written; "sizes" are `sizes.SeqHw`.

  Raises:
    UserError: no such export, one of another format.
    Damaged: see `check`.
  """
  if not check(folder, EXPORT_RECORD):
    raise errors.UserError(f"{folder} is no export of ours: it has no {EXPORT_RECORD}.")
  try:
    record = json.loads((folder / EXPORT_RECORD).read_bytes())
    got, sizes = record["format"], [from_text(size) for size in record["sizes"]]
  except (OSError, LookupError, TypeError, ValueError) as e:
    raise errors.UserError(f"{folder / EXPORT_RECORD} cannot be read: {e!r}") from e
  if got != format_:
    raise errors.UserError(f"{folder}: its format is {got!r}; expected {format_!r}.")
  return record | {"sizes": sizes}
