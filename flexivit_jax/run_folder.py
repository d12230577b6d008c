"""The folder of a run: one process at a time, and the config of each start, which must be that of the run."""

import contextlib
import datetime
import json
import os
import pathlib
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import filelock
import numpy as np

from flexivit_jax import errors, folders

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


@contextlib.contextmanager
def locked(workdir: pathlib.Path) -> Iterator[None]:
  """Holds the folder for this process; it is free again when the process ends, however it does.

  Raises:
    UserError: another process has it, which is named; or nothing can be written there.
  """
  holder = workdir / "holder.json"
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(workdir / ".lock", timeout=0)
    lock.acquire()
  except filelock.Timeout as e:
    raise errors.UserError(
      f"{workdir} is in use by {_holder(holder)}; wait for it, stop it, or give another --workdir."
    ) from e
  except OSError as e:
    raise errors.UserError(
      f"{workdir} cannot be written to: {e.strerror}; give another --workdir."
    ) from e
  try:
    began = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    about = {"pid": os.getpid(), "host": socket.gethostname(), "since": began}
    folders.write(holder, json.dumps(about) + "\n")
    yield
  finally:
    with contextlib.suppress(OSError):
      holder.unlink()
    lock.release()


def _holder(file: pathlib.Path) -> str:
  try:
    found = json.loads(file.read_text())
    return f"process {found['pid']} on {found['host']} since {found['since']}"
  except (OSError, ValueError, KeyError):
    return "another process"


def keep_config(
  workdir: pathlib.Path,
  settings: Mapping[str, Any],
  *,
  begun: bool,
  allow_change: bool,
  note: Callable[[str], None],
) -> None:
  """Writes config.json, and for each start that differs from the one before config.NNN.json.

  Args:
    workdir: of the run.
    settings: the config of this start.
    begun: whether there is a checkpoint: until then a config may become another.
    allow_change: of what makes a run what it is, too.
    note: is told what has changed, a line each.

  Raises:
    UserError: what makes the run what it is has changed; no config can be read; nothing can be written.
  """
  file, text = workdir / "config.json", json.dumps(settings, indent=2, default=str) + "\n"
  kept = sorted(workdir.glob("config.[0-9][0-9][0-9].json"))
  found, damaged = _last_config([p for p in (file, *reversed(kept)) if p.exists()])
  if damaged and found is None and begun and not allow_change:
    raise errors.UserError(
      f"{', '.join(map(str, damaged))}: damaged, so whether this is the run's config cannot be told; put the file back,"
      " or give --allow_config_change to go on with this config."
    )
  for path in damaged:
    note(
      f"{path} is damaged"
      + ("" if found is None else f"; {found[0].name} is the last that is whole")
    )
  if found is not None:
    lines = diff(found[1], json.loads(text))
    if not lines and kept and not damaged:
      return
    for key, line in lines.items():
      note(f"config: {line}" if begun else f"config, before anything was saved: {line}")
      if begun and not allow_change and is_identity(key, settings):
        raise errors.UserError(
          f"The config differs from that of the run in {workdir}: {'; '.join(lines.values())}. {key} makes it another"
          " run: give another --workdir, or --allow_config_change to go on all the same."
        )
  number = 1 + max((int(p.suffixes[-2][1:]) for p in kept), default=0)
  folders.write(workdir / f"config.{number:03d}.json", text)
  folders.write(file, text)


def _last_config(
  files: Sequence[pathlib.Path],
) -> tuple[tuple[pathlib.Path, dict[str, Any]] | None, list[pathlib.Path]]:
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
  size: Mapping[str, Any],
  measured: Mapping[str, Any],
  ids: Any,
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
  folders.write(file, json.dumps(found | {"ids": known}) + "\n")
  return file


def is_identity(key: str, settings: Mapping[str, Any]) -> bool:
  """Whether a run of these settings with another value under this key is another run."""
  if key == "accumulate":  # rounding, but the masks of dropout are drawn part by part
    return bool(settings.get("model", {}).get("dropout"))
  teacher = key.startswith("objective.teachers.") and key.endswith(
    ".checkpoint"
  )  # told by its sha256
  return key.partition(".")[0] in IDENTITY and not key.startswith(FREE) and not teacher


def diff(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, str]:
  """Returns for each key, "a.b.c", that differs a line that says how."""
  a, b = _flat(old), _flat(new)
  changed = {k: (a.get(k, "absent"), b.get(k, "absent")) for k in {**a, **b}}
  return {k: f"{k}: {x!r} -> {y!r}" for k, (x, y) in changed.items() if x != y}


def _flat(section: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  out: dict[str, Any] = {}
  for key, value in section.items():
    name = f"{prefix}{key}"
    if isinstance(value, Mapping) and value:  # an empty section is one: adapt={} adapts
      out |= _flat(value, f"{name}.")
    elif value is not None:  # as absent
      out[name] = value
  return out
