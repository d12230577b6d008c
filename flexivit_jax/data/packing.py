"""Writes a packed data set: an input becomes shards of records with random access, and a manifest.

Shards are written one after the other, in the order of the input. Where a shard ends depends on its own rows alone,
so a pack that was killed goes on with the first shard that is missing and ends with the same bytes. `packs` describes
the files.
"""

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
from flexivit_jax.errors import UserError, unknown

ON_BAD = ("raise", "skip")
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


def pack(
  source: Input,
  folder: pathlib.Path,
  *,
  split: str,
  shard_bytes: int = 2**28,
  shard_examples: int | None = None,
  on_bad: str = "raise",
  max_errors: int = 100,
  threads: int = min(16, os.cpu_count() or 1),
  note: Callable[[str], None] = lambda text: None,
  progress: Callable[[Done], None] = lambda done: None,
) -> Done:
  """Packs an input as one split of a folder; goes on where an earlier pack of it was stopped.

  Only one process may pack into a folder: the caller holds its lock.

  Args:
    source: the rows.
    folder: where the files go; it may hold other splits of the same classes.
    split: the name of the split there.
    shard_bytes: a shard ends with the record that reaches this size, all records counted.
    shard_examples: a shard has at most this many records; None: any number.
    on_bad: "raise", or "skip": bad rows are left out and listed in the manifest.
    max_errors: how many bad rows "skip" tolerates.
    threads: that read rows ahead; 0: none. They do not change the files.
    note: called with a line about each row that is left out, and about changes of the input.
    progress: called after each row.

  Raises:
    UserError: the folder holds something else, or a pack of another input; bad rows; a file cannot be written.
  """
  _check_arguments(split, shard_bytes, shard_examples, on_bad, max_errors, threads)
  settings = {
    "input": source.about,
    "num_classes": source.num_classes,
    "class_names": source.class_names and list(source.class_names),
    "upright": source.upright,
    "shard_bytes": shard_bytes,
    "shard_examples": shard_examples,
  }
  _begin(folder, split, settings, source.size, note)
  tolerated = max_errors if on_bad == "skip" else 0
  with contextlib.closing(_Rows(source, threads)) as rows:
    writer = _Writer(folder, split, rows, shard_bytes, shard_examples, tolerated, note, progress)
    indices: list[Content] = []
    while rows.any():
      indices.append(writer.shard(len(indices)))
  # Bad rows at the end have a shard without records, which is not kept.
  kept = [index for index in indices if index["examples"]]
  _remove_after(folder, split, len(kept))
  if not kept:
    (folder / f"{split}.begun.json").unlink(missing_ok=True)
    raise UserError(f"None of the {writer.done.rows:,} rows can be packed.")
  _finish(folder, split, {**settings, "left_out": list(source.left_out)}, indices)
  return writer.done


def _check_arguments(
  split: str,
  shard_bytes: int,
  shard_examples: int | None,
  on_bad: str,
  max_errors: int,
  threads: int,
) -> None:
  if not packs.SPLIT.fullmatch(split):
    raise UserError(
      f"The split is called {split!r}; expected letters, digits, - and _; --split gives a name."
    )
  if on_bad not in ON_BAD:
    raise unknown("on_bad", on_bad, ON_BAD)
  least = {"shard_bytes": 1, "shard_examples": 1, "max_errors": 0, "threads": 0}
  given = (shard_bytes, 1 if shard_examples is None else shard_examples, max_errors, threads)
  for (name, low), value in zip(least.items(), given, strict=True):
    if value < low:
      raise UserError(f"{name}={value}; expected {low} or more.")


# --- before and after the shards ---


def check_folder(folder: pathlib.Path) -> None:
  """Raises a UserError if a folder holds files of others, or is none; changes nothing."""
  if folder.exists() and not folder.is_dir():
    raise UserError(f"{folder} is a file; expected a folder.")
  if names := packs.foreign(folder):
    raise UserError(
      f"{folder} has files that no pack writes, the first {names[0]!r}; give a folder of its own, or one that does not"
      " exist."
    )


def _begin(
  folder: pathlib.Path,
  split: str,
  settings: Content,
  size: int | None,
  note: Callable[[str], None],
) -> None:
  """Checks that the folder is for this input, and records in it what is being packed."""
  check_folder(folder)
  splits, begun = packs.splits_of(folder), folder / f"{split}.begun.json"
  stored = splits.get(split)
  if stored is None and begun.exists():
    stored = packs.read_json(begun)
    if stored["rows"] != size:
      note(f"the input had {stored['rows']} rows when this pack began, and has {size} now")
  if stored is not None:
    lines = _differences({k: stored[k] for k in settings}, settings)
    if lines:
      raise UserError(
        f"{folder} holds split {split!r} of another input: {'; '.join(lines)}. Give another folder, or another name of"
        " the split."
      )
  for name, other in splits.items():
    keys = ("num_classes", "class_names", "upright")
    if lines := _differences({k: other[k] for k in keys}, {k: settings[k] for k in keys}):
      raise UserError(
        f"Split {name!r} in {folder} does not fit: {'; '.join(lines)}. Give another folder."
      )
  with files.write_errors(folder):
    folder.mkdir(parents=True, exist_ok=True)
    for part in folder.glob(f"{split}[.-]*.tmp"):
      part.unlink()
  if stored is None:
    packs.write_json(begun, {**settings, "rows": size})


