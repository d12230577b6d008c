"""The folder of a run: one process at a time, and the config of each start, which must be that of the run."""

import contextlib
import datetime
import json
import os
import pathlib
import re
import socket
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import filelock
import numpy as np

from flexivit_jax import errors, files
from flexivit_jax.trees import Json

# What makes a run what it is: another value would be another run under the same name. Of these, some keys are free.
IDENTITY = (
  "model", "input", "flexi", "objective", "optim", "seed", "init", "init_head_bias", "token_budget", "skip_above",
)  # fmt: skip
FREE = (
  "input.threads",
  "input.workers",
  "input.prefetch",
  "input.keep_mb",
  "input.on_error",  # A run that goes on has met none of the images that it says what to do with.
  "input.max_errors",
  "input.data.data_dir",
  "input.data.allow_empty",
)


# A path like s3://bucket is a folder of this name to `pathlib`.
_ADDRESS = re.compile(r"(gs|s3|az|hf|abfss?|hdfs|wasbs?|https?|file|ftp):/")


def check_path(workdir: pathlib.Path, *, several: bool = False) -> None:
  """Checks that a folder can be made at a path, or is there; changes nothing.

  Args:
    workdir: of the run.
    several: whether several processes share it.

  Raises:
    UserError: it is a file or lies in one, a link that leads nowhere, an address, too long, or has characters that
      cannot be got around on this system or by several processes.
  """
  shown, way = files.printable(workdir), "give another --workdir"
  if _ADDRESS.match(str(workdir)):
    raise errors.UserError(
      f"--workdir {shown} is an address; expected a folder of this machine, as one on a disk or a mounted bucket."
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


@contextlib.contextmanager
def locked(workdir: pathlib.Path) -> Iterator[None]:
  """Holds the folder for this process; it is free again when the process ends, however it does.

  A folder, and those above it, that were made for this and in which nothing was written are gone again at the end.

  Raises:
    UserError: another process has it, which is named; or nothing can be written there.
  """
  holder, file = workdir / "holder.json", workdir / ".lock"
  made = [p for p in (workdir, *workdir.parents) if not p.exists()]
  had = file.exists()
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(file, timeout=0)
    lock.acquire()
  except filelock.Timeout as e:
    raise errors.UserError(
      f"{workdir} is in use by {_holder(holder)}; wait for it, stop it, or give another --workdir."
    ) from e
  except OSError as e:
    _remove(made)
    raise errors.UserError(
      f"{workdir} cannot be written to: {e.strerror}; give another --workdir."
    ) from e
  try:
    began = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    about = {"pid": os.getpid(), "host": socket.gethostname(), "since": began}
    files.write_atomically(holder, json.dumps(about) + "\n")
    yield
  finally:
    with contextlib.suppress(OSError):
      holder.unlink()
    if not had and os.listdir(workdir) == [file.name]:
      file.unlink()
      _remove(made)
    lock.release()


def _remove(made: Sequence[pathlib.Path]) -> None:
  """Removes the folders, the innermost first, until one is not empty."""
  with contextlib.suppress(OSError):
    for folder in made:
      if folder.is_dir():
        folder.rmdir()


def _holder(file: pathlib.Path) -> str:
  try:
    found = json.loads(file.read_text())
    return f"process {found['pid']} on {found['host']} since {found['since']}"
  except (OSError, ValueError, KeyError):
    return "another process"


class Start(NamedTuple):
  """How the config of a start differs from that of the run: keys -> lines, and what is to be said; see `compare`."""

  lines: dict[str, str]
  notes: list[str]
  unknown: str | None  # why what the run's config is cannot be told
  same: bool  # nothing has to be written


def compare(workdir: pathlib.Path, settings: Json, *, begun: bool) -> Start:
  """Compares the config of a start with that of the run; changes nothing.

  Args:
    workdir: of the run.
    settings: the config of this start.
    begun: whether there is a checkpoint: until then a config may become another.
  """
  kept = [workdir / "config.json", *reversed(_kept(workdir))]
  found, damaged = _last_config([p for p in kept if p.exists()])
  last = "" if found is None else f"; {found[0].name} is the last that is whole"
  notes = [f"{path} is damaged{last}" for path in damaged]
  if found is None:
    named = ", ".join(map(str, damaged))
    unknown = f"{named}: damaged, so whether this is the run's config cannot be told"
    return Start({}, notes, unknown if damaged and begun else None, same=False)
  lines = diff(found[1], json.loads(_text(settings)))
  when = "config" if begun else "config, before anything was saved"
  notes += [f"{when}: {line}" for line in lines.values()]
  return Start(lines, notes, None, same=not lines and bool(kept[1:]) and not damaged)


def check_config(
  workdir: pathlib.Path,
  settings: Json,
  start: Start,
  *,
  allow_change: bool,
  misfit: str | None = None,
) -> None:
  """Decides whether a run that has a checkpoint goes on with a config; changes nothing.

  Args:
    workdir: of the run.
    settings: the config of this start.
    start: of `compare`.
    allow_change: of what makes a run what it is, too.
    misfit: why the checkpoint cannot be gone on from with this config, whatever is allowed.

  Raises:
    UserError: what makes the run what it is has changed; no config can be read; there is a misfit.
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


def write_config(workdir: pathlib.Path, settings: Json, start: Start) -> None:
  """Writes config.json, and for each start that differs from the one before config.NNN.json.

  Raises:
    UserError: nothing can be written.
  """
  if start.same:
    return
  number = 1 + max((int(p.suffixes[-2][1:]) for p in _kept(workdir)), default=0)
  files.write_atomically(workdir / f"config.{number:03d}.json", _text(settings))
  files.write_atomically(workdir / "config.json", _text(settings))


def _kept(workdir: pathlib.Path) -> list[pathlib.Path]:
  return sorted(workdir.glob("config.[0-9][0-9][0-9].json"))


def _text(settings: Json) -> str:
  return json.dumps(settings, indent=2, default=str) + "\n"


def _last_config(
  files: Sequence[pathlib.Path],
) -> tuple[tuple[pathlib.Path, Json] | None, list[pathlib.Path]]:
  """The first of the files that holds a config, and those before it, which are damaged."""
  damaged: list[pathlib.Path] = []
  for file in files:
    with contextlib.suppress(ValueError):
      found = json.loads(file.read_bytes())
      if isinstance(found, dict):
        return (file, found), damaged
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
  """Writes bad_step.json: what `flexivit replay` needs to look into a step that was not finite. Returns its path.

  With `writing` False, on all processes but one, it only returns the path.

  Raises:
    UserError: it cannot be written.
  """
  file = workdir / "bad_step.json"
  if not writing:
    return file
  # Numbers that JSON has not are words there.
  numbers = {k: float(v) if np.isfinite(v) else str(v) for k, v in measured.items()}
  found = {"step": step, "size": dict(size), "measured": numbers}
  known = None if ids is None else np.asarray(ids).tolist()
  files.write_atomically(file, json.dumps(found | {"ids": known}) + "\n")
  return file


def is_identity(key: str, settings: Json) -> bool:
  """Whether a run of these settings with another value under this key is another run."""
  if key == "accumulate":  # rounding, but the masks of dropout are drawn part by part
    return bool(settings.get("model", {}).get("dropout"))
  teacher = key.startswith("objective.teachers.") and key.endswith(
    ".checkpoint"
  )  # told by its sha256
  return key.partition(".")[0] in IDENTITY and not key.startswith(FREE) and not teacher


def diff(old: Json, new: Json) -> dict[str, str]:
  """Returns for each key, "a.b.c", that differs a line that says how."""
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
