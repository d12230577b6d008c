"""The folder of a run: its lock, and the config of each start, which must match the config of the run."""

import contextlib
import datetime
import json
import os
import pathlib
import re
import socket
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import filelock
import numpy as np

from flexivit_jax import errors, files
from flexivit_jax.trees import Json

# Sections that identify a run: another value would be another run under the same name. Keys in FREE may change.
IDENTITY = (
  "model", "input", "flexi", "objective", "optim", "seed", "init", "init_head_bias", "token_budget", "skip_above",
)  # fmt: skip
FREE = (
  "model.remat",  # Changes memory and time, and no number but for rounding.
  "input.threads",
  "input.workers",
  "input.prefetch",
  "input.keep_mb",
  "input.on_error",  # A run that resumes has met no image to which it applies.
  "input.max_errors",
  "input.data.data_dir",
  "input.data.cache_gb",
  "input.data.allow_empty",
)

# Fields of a model, or of a part of one, by which training draws masks.
MASKS = ("dropout", "stochastic_depth")

# A path like s3://bucket is a folder of this name to `pathlib`.
_ADDRESS = re.compile(r"(gs|s3|az|hf|abfss?|hdfs|wasbs?|https?|file|ftp):/")


def check_path(workdir: pathlib.Path, *, several: bool = False) -> None:
  """Checks that the folder of a run exists or can be created; changes nothing.

  Args:
    workdir: the folder.
    several: whether several processes share it.

  Raises:
    UserError: it is a file or below a file, a broken link, an address, too long, or has characters that this system
      or several processes cannot handle.
  """
  shown, way = files.printable(workdir), "give another --workdir"
  if _ADDRESS.match(str(workdir)):
    raise errors.UserError(
      f"--workdir {shown} is an address; expected a folder of this machine, as one on a disk or a mounted bucket, or"
      " s3://BUCKET/RUN or gs://BUCKET/RUN."
    )
  try:
    for path in (workdir, *workdir.parents):
      if path.is_symlink() and not path.exists():
        raise errors.UserError(
          f"{shown}: {files.printable(path)} is a link to {path.readlink()}, which does not exist; mend it, or {way}."
        )
      if path.exists() and not path.is_dir():
        raise errors.UserError(
          f"{shown}: {files.printable(path)} is a file, where a folder is needed; {way}."
        )
  except OSError as e:  # a name that is too long
    raise errors.UserError(f"{shown:.300} cannot be a folder: {e.strerror}; {way}.") from e
  absolute = files.plain(workdir.absolute())
  if (odd := files.oddities(absolute)) and (several or not files.has_aliases()):
    raise files.no_alias(absolute, odd)


def check_bucket(url: str) -> None:
  """Checks that the address of a run names a folder in a bucket.

  Raises:
    UserError: it is a whole bucket.
  """
  if url.count("/") < 3:
    raise errors.UserError(f"--workdir {url} is a whole bucket; give a folder in it, as {url}/RUN.")


@contextlib.contextmanager
def locked(workdir: pathlib.Path, option: str = "--workdir") -> Iterator[None]:
  """Locks the folder for this process; the lock is released when the process ends, in whatever way.

  Folders that were created for the lock are removed at the end if nothing was written in them.

  Args:
    workdir: the folder.
    option: by which the user named it, for messages.

  Raises:
    UserError: another process holds the lock (it is named); or the folder cannot be written to.
  """
  holder, file = workdir / "holder.json", workdir / ".lock"
  created = [p for p in (workdir, *workdir.parents) if not p.exists()]
  had_lock_file = file.exists()
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(file, timeout=0)
    lock.acquire()
  except filelock.Timeout as e:
    raise errors.UserError(
      f"{workdir} is in use by {_holder(holder)}; wait for it, stop it, or give another {option}."
    ) from e
  except OSError as e:
    _remove(created)
    raise errors.UserError(
      f"{workdir} cannot be written to: {e.strerror}; give another {option}."
    ) from e
  try:
    began = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    about = {"pid": os.getpid(), "host": socket.gethostname(), "since": began}
    files.write_atomically(holder, json.dumps(about) + "\n")
    yield
  finally:
    with contextlib.suppress(OSError):
      holder.unlink()
    if not had_lock_file and os.listdir(workdir) == [file.name]:
      file.unlink()
      _remove(created)
    lock.release()


def _remove(folders: Sequence[pathlib.Path]) -> None:
  """Removes empty folders, the innermost first; stops at one that is not empty."""
  with contextlib.suppress(OSError):
    for folder in folders:
      if folder.is_dir():
        folder.rmdir()


def _holder(file: pathlib.Path) -> str:
  try:
    holder = json.loads(file.read_text())
    return f"process {holder['pid']} on {holder['host']} since {holder['since']}"
  except (OSError, ValueError, KeyError):
    return "another process"


class Start(NamedTuple):
  """How the config of a start differs from the config of the run; see `compare`."""

  lines: dict[str, str]  # key -> one line for the user
  notes: list[str]  # lines to print
  unknown: str | None  # why the config of the run cannot be read
  same: bool  # nothing needs to be written