def _differences(old: Content, new: Content, prefix: str = "") -> list[str]:
  """Returns "key: old -> new" for each key that differs."""
  lines = []
  for key in dict.fromkeys((*old, *new)):
    a, b = old.get(key), new.get(key)
    if isinstance(a, dict) and isinstance(b, dict):
      lines += _differences(a, b, f"{prefix}{key}.")
    elif isinstance(a, list) and isinstance(b, list) and a != b:
      pairs = itertools.zip_longest(a, b, fillvalue="absent")
      k, x, y = next((k, x, y) for k, (x, y) in enumerate(pairs) if x != y)
      lines.append(f"{prefix}{key}[{k}]: {x!r} -> {y!r}")
    elif a != b:
      lines.append(f"{prefix}{key}: {a!r} -> {b!r}")
  return lines


def _remove_after(folder: pathlib.Path, split: str, shards: int) -> None:
  """Removes the shards after so many: an input may have become shorter."""
  for path in folder.glob(f"{split}-[0-9][0-9][0-9][0-9][0-9].*"):
    if path.name.partition(".")[0] >= packs.shard_name(split, shards):
      path.unlink()


def _finish(folder: pathlib.Path, split: str, about: Content, indices: Sequence[Content]) -> None:
  """Writes the manifest: the split is complete."""
  shards = []
  for number, index in enumerate(index for index in indices if index["examples"]):
    name = packs.shard_name(split, number)
    stored = {key: index[key] for key in ("examples", "bytes", "xxh3")}
    names = {"file": f"{name}.array_record", "index_file": f"{name}.json"}
    shards.append({**names, **stored, "index_xxh3": index["index_xxh3"]})
  content = {
    **about,
    "rows": indices[-1]["rows"][1],
    "examples": sum(index["examples"] for index in indices),
    "kinds": indices[0]["kinds"],
    "skipped": [row for index in indices for row in index["skipped"]],
    "shards": shards,
  }
  splits = {**packs.splits_of(folder), split: content}
  packs.write_json(folder / packs.MANIFEST, {"splits": dict(sorted(splits.items()))})
  (folder / f"{split}.begun.json").unlink(missing_ok=True)


# --- the shards ---


@final
class _Writer:
  """Makes one shard after the other.

  Attributes:
    done: how far it is.
  """

  def __init__(
    self,
    folder: pathlib.Path,
    split: str,
    rows: "_Rows",
    shard_bytes: int,
    shard_examples: int | None,
    tolerated: int,
    note: Callable[[str], None],
    progress: Callable[[Done], None],
  ):
    self.done = Done(0, 0, 0, 0, 0, 0)
    self._kinds: list[str] | None = None
    self._folder, self._split, self._rows = folder, split, rows
    self._bytes, self._examples = shard_bytes, shard_examples
    self._tolerated, self._note, self._progress = tolerated, note, progress

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
    return {**index, "index_xxh3": packs.digest_of(index)}

  def _write(self, path: pathlib.Path) -> Content:
    with files.replacing(path) as part:
      index = self._fill(part, path)
      _sync(part, path)
    _sync(self._folder, path)
    return index

  def _fill(self, part: pathlib.Path, path: pathlib.Path) -> Content:
    """Writes the records of the next shard into a file."""
    start = number = self.done.rows
    state, written, size = xxhash.xxh3_64(), xxhash.xxh3_64(), 0
    labels: list[Label | None] = []
    skipped: list[tuple[int, str]] = []
    problems: list[str] = []
    with _open_writer(part, path) as write:
      while size < self._bytes and len(labels) != self._examples and self._rows.any():
        state_of_row, row = self._rows.next()
        _add(state, state_of_row)
        problem = row.problem or self._misfit(row.kinds)
        if problem is None:
          if not problems or self._tolerated:
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
    if problems and not self._tolerated:
      raise self._refusal(problems, start, number)
    _check_written(part, path, len(labels), written.hexdigest())
    return {
      "rows": [start, number],
      "input": state.hexdigest(),
      "examples": len(labels),
      "bytes": part.stat().st_size,
      "xxh3": packs.xxh3_of(part),
      "kinds": self._kinds,
      "labels": labels if "label" in (self._kinds or ()) else None,
      "skipped": skipped,
    }

  def _misfit(self, kinds: list[str]) -> str | None:
    """Returns how a record differs from those before it; of the first one None."""
    if self._kinds is None:
      self._kinds = kinds
    if kinds == self._kinds:
      return None
    return f"it has {', '.join(kinds) or 'an image alone'}; rows before it have {', '.join(self._kinds) or 'that'}"

  def _bad(self, problems: Sequence[str]) -> None:
    """Says which row is left out; a UserError if these are too many."""
    if not self._tolerated:
      return
    self._note(f"left out {problems[-1]}")
    if (bad := self.done.skipped + len(problems)) > self._tolerated:
      raise UserError(
        f"{bad:,} bad rows, more than max_errors={self._tolerated}; the last: {problems[-1]}."
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


def _sync(target: pathlib.Path, path: pathlib.Path) -> None:
  """Waits until a file or folder is on the disk."""
  with files.write_errors(path):
    descriptor = os.open(target, os.O_RDONLY)
    try:
      os.fsync(descriptor)
    finally:
      os.close(descriptor)


@final
class _Rows:
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
