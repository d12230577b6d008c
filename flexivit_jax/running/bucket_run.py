"""A run whose folder is in a bucket: it writes a folder of this machine, and what changes there is copied at once.

The bucket has the files under their own names. Three things are added: `index.json` names the files that belong to the
run and is written after them, so that a checkpoint counts once all of it is there; `lock.json` says who writes;
`metrics.jsonl.parts/` holds the rows, since an object cannot be appended to. A run that was killed goes on, on any
machine, from what the index names: a state in which a kill could have left a local run.
"""

import contextlib
import functools
import hashlib
import json
import os
import pathlib
import secrets
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent import futures
from typing import NamedTuple

import filelock
import xxhash

from flexivit_jax import errors, files, storage
from flexivit_jax.running import manifest
from flexivit_jax.running.bucket_lock import NAME as LOCK, Lock

INDEX = "index.json"
ROWS = "metrics.jsonl"
_PARTS = f"{ROWS}.parts/"
_PART_BYTES = 2**18  # of rows, from which on they go into another object
_ROOTS = ("checkpoints", "best")  # in this order, see `Mirror.copy`
_MANIFEST = f"{manifest.FOLDER}/{manifest.NAME}"
_NOT_COPIED = (".lock", "holder.json")
_LOOK_S, _COPY_S = 0.5, 5.0  # between looks for checkpoints, and between copies of the rest
_LARGE = 2**20  # bytes from which on a file that grows is copied again when it has grown by a tenth
_AT_ONCE = 8  # objects that are copied at the same time

Choice = Callable[[Sequence[str]], Sequence[str]]


# --- reading: what is at an address, as a path of this machine ---


def everything(names: Sequence[str]) -> Sequence[str]:
  """All names of a folder."""
  return names


def newest_checkpoint(names: Sequence[str]) -> Sequence[str]:
  """Those of the newest checkpoint of a run or of its checkpoints/; all, where there is none."""
  for root in ("checkpoints/", ""):
    steps = _steps(names, root)
    if steps:
      return [name for name in names if name.startswith(f"{root}{max(steps)}/")]
  return names


def checkpoint(step: int) -> Choice:
  """Those of one checkpoint of a run."""

  def of_step(names: Sequence[str]) -> Sequence[str]:
    return [name for name in names if name.startswith(f"checkpoints/{step}/")]

  return of_step


def without_checkpoints(names: Sequence[str]) -> Sequence[str]:
  """What a report reads: no checkpoints, and no event files."""
  return [name for name in names if not name.startswith(("checkpoints/", "best/", "tb/"))]


def fetched(path: str | os.PathLike[str], choice: Choice = everything) -> pathlib.Path:
  """Returns the path of a copy of what is at an address, in the cache folder; a path of this machine as it is.

  An object is copied once for each of its versions.

  Args:
    path: a path; or the address of a file, of a run, or of another folder.
    choice: which names of a folder are copied.

  Raises:
    UserError: there is nothing; or it cannot be read.
  """
  url = storage.address(path)
  if url is None:
    return pathlib.Path(path)
  above, _, last = url.rpartition("/")
  place = _cache(url) / choice.__name__
  place.mkdir(parents=True, exist_ok=True)
  with filelock.FileLock(place / ".lock"):
    if above.count("/") > 2:
      parent = storage.Bucket(above)
      if (entry := parent.stat(last)) is not None:
        _copy_here(parent, {last: entry}, place)
        return place / last
    bucket = storage.Bucket(url)
    entries = bucket.entries()
    names = choice(_names(bucket, entries))
    if not names:
      raise errors.UserError(f"There is nothing at {url}; expected a file, a run, or a folder.")
    _copy_here(bucket, _entries_of(bucket, names, entries), place / last)
  return place / last


def _cache(url: str) -> pathlib.Path:
  return files.cache_folder() / "buckets" / hashlib.sha256(url.encode()).hexdigest()[:16]


def _steps(names: Iterable[str], root: str) -> list[int]:
  """Returns the steps of the checkpoints below a root that are complete."""
  ends = (name.removeprefix(root) for name in names if name.startswith(root))
  return [int(end.split("/")[0]) for end in ends if _is_sealed(end)]


def _is_sealed(name: str) -> bool:
  step, _, rest = name.partition("/")
  return step.isdigit() and rest == _MANIFEST


