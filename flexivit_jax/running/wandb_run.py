"""Weights & Biases: another place for the metrics of a run. The package is imported only if a config asks for it.

One run folder is one run there: its id is kept in RUN/wandb_id.txt, and a run that goes on from a checkpoint goes on
there too. Steps are those of the training; what is there already is not sent again, for it would be the same.
"""

import importlib
import pathlib
import secrets
from collections.abc import Mapping, Sequence
from typing import Any, Literal, final

from flexivit_jax import errors, files

_ID = "wandb_id.txt"


def check() -> None:
  """Raises a UserError if the package is not installed."""
  _package()


def _package() -> Any:
  try:
    wandb = importlib.import_module("wandb")
  except ImportError as e:
    raise errors.UserError(
      f"wandb=... in the config needs the package wandb, which cannot be imported ({e}). Install it with"
      " `pip install wandb`, or remove wandb from the config; metrics.jsonl and TensorBoard are written in any case."
    ) from e
  if not hasattr(wandb, "init"):  # a folder named wandb, which earlier runs leave behind
    where = ", ".join(getattr(wandb, "__path__", ()))
    raise errors.UserError(
      f"wandb=... in the config needs the package wandb; what is imported is the folder {where}. Install the package"
      " with `pip install wandb`, or remove wandb from the config."
    )
  return wandb


@final
class WandbRun:
  """What `metrics_writer.MetricsWriter` writes to."""

  def __init__(self, run: Any):
    self._run = run
    self._first = int(getattr(run, "step", 0) or 0)  # earlier steps were sent before

  def write(self, step: int, numbers: Mapping[str, float]) -> None:
    """Sends the numbers of a step."""
    if step >= self._first:
      self._run.log(dict(numbers), step=step)

  def flush(self) -> None:
    """Does nothing: a process of wandb sends the numbers."""

  def close(self) -> None:
    """Waits until everything is sent."""
    self._run.finish()


def open_run(
  workdir: pathlib.Path,
  settings: Mapping[str, object],
  begun: bool,
  *,
  project: str | None = None,
  name: str | None = None,
  entity: str | None = None,
  group: str | None = None,
  tags: Sequence[str] = (),
  notes: str | None = None,
  mode: Literal["online", "offline", "disabled"] | None = None,
) -> WandbRun:
  """Starts a run of Weights & Biases, or resumes the one of this run folder.

  Args:
    workdir: the run folder.
    settings: the config, which it shows.
    begun: whether the run resumes from a checkpoint.
    project: default: that of the environment, or "uncategorized".
    name: of the run; default: the folder's.
    entity: a user or team; default: that of the account.
    group: of runs that belong together.
    tags: words to find it by.
    notes: a text about it.
    mode: "offline" writes files only, which `wandb sync` sends; default: that of the environment, or "online".

  Raises:
    Exception: of any type; training does not need it.
  """
  file = workdir / _ID
  if begun and file.is_file():
    key = file.read_text().strip()
  else:
    key = secrets.token_hex(4)
    files.write_atomically(file, key + "\n")
  run = _package().init(
    project=project,
    name=name or workdir.absolute().name,
    entity=entity,
    group=group,
    tags=list(tags) or None,
    notes=notes,
    mode=mode,
    dir=str(workdir),
    id=key,
    resume="allow",
    config=dict(settings),
  )
  return WandbRun(run)
