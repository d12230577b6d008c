"""Shards of a packed data set: each is written whole, or its name is not there."""

import collections
import concurrent.futures
import contextlib
import itertools
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, final

import xxhash

from flexivit_jax import files
from flexivit_jax.data import pack_inputs, packs, record_bytes
from flexivit_jax.data.pack_inputs import Input, Row
from flexivit_jax.data.packs import Content
from flexivit_jax.data.sources.base import Label
from flexivit_jax.errors import UserError

_KINDS = ("label", "boxes", "mask", "captions")  # all records have the same of these
_SHOWN = 10  # bad rows in one message
# Images are compressed already, and random access reads one record. The bytes must not depend on threads.
_WRITER = "group_size:1,uncompressed,max_parallelism:1"
_READER = "readahead_buffer_size:0,max_parallelism:0"


class Done(NamedTuple):
  """How far a pack is.

  Attributes:
    rows: of the input, those in shards that were there included.
    read: rows that were read, not those.
    examples, skipped: what became of the rows.
    shards, bytes: finished ones; their size, and what the next one has so far.
  """

  rows: int
  read: int
  examples: int
  skipped: int
  shards: int
  bytes: int


class _Packed(NamedTuple):
  """A row as it goes into a shard: `data`, or why it cannot (`problem`)."""

  name: str
  data: bytes
  label: Label | None
  kinds: list[str]
  problem: str | None


@final
class Writer:
  """Makes one shard after the other; the arguments are those of `packing.pack`, with `max_errors` 0 for "raise".

  Attributes:
    done: how far it is.
  """

  def __init__(
    self,
    folder: pathlib.Path,
    split: str,
    rows: "Rows",
    shard_bytes: int,
    shard_examples: int | None,
    max_errors: int,
    note: Callable[[str], None],
    progress: Callable[[Done], None],
  ):
    self.done = Done(0, 0, 0, 0, 0, 0)
    self._kinds: list[str] | None = None
    self._folder, self._split, self._rows = folder, split, rows
    self._bytes, self._examples = shard_bytes, shard_examples
    self._max_errors, self._note, self._progress = max_errors, note, progress

  def shard(self, number: int) -> Content:
    """Returns the index of a shard, which is written unless it is there."""
    path = self._folder / f"{packs.shard_name(self._split, number)}.array_record"
    index, read = self._finished(path), 0
    if index is None:
      index = self._write(path)
      read = index["rows"][1] - index["rows"][0]
      index["index_xxh3"] = packs.write_json(path.with_suffix(".json"), index)
    kept = index["examples"] > 0
    self._kinds = index["kinds"]
    self.done = Done(
      index["rows"][1],
      self.done.read + read,
      self.done.examples + index["examples"],
      self.done.skipped + len(index["skipped"]),
      self.done.shards + kept,
      self.done.bytes + kept * index["bytes"],
    )
    self._progress(self.done)
    return index

  def _finished(self, path: pathlib.Path) -> Content | None:
    """Passes over the rows of a shard that is there; None where it is not.

    Raises:
      UserError: it was made of other rows.
    """
    file = path.with_suffix(".json")
    try:
      index = packs.read_json(file)
    except packs.DamagedError:
      return None
    start, stop = index["rows"]
    size = path.stat().st_size if path.is_file() else None
    if size != index["bytes"] or start != self.done.rows:
      return None
    digest = xxhash.xxh3_64()
    for _ in range(start, stop):
      if not self._rows.any():
        break
      _add(digest, self._rows.skip())
    if digest.hexdigest() != index["input"]:
      raise UserError(
        f"Rows {start:,} to {stop - 1:,} of the input are not those of which {path} was made: files were added,"
        " removed, renamed or changed in size, or annotations changed. Give another folder, or the input as it was."
      )
    if not index["full"] and self._rows.any():
      raise UserError(
        f"The input has more rows than the {stop:,} that it had when {path}, the last shard, was made. Give another"
        " folder, or the input as it was."
      )
    return {**index, "index_xxh3": packs.digest_of(index)}

  def _write(self, path: pathlib.Path) -> Content:
    with files.replacing(path) as part:
      index = self._fill(part, path)
      sync(part, path)
    sync(self._folder, path)
    return index

  def _fill(self, part: pathlib.Path, path: pathlib.Path) -> Content:
    """Writes the records of the next shard into a file."""
    start = number = self.done.rows
    state, written, size = xxhash.xxh3_64(), xxhash.xxh3_64(), 0
    labels: list[Label | None] = []
    skipped: list[tuple[int, str]] = []
    problems: list[str] = []
    with _open_writer(part, path) as write:
      while not (full := self._is_full(size, len(labels))) and self._rows.any():
        state_of_row, row = self._rows.next()
        _add(state, state_of_row)
        problem = row.problem or self._misfit(row.kinds)
        if problem is None:
          if not problems or self._max_errors:
            write(row.data)
          written.update(row.data)
          size += len(row.data)
          labels.append(row.label)
        else:
          skipped.append((number, row.name))
          problems.append(f"row {number:,} ({row.name!r}): {problem}")
          self._bad(problems)
        number += 1
        self._progress(
          self.done._replace(
            rows=number,
            read=self.done.read + number - start,
            examples=self.done.examples + len(labels),
            skipped=self.done.skipped + len(skipped),
            bytes=self.done.bytes + size,
          )
        )
    if problems and not self._max_errors:
      raise self._refusal(problems, start, number)
    _check_written(part, path, len(labels), written.hexdigest())
    return {
      "rows": [start, number],
      "input": state.hexdigest(),
      "full": full,
      "examples": len(labels),
      "bytes": part.stat().st_size,
      "xxh3": packs.xxh3_of(part),
      "kinds": self._kinds,
      "labels": labels if "label" in (self._kinds or ()) else None,
      "skipped": skipped,
    }

  def _is_full(self, size: int, examples: int) -> bool:
    return size >= self._bytes or examples == self._examples

  def _misfit(self, kinds: list[str]) -> str | None:
    """Returns how a record differs from those before it; of the first one None."""
    if self._kinds is None:
      self._kinds = kinds
    if kinds == self._kinds:
      return None
    return f"it has {', '.join(kinds) or 'an image alone'}; rows before it have {', '.join(self._kinds) or 'that'}"

  def _bad(self, problems: Sequence[str]) -> None:
    """Says which row is left out; a UserError if these are too many."""
    if not self._max_errors:
      return
    self._note(f"left out {problems[-1]}")
    if (bad := self.done.skipped + len(problems)) > self._max_errors:
      raise UserError(
        f"{bad:,} bad rows, more than max_errors={self._max_errors}; the last: {problems[-1]}."
      )

  def _refusal(self, problems: Sequence[str], start: int, stop: int) -> UserError:
    more = f"; and {len(problems) - _SHOWN:,} more" if len(problems) > _SHOWN else ""
    return UserError(
      f"{len(problems):,} of the rows {start:,} to {stop - 1:,} cannot be packed: {'; '.join(problems[:_SHOWN])}{more}."
      " Repair them, or leave bad rows out: --on_bad=skip. The shards before them are kept."
    )


