"""Shards of a data set in a bucket: local files of which only those records are there that were asked for.

A local file has the size of its object, and holes (it is sparse) where nothing was fetched. array_record reads records
from it and compares their hashes, as it does in a local folder. A second file has a byte for each chunk of records
that is there. Both are kept for the next run; the oldest go when they are larger than the bound.
"""

import bisect
import collections
import concurrent.futures
import contextlib
import functools
import hashlib
import mmap
import os
import pathlib
import queue
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar, final

import filelock

from flexivit_jax import files, storage
from flexivit_jax.data.record_layout import Layout, LayoutError, layout_of
from flexivit_jax.errors import UserError

CACHE_GB = 50.0
READER = "readahead_buffer_size:0,max_parallelism:0"  # array_record's advice for random access
# Neighbours that are fetched with a record where they all fit into the cache: docs/performance.md has what others cost.
PIECE = 2**18
_REQUESTS = 64  # at a time; more than the cores, for they wait
_OPEN = 256  # shards that are open at a time
_SMALL = 2**26  # bytes of a file that is fetched as a whole
_Result = TypeVar("_Result")
_Places = Mapping[str, Sequence[int]]  # name of a shard -> numbers of its records


@final
class RemoteShards:
  """The shards of a data set below an address; a copy in another process opens the files itself.

  Args:
    url: the address, s3://BUCKET/FOLDER or gs://BUCKET/FOLDER.
    below: a folder in it, to which the listing is limited.
    cache_gb: GB of local files that are kept.
    piece: bytes around a record that are fetched with it.

  Attributes:
    url: the address.
    entries: the objects, by their names relative to the address.

  Raises:
    UserError: there is nothing; or it cannot be read.
  """

  def __init__(self, url: str, *, below: str = "", cache_gb: float = CACHE_GB, piece: int = PIECE):
    if not 0 < cache_gb < 1e6:
      raise UserError(f"cache_gb={cache_gb}; expected GB of local files, as {CACHE_GB:g}.")
    self.url, self._limit, self._piece = url, int(cache_gb * 1e9), piece
    self._start()
    self.entries = self._bucket.entries(below)
    if not self.entries:
      place = self._bucket.of(below)
      raise UserError(f"There is nothing at {place}; expected the files of a data set.")
    self._expected: dict[str, int] = {}

  def __getstate__(self) -> dict[str, Any]:
    names = ("url", "entries", "_limit", "_piece", "_expected")
    return {name: getattr(self, name) for name in names}

  def __setstate__(self, state: dict[str, Any]) -> None:
    self.__dict__.update(state)
    self._start()

  def _start(self) -> None:
    self._bucket = storage.Bucket(self.url)
    self._folder = files.cache_folder() / "data"
    self._lock, self._coming = threading.RLock(), threading.Lock()
    self._opened: collections.OrderedDict[str, concurrent.futures.Future[_Shard]] = (
      collections.OrderedDict()
    )
    self._fetching: dict[tuple[int, int], concurrent.futures.Future[None]] = {}
    self._unseen = 0  # bytes that came since the bound was looked at

  def expect(self, records: Mapping[str, int]) -> None:
    """Sets the shards of the data set, and how many records each has; only these are read.

    Where they do not all fit into the cache, neighbours of a record would be gone before they are needed.

    Raises:
      UserError: one is missing.
    """
    for name in records:
      if name not in self.entries:
        raise UserError(f"{self.of(name)} is missing.")
    self._expected = dict(records)
    if sum(self.entries[name].size for name in records) > self._limit:
      self._piece = 1

  def size(self, name: str) -> int | None:
    """Returns the bytes of an object; None: there is none."""
    return self.entries[name].size if name in self.entries else None

  def of(self, name: str) -> str:
    """The address of an object."""
    return f"{self.url}/{name}"

  def copies(self, names: Sequence[str]) -> pathlib.Path:
    """Returns a local folder with copies of these small objects, each version of which is fetched once.

    Raises:
      UserError: one is too large for a file that describes data; or it has changed.
    """
    about = [(name, *self.entries[name]) for name in sorted(names)]
    folder = self._folder / "files" / _digest(self.url, about)
    done = folder / ".complete"
    if done.exists():
      return folder
    jobs = [_start_job(functools.partial(self._copy, name, folder)) for name in names]
    for job in jobs:
      job.result()
    done.touch()
    return folder

  def _copy(self, name: str, folder: pathlib.Path) -> None:
    entry, path = self.entries[name], folder / name
    if entry.size > _SMALL:
      raise UserError(
        f"{self.of(name)} has {entry.size:,} bytes; expected a small file that describes the data."
      )
    content = self._read(name, 0, entry.size) if entry.size else b""
    with files.write_errors(path):
      path.parent.mkdir(parents=True, exist_ok=True)
    files.write_atomically(path, content, unique=True)

  # --- records ---

  def begin(self, places: _Places) -> None:
    """Begins to fetch records; does not wait for them."""
    for name, numbers in places.items():
      self._open(name).add_done_callback(functools.partial(self._begin, tuple(numbers)))

  def _begin(self, numbers: Sequence[int], shard: "concurrent.futures.Future[_Shard]") -> None:
    if not shard.exception():
      self._missing(shard.result(), numbers)

  def read(self, name: str, numbers: Sequence[int]) -> list[bytes]:
    """Returns records of a shard, in the order of the numbers.

    Raises:
      ValueError: the shard is damaged.
      UserError: it cannot be fetched, has changed, or there is no room for it.
    """
    shard = self._open(name).result()
    if (
      shard.is_deleted()
    ):  # The cache was full; what is open can still be read, and no one else finds it.
      with self._lock:
        self._opened.pop(name, None)
      shard = self._open(name).result()
    self._wait(shard, numbers)
    try:
      return shard.read(numbers)
    except RuntimeError:
      # Of array_record. A record may have been lost here, by a power failure or on this disk: fetched once more, it
      # tells which copy is damaged.
      shard.forget(numbers)
      self._wait(shard, numbers)
    try:
      return shard.read(numbers)
    except RuntimeError as e:
      raise ValueError(str(e)) from e

  def _wait(self, shard: "_Shard", numbers: Sequence[int]) -> None:
    for job in self._missing(shard, numbers):
      job.result()

  def _open(self, name: str) -> "concurrent.futures.Future[_Shard]":
    with self._lock:
      job = self._opened.get(name)
      # Of a deleted one (the cache was full) what is open can still be read, and no one else finds it.
      if job is None or (job.done() and (job.exception() or job.result().is_deleted())):
        job = self._opened[name] = _start_job(functools.partial(self._opening, name))
      self._opened.move_to_end(name)
      while len(self._opened) > _OPEN:
        self._opened.popitem(last=False)
      return job

  def _opening(self, name: str) -> "_Shard":
    entry = self.entries[name]
    path = self._folder / "shards" / f"{_digest(self.url, (name, *entry))}.array_record"
    with self._room(path):
      path.parent.mkdir(parents=True, exist_ok=True)
      with self._exclusive():
        shard = _Shard.there(name, path)
      if shard is None:
        shard = self._make(name, path)
    expected = self._expected.get(name)
    if shard.layout and expected not in (None, shard.layout.records):
      raise ValueError(f"it has {shard.layout.records} records, written were {expected}")
    return shard

  def _make(self, name: str, path: pathlib.Path) -> "_Shard":
    """Makes the local files of a shard, with its end, which says where the records are."""
    size = self.entries[name].size
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
      part = pathlib.Path(file.name)
      try:
        file.truncate(size)

        def read(start: int, end: int) -> bytes:
          content = self._read(name, start, end)
          os.pwrite(file.fileno(), content, start)
          return content

        layout = _layout(size, read)
        with self._exclusive():
          if (shard := _Shard.there(name, path)) is None:  # else another process was faster
            part.replace(path)
            files.write_atomically(_map_of(path), bytes(_chunks(layout)), unique=True)
            shard = _Shard.there(name, path)
      finally:
        part.unlink(missing_ok=True)
    assert shard is not None
    self._bound(size - shard.bytes_of(0, shard.chunks)[1])
    return shard

  def _missing(
    self, shard: "_Shard", numbers: Sequence[int]
  ) -> "list[concurrent.futures.Future[None]]":
    """Returns the jobs that fetch those of the records which are not there; starts them where they are not yet."""
    jobs = {}
    for first, end in {shard.around(n, self._piece) for n in numbers if not shard.has(n)}:
      key = (id(shard), first)
      with self._lock:
        if (job := self._fetching.get(key)) is None:
          job = _start_job(functools.partial(self._fetch, shard, first, end, key))
          self._fetching[key] = job
      jobs[first] = job
    return list(jobs.values())

  def _fetch(self, shard: "_Shard", first: int, end: int, key: tuple[int, int]) -> None:
    try:
      chunks = [chunk for chunk in range(first, end) if not shard.map[chunk]]
      if not chunks:
        return
      begin, stop = shard.bytes_of(chunks[0], chunks[-1] + 1)
      with self._room(shard.path):
        for start in range(begin, stop, storage.PIECE):
          content = self._read(shard.name, start, min(start + storage.PIECE, stop))
          os.pwrite(shard.file, content, start)
        shard.map[chunks[0] : chunks[-1] + 1] = b"\1" * (chunks[-1] + 1 - chunks[0])
        self._bound(stop - begin)
    finally:
      with self._lock:
        self._fetching.pop(key, None)

  def _read(self, name: str, start: int, end: int) -> bytes:
    return self._bucket.read_range(name, start, end, self.entries[name].version)

  # --- the bound ---

  def _bound(self, more: int) -> None:
    """Deletes the shards that were written to the longest ago, where all are larger than the bound."""
    with self._lock:
      self._unseen += more
      if self._unseen < self._limit // 50:
        return
      self._unseen = 0
    with self._exclusive():
      found: list[tuple[float, int, pathlib.Path]] = []
      for path in (self._folder / "shards").glob("*.array_record"):
        with contextlib.suppress(FileNotFoundError):
          state = path.stat()
          found.append((state.st_mtime, state.st_blocks * 512, path))
      total = sum(size for _, size, _ in found)
      for _, size, path in sorted(found):
        if total <= self._limit * 0.98:
          break
        path.unlink(missing_ok=True)
        _map_of(path).unlink(missing_ok=True)
        total -= size

  @contextlib.contextmanager
  def _exclusive(self) -> Iterator[None]:
    """A lock of all threads and processes that use the cache, while files come or go."""
    with self._coming, filelock.FileLock(self._folder / ".lock", poll_interval=0.005):
      yield

  @contextlib.contextmanager
  def _room(self, path: pathlib.Path) -> Iterator[None]:
    """Names the cache where it cannot be written to."""
    try:
      yield
    except OSError as e:
      raise UserError(
        f"{path.parent} cannot keep records of {self.url}: {e.strerror or e}. Make room, set FLEXIVIT_CACHE to a folder"
        f" on a larger disk, or take less of it: cache_gb (of the data, now {self._limit / 1e9:g}) is the bound."
      ) from e


