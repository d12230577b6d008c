"""Is everything still what was written? Checkpoints, exports and files with weights."""

import functools
import pathlib
from collections.abc import Callable

from flexivit_jax import errors, weights
from flexivit_jax.running.checkpoint import BEST, Checkpoints
from flexivit_jax.weights import folders, formats
from flexivit_jax.weights.export import artifact

Problem = Exception | None  # what is wrong; folders.NoChecksums where nothing can be compared


def verify(path: pathlib.Path) -> list[tuple[str, Problem]]:
  """Returns (what, what is wrong with it or None) of all that a path holds.

  Args:
    path: a run, its checkpoints or one of them; an export; a file or folder that `weights.load` reads.

  Raises:
    UserError: nothing of these.
  """
  if not path.exists():
    raise errors.UserError(f"{path} does not exist.")
  export = (path / folders.EXPORT_RECORD).is_file()
  record = folders.EXPORT_RECORD if export else folders.RECORD
  if path.is_dir() and folders.is_ours(path, record):
    return [(str(path), _problem(lambda: folders.check(path, record, more=False)))]
  steps = _checkpoints(path)
  if steps:
    return steps
  if path.suffix == ".zip":
    return [(str(path), _problem(lambda: artifact.load_artifact(path)))]
  return [(str(path), _problem(lambda: _check_weights(path)))]


def _checkpoints(path: pathlib.Path) -> list[tuple[str, Problem]]:
  """Those of a run, the best one too; of its folder with checkpoints or with the best; or one."""
  steps = _steps(path)
  return [*steps, *_steps(path / BEST)] if (path / "checkpoints").is_dir() else steps


def _steps(path: pathlib.Path) -> list[tuple[str, Problem]]:
  for folder in (path / "checkpoints", path, path.parent):
    only = int(path.name) if folder == path.parent and path.name.isdigit() else None
    steps = sorted(int(p.name) for p in folder.glob("[0-9]*") if p.is_dir() and p.name.isdigit())
    best = folder.name == BEST and (folder.parent / "checkpoints").is_dir()
    if steps and (folder.name == "checkpoints" or best or only is not None):
      checkpoints = Checkpoints(folder, read_only=True)
      try:
        checked = [
          (folder / str(step), _problem(functools.partial(checkpoints.verify_arrays, step)))
          for step in steps
          if only in (None, step)
        ]
        # A run that is at work may have put a newer one in the place of one meanwhile.
        return [(str(path), problem) for path, problem in checked if path.is_dir()]
      finally:
        checkpoints.close()
  if (path / "checkpoints").is_dir():
    raise errors.UserError(f"{path} has no checkpoint that is complete; nothing can be compared.")
  return []


def _check_weights(path: pathlib.Path) -> None:
  """Of what others wrote only an .npz has checksums, those of a zip archive."""
  *_, record = weights.load_with_record(path)
  checked = path.suffix == ".npz" or record["format"] == formats.CHECKPOINT.name
  if not checked and not folders.is_ours(path.parent):
    raise folders.NoChecksums(folders.unknown(path))


def _problem(check: Callable[[], object]) -> Problem:
  """Returns the error that a check raises, None where it raises none."""
  try:
    check()
  except (errors.UserError, ValueError, OSError) as e:
    return e
  return None