def compare(workdir: pathlib.Path, settings: Mapping[str, object], *, begun: bool) -> Start:
  """Compares the config of a start with that of the run; changes nothing.

  Args:
    workdir: the folder of the run.
    settings: the config of this start.
    begun: whether there is a checkpoint; until then the config may change freely.
  """
  stored = [workdir / "config.json", *reversed(_numbered(workdir))]
  last_config, damaged = _last_config([p for p in stored if p.exists()])
  last = "" if last_config is None else f"; {last_config[0].name} is the last that is whole"
  notes = [f"{path} is damaged{last}" for path in damaged]
  if last_config is None:
    named = ", ".join(map(str, damaged))
    unknown = f"{named}: damaged, so whether this is the run's config cannot be told"
    return Start({}, notes, unknown if damaged and begun else None, same=False)
  lines = diff(last_config[1], json.loads(_text(settings)))
  when = "config" if begun else "config, before anything was saved"
  notes += [f"{when}: {line}" for line in lines.values()]
  return Start(lines, notes, None, same=not lines and bool(stored[1:]) and not damaged)


def check_config(
  workdir: pathlib.Path,
  settings: Mapping[str, Any],
  start: Start,
  *,
  allow_change: bool,
  misfit: str | None = None,
) -> None:
  """Checks that a run with a checkpoint may resume with this config; changes nothing.

  Args:
    workdir: the folder of the run.
    settings: the config of this start.
    start: the result of `compare`.
    allow_change: also allows changes of the sections that identify a run.
    misfit: why the checkpoint cannot be resumed with this config, whatever is allowed; None: it can.

  Raises:
    UserError: an identifying section has changed; no config can be read; or there is a misfit.
  """
  differs = (
    f"The config differs from that of the run in {workdir}: {'; '.join(start.lines.values())}."
  )
  if misfit is not None:
    raise errors.UserError(f"{differs} {misfit}" if start.lines else misfit)
  if allow_change:
    return
  if start.unknown:
    raise errors.UserError(
      f"{start.unknown}; put the file back, or give --allow_config_change to go on with this config."
    )
  if key := next((key for key in start.lines if is_identity(key, settings)), None):
    raise errors.UserError(
      f"{differs} {key} makes it another run: give another --workdir, or --allow_config_change to go on all the same."
    )


def write_config(workdir: pathlib.Path, settings: Mapping[str, object], start: Start) -> None:
  """Writes config.json, and for each start that differs from the one before config.NNN.json.

  Raises:
    UserError: nothing can be written.
  """
  if start.same:
    return
  number = 1 + max((int(p.suffixes[-2][1:]) for p in _numbered(workdir)), default=0)
  files.write_atomically(workdir / f"config.{number:03d}.json", _text(settings))
  files.write_atomically(workdir / "config.json", _text(settings))


def _numbered(workdir: pathlib.Path) -> list[pathlib.Path]:
  return sorted(workdir.glob("config.[0-9][0-9][0-9].json"))


def _text(settings: Mapping[str, object]) -> str:
  return json.dumps(settings, indent=2, default=str) + "\n"


def _last_config(
  files: Sequence[pathlib.Path],
) -> tuple[tuple[pathlib.Path, Json] | None, list[pathlib.Path]]:
  """Returns the first file that holds a config, with the config, and the damaged files before it."""
  damaged: list[pathlib.Path] = []
  for file in files:
    with contextlib.suppress(ValueError):
      config = json.loads(file.read_bytes())
      if isinstance(config, dict):
        return (file, config), damaged
    damaged.append(file)
  return None, damaged


def write_bad_step(
  workdir: pathlib.Path,
  *,
  step: int,
  size: Json,
  measured: Json,
  ids: np.ndarray | None,
  writing: bool = True,
) -> pathlib.Path:
  """Writes bad_step.json, which `flexivit replay` reads to examine a step that was not finite; returns its path.

  With `writing` False (all processes but one) it only returns the path.

  Raises:
    UserError: it cannot be written.
  """
  file = workdir / "bad_step.json"
  if not writing:
    return file
  # JSON has no NaN and no infinity: they are written as text.
  numbers = {k: float(v) if np.isfinite(v) else str(v) for k, v in measured.items()}
  examples = None if ids is None else np.asarray(ids).tolist()
  dump = {"step": step, "size": dict(size), "measured": numbers, "ids": examples}
  files.write_atomically(file, json.dumps(dump) + "\n")
  return file


def is_identity(key: str, settings: Mapping[str, Any]) -> bool:
  """Whether another value under this key would make it another run."""
  if key == "accumulate":  # changes only rounding, unless masks are drawn for each microbatch
    model = _flat(settings.get("model", {}))
    return any(value for name, value in model.items() if name.rpartition(".")[2] in MASKS)
  teacher = key.startswith("objective.teachers.") and key.endswith(
    ".checkpoint"
  )  # told by its sha256
  return key.partition(".")[0] in IDENTITY and not key.startswith(FREE) and not teacher


def diff(old: Json, new: Json) -> dict[str, str]:
  """Returns {"a.b.c": one line} for each key that differs."""
  a, b = _flat(old), _flat(new)
  changed = {k: (a.get(k, "absent"), b.get(k, "absent")) for k in {**a, **b}}
  return {k: f"{k}: {x!r} -> {y!r}" for k, (x, y) in changed.items() if x != y}


def _flat(section: Mapping[str, object], prefix: str = "") -> dict[str, object]:
  out: dict[str, object] = {}
  for key, value in section.items():
    name = f"{prefix}{key}"
    if isinstance(value, Mapping) and value:  # an empty section is one: adapt={} adapts
      out |= _flat(value, f"{name}.")
    elif value is not None:  # as absent
      out[name] = value
  return out