def _names(bucket: storage.Bucket, entries: Mapping[str, storage.Entry]) -> list[str]:
  """Returns the names that belong to a run: those of its index, or of a listing, where there is no index.

  Without an index it is a copy that others made; of it, a checkpoint without a manifest is not complete.
  """
  if (index := bucket.read(INDEX)) is not None:
    try:
      return sorted(json.loads(index)["names"])
    except (ValueError, KeyError, TypeError) as e:
      raise manifest.Damaged(f"{bucket.of(INDEX)} is damaged: {type(e).__name__}.") from e
  names = [n for n in entries if n != LOCK and not n.rpartition("/")[2].startswith("probe.")]
  whole = {root: set(_steps(names, f"{root}/")) for root in _ROOTS}

  def is_whole(name: str) -> bool:
    root, _, rest = name.partition("/")
    step = rest.partition("/")[0]
    return root not in whole or (step.isdigit() and int(step) in whole[root])

  return sorted(filter(is_whole, names))


def _entries_of(
  bucket: storage.Bucket, names: Sequence[str], entries: Mapping[str, storage.Entry]
) -> dict[str, storage.Entry]:
  """Returns the entries of names; those that a listing does not have yet are asked for one by one.

  One that is gone is left out: of a checkpoint, its manifest misses it.
  """
  asked = {name: entries.get(name) or bucket.stat(name) for name in names}
  return {name: entry for name, entry in asked.items() if entry is not None}


def _copy_here(
  bucket: storage.Bucket, entries: Mapping[str, storage.Entry], folder: pathlib.Path
) -> None:
  """Makes a folder hold these objects and no others; those that were copied before are left as they are."""
  record = folder.with_name(f"{folder.name}.versions.json")
  try:
    known = json.loads(record.read_text())
  except (OSError, ValueError):
    known = {}
  wanted = {
    name: [entry.size, *entry.version] for name, entry in entries.items() if ".." not in name
  }
  folder.parent.mkdir(parents=True, exist_ok=True)
  record.unlink(missing_ok=True)  # until all is there
  rows = sorted(name for name in wanted if name.startswith(_PARTS))
  for path in [p for p in folder.rglob("*") if p.is_file()] if folder.is_dir() else []:
    name = path.relative_to(folder).as_posix()
    if name not in wanted and not (name == ROWS and rows):
      path.unlink()
  # Not empty ones either: Orbax takes the folder of a step for a checkpoint.
  for path in sorted((p for p in folder.rglob("*") if p.is_dir()), reverse=True):
    with contextlib.suppress(OSError):  # it is not empty
      path.rmdir()

  def copy(name: str) -> None:
    file = folder / name if folder.name != name else folder
    there = file.is_file() and file.stat().st_size == wanted[name][0]
    if not there or known.get(name) != wanted[name]:
      bucket.download(name, file)

  with futures.ThreadPoolExecutor(_AT_ONCE) as pool:
    list(pool.map(copy, wanted))
  if rows:
    joined = b""
    for name in rows:
      joined = joined[: int(name.removeprefix(_PARTS))] + (folder / name).read_bytes()
    files.write_atomically(folder / ROWS, joined)
  files.write_atomically(record, json.dumps(wanted))


# --- writing: a folder of this machine, copied into the bucket as it changes ---


class _Copied(NamedTuple):
  """A file as it was when it was copied."""

  changed: int  # nanoseconds
  size: int
  inode: int