@final
class _Shard:
  """The local files of a shard.

  Attributes:
    name: of the object.
    path: of the local file.
    layout: where its records are; None: unknown, so that it is fetched as a whole.
    file: the descriptor of the open file.
    map: a byte for each chunk, 1 if it is there.
    chunks: number of them.
  """

  def __init__(self, name: str, path: pathlib.Path, map_path: pathlib.Path):
    self.name, self.path = name, path
    self.file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    weakref.finalize(self, os.close, self.file)
    with map_path.open("r+b") as file:
      self.map = mmap.mmap(file.fileno(), 0)
    self._size = os.fstat(self.file).st_size
    layout = _layout(self._size, self._pread)
    self.layout = layout if layout and len(self.map) == _chunks(layout) else None
    self.chunks = _chunks(self.layout)
    self._lock = threading.Lock()
    self._reader: Any = None

  @classmethod
  def there(cls, name: str, path: pathlib.Path) -> "_Shard | None":
    """Opens the files of a shard; None: they are not there."""
    try:
      shard = cls(name, path, _map_of(path))
    except FileNotFoundError:
      return None
    os.utime(path)  # Those that were used the longest ago go first.
    return shard

  def has(self, number: int) -> bool:
    """Whether a record is there."""
    return self.map[self._chunk(number)] == 1

  def around(self, number: int, piece: int) -> tuple[int, int]:
    """Returns the chunks (first, end) that are fetched with a record."""
    if self.layout is None:
      return 0, 1
    chunk, offsets = self._chunk(number), self.layout.offsets
    if piece <= 1:
      return chunk, chunk + 1
    place = int(offsets[chunk]) // piece * piece
    first = bisect.bisect_left(offsets, place)
    return first, min(bisect.bisect_left(offsets, place + piece), self.chunks)

  def bytes_of(self, first: int, end: int) -> tuple[int, int]:
    """Returns where the bytes of chunks are."""
    if self.layout is None:
      return 0, self._size
    return int(self.layout.offsets[first]), int(self.layout.offsets[end])

  def read(self, numbers: Sequence[int]) -> list[bytes]:
    """Returns records that are there; array_record's RuntimeError for one that is damaged."""
    from array_record.python.array_record_module import ArrayRecordReader

    with self._lock:
      if self._reader is None:
        self._reader = ArrayRecordReader(str(files.of_descriptor(self.file)), READER)
      reader = self._reader
    return reader.read(list(numbers))

  def forget(self, numbers: Sequence[int]) -> None:
    """Takes records for missing."""
    with self._lock:
      self._reader = None
    for number in numbers:
      self.map[self._chunk(number)] = 0

  def is_deleted(self) -> bool:
    """Whether the files are no longer in the cache."""
    return os.fstat(self.file).st_nlink == 0

  def _pread(self, start: int, end: int) -> bytes:
    return os.pread(self.file, end - start, start)

  def _chunk(self, number: int) -> int:
    return 0 if self.layout is None else number // self.layout.group