def _add(digest: Any, state: bytes) -> None:
  """Adds the state of a row, with its length: no two lists of rows have the same bytes."""
  digest.update(len(state).to_bytes(8, "little"))
  digest.update(state)


@contextlib.contextmanager
def _open_writer(part: pathlib.Path, path: pathlib.Path) -> Iterator[Callable[[bytes], None]]:
  from array_record.python.array_record_module import ArrayRecordWriter

  try:
    writer = ArrayRecordWriter(str(part), _WRITER)
    try:
      yield writer.write
    finally:
      writer.close()
  except RuntimeError as e:  # array_record's for all failures of the system
    reason = str(e).partition("; ")[0]
    raise UserError(f"{path} cannot be written: {reason}.") from e


def _check_written(part: pathlib.Path, path: pathlib.Path, examples: int, written: str) -> None:
  """Reads the records back: array_record does not report each failure of the system."""
  from array_record.python.array_record_module import ArrayRecordReader

  digest = xxhash.xxh3_64()
  try:
    reader = ArrayRecordReader(str(part), _READER)
    stored = reader.num_records()
    for i in range(stored):
      digest.update(reader.read([i])[0])
    reader.close()
  except RuntimeError as e:
    raise UserError(f"{path} cannot be read back: {e}.") from e
  if (stored, digest.hexdigest()) != (examples, written):
    raise UserError(
      f"{path} cannot be written: {stored:,} of {examples:,} records can be read back."
    )


def sync(target: pathlib.Path, path: pathlib.Path) -> None:
  """Waits until a file or folder is on the disk."""
  with files.write_errors(path):
    descriptor = os.open(target, os.O_RDONLY)
    try:
      os.fsync(descriptor)
    finally:
      os.close(descriptor)


@final
class Rows:
  """The rows of an input in order, read ahead by threads as long as they are wanted."""

  def __init__(self, source: Input, threads: int):
    self._source, self._rows, self._ahead = source, source.rows(), max(1, 4 * threads)
    self._pool = concurrent.futures.ThreadPoolExecutor(threads) if threads else None
    self._next: collections.deque[tuple[Row, Callable[[], _Packed] | None]] = collections.deque()

  def any(self) -> bool:
    """Whether there is another row."""
    if not self._next:
      self._next.extend((row, None) for row in itertools.islice(self._rows, 1))
    return bool(self._next)

  def skip(self) -> bytes:
    """Passes over the next row; returns its state."""
    return self._next.popleft()[0].state

  def next(self) -> tuple[bytes, _Packed]:
    """Returns the state of the next row, and what it is as a record."""
    wanted = max(self._ahead - len(self._next), 0)
    self._next.extend((row, None) for row in itertools.islice(self._rows, wanted))
    for k, (row, result) in enumerate(self._next):
      if result is None:
        self._next[k] = row, self._start(row)
    row, packed = self._next.popleft()
    return row.state, packed() if packed else _packed(row, self._source)

  def close(self) -> None:
    if self._pool:
      self._pool.shutdown(cancel_futures=True)

  def _start(self, row: Row) -> Callable[[], _Packed] | None:
    return self._pool.submit(_packed, row, self._source).result if self._pool else None


def _packed(row: Row, source: Input) -> _Packed:
  try:
    record = row.read()
    name = str(record.get("id", row.name))
    wrong = pack_inputs.problem(record, num_classes=source.num_classes, upright=source.upright)
    data = b"" if wrong else record_bytes.encode(record)
    kinds = [key for key in _KINDS if key in record]
    return _Packed(name, data, record.get("label"), kinds, wrong)
  except Exception as e:  # of any source, as the loader takes them
    reason = str(e) if isinstance(e, UserError) else f"{type(e).__name__}: {e}"
    return _Packed(row.name, b"", None, [], reason)