class Mirror:
  """Copies a run's folder into its bucket, in a thread; from `opened`.

  Args:
    bucket: of the run.
    folder: of this machine, which holds what the bucket does.
    lock: held as long as this one writes.
    names: those of the index.

  Attributes:
    folder: the run's folder on this machine.
  """

  def __init__(
    self, bucket: storage.Bucket, folder: pathlib.Path, lock: Lock, names: Iterable[str]
  ):
    self.folder = folder
    self._bucket, self._lock = bucket, lock
    self._links = folder.with_name(f"{folder.name}.uploading")
    self._index: set[str] | None = set(names)
    self._files = _files(folder)
    self._steps = {step: _seal(folder / step) for step in _complete(folder)}
    self._parts = _parts(_whole_rows(folder / ROWS))
    self._last_copy = 0.0
    self._written = [0, 0]  # objects, bytes
    self._error: errors.UserError | None = None
    self._ended = threading.Event()
    self._thread = threading.Thread(target=self._run, name="copies into a bucket", daemon=True)
    self._thread.start()

  def check(self) -> None:
    """Raises a UserError if something could not be copied: what is trained from here on would be lost."""
    if self._error is not None:
      raise self._error

  def close(self) -> None:
    """Copies what is left; raises as `check` does."""
    self._ended.set()
    self._thread.join()
    self.check()
    self.copy(final=True)
    shutil.rmtree(self._links, ignore_errors=True)
    objects, size = self._written
    print(
      f"{self._bucket.url}: {objects} objects written, {size / 2**20:.1f} MiB;"
      f" {self._bucket.repeated} requests repeated",
      file=sys.stderr,
      flush=True,
    )

  def copy(self, *, final: bool = False) -> None:
    """Copies what has changed, if it is due.

    Checkpoints are looked for first, then RUN/best, then the rest is read: whatever a checkpoint knows of is copied
    with it. The index is written last, and what it no longer names is deleted after that.

    Args:
      final: nothing changes any more: everything is copied, and files that grew by little too.

    Raises:
      UserError: an object cannot be written; or the lock is lost.
    """
    seals = {step: _seal(self.folder / step) for step in _complete(self.folder)}
    new = [step for step, seal in seals.items() if seal and self._steps.get(step) != seal]
    due = time.monotonic() - self._last_copy > _COPY_S
    if not new and not due and not final:
      return
    linked = {step: seal for step in new if (seal := self._link(step))}
    gone = {step for step in self._steps if step not in seals}
    present = _files(self.folder)
    changed = [
      name
      for name, now in present.items()
      if (old := self._files.get(name)) != now and (final or linked or _is_due(old, now))
    ]
    rows = _whole_rows(self.folder / ROWS)
    parts = _parts(rows, self._parts)
    todo: list[Callable[[], None]] = []
    for name in changed:
      todo.append(functools.partial(self._upload, self.folder / name, name))
    for start, total in parts.items():
      if self._parts.get(start) != total:
        # What follows the end of a part is in the next one, too: whichever is read, no row is missing.
        todo.append(functools.partial(self._write, f"{_PARTS}{start:012d}", rows[start:]))
    if todo or linked or gone or self._files.keys() - present.keys() or self._index is None:
      self._commit(todo, linked, gone, present, changed, parts)
    self._last_copy = time.monotonic()

  def _commit(
    self,
    todo: list[Callable[[], None]],
    linked: Mapping[str, str],
    gone: set[str],
    present: Mapping[str, _Copied],
    changed: Sequence[str],
    parts: Mapping[int, int],
  ) -> None:
    index = set(self._index or ())
    # A step that is written once more: until all of it is there, it is none.
    if again := [step for step in linked if step in self._steps]:
      self._write_index(
        {name for name in index if not name.startswith(tuple(f"{s}/" for s in again))}
      )
      index = set(self._index or ())
    for step in linked:
      folder = self._links / step
      names = [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]
      todo += [functools.partial(self._upload, folder / name, f"{step}/{name}") for name in names]
      index |= {f"{step}/{name}" for name in names}
    pool = futures.ThreadPoolExecutor(_AT_ONCE)
    try:
      for done in [pool.submit(call) for call in todo]:
        done.result()
    finally:
      pool.shutdown(
        cancel_futures=True
      )  # after an error: each of the others would take its time to fail
    removed = {name for name in self._files if name not in present}
    removed |= {f"{_PARTS}{start:012d}" for start in self._parts if start not in parts}
    removed |= (
      {n for n in index if n.startswith(tuple(f"{step}/" for step in gone))} if gone else set()
    )
    index -= removed
    index |= set(changed) | {f"{_PARTS}{start:012d}" for start in parts}
    if index != self._index:
      self._write_index(index)
    for name in sorted(removed):
      self._bucket.delete(name)
    self._files = {
      name: now if name in changed or self._files.get(name) == now else self._files[name]
      for name, now in present.items()
      if name in changed or name in self._files
    }
    self._parts = dict(parts)
    self._steps = {s: seal for s, seal in self._steps.items() if s not in gone} | dict(linked)
    for step in linked:
      shutil.rmtree(self._links / step, ignore_errors=True)

  def _link(self, step: str) -> str:
    """Links the files of a checkpoint, which the run may delete before they are copied; "" if it has just done so."""
    source, to = self.folder / step, self._links / step
    shutil.rmtree(to, ignore_errors=True)
    try:
      shutil.copytree(source, to, copy_function=os.link)
      sealed = manifest.read(to / manifest.FOLDER)
      whole = all((to / name).stat().st_size == size for name, (size, _) in sealed.files.items())
    except (OSError, manifest.Damaged):  # shutil.Error is an OSError
      whole = False
    return _seal(to) if whole else ""

  def _upload(self, file: pathlib.Path, name: str) -> None:
    self._lock.check()
    try:
      size = file.stat().st_size
      self._bucket.upload(file, name)
    except FileNotFoundError:  # replaced or deleted in this moment: the next copy knows
      return
    self._count(size)

  def _write(self, name: str, content: bytes) -> None:
    self._lock.check()
    self._bucket.write(name, content)
    self._count(len(content))

  def _write_index(self, names: set[str]) -> None:
    self._index = None  # unknown, if the write fails
    self._write(INDEX, (json.dumps({"names": sorted(names)}, indent=0) + "\n").encode())
    self._index = names

  def _count(self, size: int) -> None:
    self._written = [self._written[0] + 1, self._written[1] + size]

  def _run(self) -> None:
    while not self._ended.wait(_LOOK_S):
      try:
        self.copy()
      except errors.UserError as e:
        self._error = e
        return
      except Exception as e:  # A thread's exception would be lost.
        self._error = errors.UserError(
          f"{self._bucket.url} could not be written: {type(e).__name__}: {e}. What was copied before is there."
        )
        return