def _layout(size: int, read: Callable[[int, int], bytes]) -> Layout | None:
  try:
    return layout_of(size, read)
  except LayoutError:
    return None


def _chunks(layout: Layout | None) -> int:
  """Returns the size of a map; a file cannot be mapped if it is empty."""
  return max(len(layout.offsets) - 1, 1) if layout else 1


def _map_of(path: pathlib.Path) -> pathlib.Path:
  return path.with_suffix(".map")


def _start_job(call: Callable[[], _Result]) -> "concurrent.futures.Future[_Result]":
  """Calls a function in one of the threads that wait for a bucket."""
  job: concurrent.futures.Future[_Result] = concurrent.futures.Future()
  _jobs(os.getpid()).put((job, call))
  return job


@functools.cache
def _jobs(
  process: int,
) -> "queue.SimpleQueue[tuple[concurrent.futures.Future[Any], Callable[[], Any]]]":
  """The queue of those threads, which are this process's own and do not hold up its end."""
  del process
  jobs: queue.SimpleQueue[Any] = queue.SimpleQueue()
  for _ in range(_REQUESTS):
    threading.Thread(target=_work, args=(jobs,), daemon=True, name="bucket").start()
  return jobs


def _work(jobs: "queue.SimpleQueue[Any]") -> None:
  while True:
    job, call = jobs.get()
    try:
      job.set_result(call())
    except BaseException as e:
      job.set_exception(e)
    del job, call


def _digest(*what: Any) -> str:
  return hashlib.sha256(repr(what).encode()).hexdigest()[:32]
