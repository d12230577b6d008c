"""Checks of a run folder: that what a run does with its files works there. Leaves nothing behind."""

import contextlib
import os
import pathlib
import shutil
import time
import uuid
from collections.abc import Sequence

import filelock

from flexivit_jax import files, storage
from flexivit_jax.doctor.findings import wrong
from flexivit_jax.running import peers, run_folder

FREE = 2**30  # bytes; a checkpoint of ViT-S with its optimizer takes a quarter
CLOCK_S = 2.0
_SIZE = 2**22
_ELSEWHERE = "give another --workdir"


def in_bucket(workdir: pathlib.Path) -> bool:
  """Whether a run folder is an address in a bucket."""
  return storage.address(workdir) is not None


def check(workdir: pathlib.Path, new: list[pathlib.Path], *, several: bool = False) -> str:
  """Writes, reads, renames, locks and deletes a file in a run folder, or an object in a bucket; returns the speed.

  Args:
    workdir: the folder.
    new: gets the folders that are created for it, the innermost first; `remove` them when no process needs them.
    several: whether several processes share it.

  Raises:
    NotGreenError: what does not work there.
    UserError: it cannot be a run folder.
  """
  if url := storage.address(workdir):
    return _check_bucket(url)
  run_folder.check_path(workdir, several=several)
  name = f".doctor-{uuid.uuid4().hex}"
  probe, moved, lock = (workdir / f"{name}{end}" for end in ("", ".moved", ".lock"))
  try:
    new += [path for path in (workdir, *workdir.parents) if not path.exists()]
    return _check(workdir, probe, moved, lock)
  except OSError as e:
    where = files.printable(pathlib.Path(e.filename or workdir))
    wrong(
      f"{where}: {e.strerror or e}", f"free space or mend its rights and quota, or {_ELSEWHERE}"
    )
  finally:
    for path in (probe, moved, lock):
      with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)


def _check_bucket(url: str) -> str:
  """Does what a run does at its start there; returns how fast it was."""
  run_folder.check_bucket(url)
  bucket = storage.Bucket(url, attempts=3)  # the reason has to be known within the check's time
  written, read = bucket.check(f"probe.{uuid.uuid4().hex}", os.urandom(_SIZE))
  mib = _SIZE / 2**20
  return (
    f"{url}: {mib / written:.0f} MiB/s written, {mib / read:.0f} read, in one request; conditions and deletes;"
    f" {bucket.repeated} requests repeated"
  )


def _check(
  workdir: pathlib.Path, probe: pathlib.Path, moved: pathlib.Path, lock: pathlib.Path
) -> str:
  workdir.mkdir(parents=True, exist_ok=True)
  free = shutil.disk_usage(workdir).free
  if free < FREE:
    wrong(
      f"{files.printable(workdir)} has {free / 2**20:.0f} MiB left",
      f"free {FREE / 2**30:g} GiB for checkpoints, or {_ELSEWHERE}",
    )
  data = os.urandom(_SIZE)
  begun = time.perf_counter()
  with probe.open("wb") as file:
    file.write(data)
    file.flush()
    os.fsync(file.fileno())
  written = time.perf_counter() - begun
  ahead = probe.stat().st_mtime - time.time()
  begun = time.perf_counter()
  if probe.read_bytes() != data:
    wrong(
      f"{files.printable(workdir)} returns other bytes than were written",
      f"its file system or disk is damaged; {_ELSEWHERE}",
    )
  read = time.perf_counter() - begun
  moved.write_bytes(b"old")
  os.replace(probe, moved)
  if probe.exists() or moved.read_bytes() != data or moved.name not in os.listdir(workdir):
    wrong(
      f"{files.printable(workdir)} does not replace a file by a rename",
      f"files would be lost at a crash; {_ELSEWHERE}, or mount it with another driver",
    )
  if not _excludes(lock):
    wrong(
      f"{files.printable(workdir)} gives one lock to two owners",
      f"two runs could write one folder; mount it with locks (NFS: nfsvers=4, without nolock), or {_ELSEWHERE}",
    )
  moved.unlink()
  if moved.exists():
    wrong(
      f"{files.printable(workdir)} keeps a deleted file", f"{_ELSEWHERE}, or look at its server"
    )
  if abs(ahead) > CLOCK_S:
    wrong(
      f"the file system of {files.printable(workdir)} has a clock that is {ahead:+.0f} s from this host's",
      "set both by NTP (timedatectl set-ntp true)",
    )
  mib = _SIZE / 2**20
  return (
    f"{files.printable(workdir)}: {mib / written:.0f} MiB/s written, {mib / read:.0f} read; renames, locks and deletes;"
    f" {free / 2**30:.0f} GiB free"
  )


def _excludes(lock: pathlib.Path) -> bool:
  """Whether a second owner of a lock is refused."""
  with filelock.FileLock(lock, timeout=0):
    try:
      with filelock.FileLock(lock, timeout=0):
        return False
    except filelock.Timeout:
      return True


def remove(folders: Sequence[pathlib.Path]) -> None:
  """Removes folders, the innermost first, as far as they are empty."""
  with contextlib.suppress(OSError):
    for path in folders:
      path.rmdir()


def mark(workdir: pathlib.Path) -> int:
  """Writes a random number into the folder, which other processes look for with `sees`; returns it."""
  return peers.mark(_marks(workdir))


def sees(workdir: pathlib.Path, number: int) -> bool:
  """Whether this process sees the number that another wrote; waits for slow network folders."""
  return peers.sees(_marks(workdir), number)


def unmark(workdir: pathlib.Path) -> None:
  """Removes what `mark` wrote."""
  peers.clear(_marks(workdir))


def _marks(workdir: pathlib.Path) -> pathlib.Path:
  return workdir / ".doctor"