def folder_of(url: str) -> pathlib.Path:
  """Returns the folder of this machine that a run in a bucket writes."""
  return _cache(url) / "run" / url.rpartition("/")[2]


@contextlib.contextmanager
def opened(url: str) -> Iterator[Mirror]:
  """Takes a run in a bucket: checks that it can be written, locks it, and copies what it holds into the cache folder.

  Raises:
    UserError: it cannot be written or read; another process holds the lock; at the end: something is not copied.
  """
  bucket = storage.Bucket(url)
  bucket.check(f"probe.{secrets.token_hex(8)}")
  with _held(bucket) as lock:
    folder = folder_of(url)
    entries = bucket.entries()
    names = _names(bucket, entries)
    _copy_here(bucket, _entries_of(bucket, names, entries), folder)
    # The copy is about to change, so that the next start has to look at all of it.
    folder.with_name(f"{folder.name}.versions.json").unlink()
    shutil.rmtree(folder / _PARTS, ignore_errors=True)
    for name in entries.keys() - set(names) - {INDEX, LOCK}:  # of a copy that was interrupted
      bucket.delete(name)
    folder.mkdir(parents=True, exist_ok=True)
    mirror = Mirror(bucket, folder, lock, names)
    try:
      yield mirror
    except BaseException:
      try:
        mirror.close()
      except errors.UserError as e:
        print(str(e), file=sys.stderr, flush=True)
      raise
    mirror.close()


@contextlib.contextmanager
def _held(bucket: storage.Bucket) -> Iterator[Lock]:
  lock = Lock(bucket)
  try:
    yield lock
  finally:
    lock.release()


def _complete(folder: pathlib.Path) -> list[str]:
  """Returns the checkpoints that are complete, e.g. "checkpoints/20"."""
  found = []
  for root in _ROOTS:
    with contextlib.suppress(OSError):
      found += [f"{root}/{p.name}" for p in (folder / root).iterdir() if p.name.isdigit()]
  return found


def _seal(step: pathlib.Path) -> str:
  """Returns the manifest of a checkpoint as text; "" if there is none."""
  try:
    return (step / _MANIFEST).read_text(errors="replace")
  except OSError:
    return ""


def _files(folder: pathlib.Path) -> dict[str, _Copied]:
  """Returns the files of a run that are copied as they are: not its checkpoints, rows, locks and unfinished files."""
  found = {}
  for path, folders, names in os.walk(folder):
    if pathlib.Path(path) == folder:
      folders[:] = [name for name in folders if name not in (*_ROOTS, "processes")]
    for name in names:
      file = pathlib.Path(path, name)
      relative = file.relative_to(folder).as_posix()
      if relative not in (*_NOT_COPIED, ROWS) and not name.endswith(".tmp"):
        with contextlib.suppress(OSError):
          about = file.stat()
          found[relative] = _Copied(about.st_mtime_ns, about.st_size, about.st_ino)
  return found


def _is_due(old: _Copied | None, now: _Copied) -> bool:
  """Whether a file is copied between checkpoints: one that is appended to costs as much each time as all of it."""
  grows = old is not None and old.inode == now.inode and now.size > _LARGE
  return not grows or now.size > 1.1 * old.size


def _whole_rows(file: pathlib.Path) -> bytes:
  """Returns the rows of metrics.jsonl; the last one may be being written, and is then waited for."""
  content = b""
  for _ in range(20):
    with contextlib.suppress(OSError):
      content = file.read_bytes()
    last = content[:-1].rpartition(b"\n")[2]
    with contextlib.suppress(ValueError):
      if not content or (content.endswith(b"\n") and isinstance(json.loads(last), dict)):
        return content
    time.sleep(0.01)
  return content[: content.rfind(b"\n", 0, -1) + 1]  # of a full disk


def _parts(rows: bytes, before: Mapping[int, int] | None = None) -> dict[int, int]:
  """Divides rows into objects: returns {first byte: checksum}.

  Args:
    rows: the content of metrics.jsonl.
    before: the division of the last copy, which is kept where rows still begin there.
  """
  starts = [
    s for s in sorted(before or ()) if s == 0 or (s < len(rows) and rows[s - 1 : s] == b"\n")
  ]
  if not rows:
    return {}
  starts = starts or [0]
  if len(rows) - starts[-1] > _PART_BYTES:
    starts.append(rows.rfind(b"\n", 0, -1) + 1)  # the last row may still be added to
  ends = [*starts[1:], len(rows)]
  return {s: xxhash.xxh3_64_intdigest(rows[s:e]) for s, e in zip(starts, ends, strict=True)}
