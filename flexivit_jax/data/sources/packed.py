"""A data set that `flexivit pack` wrote: shards of records with random access."""

import bisect
import contextlib
import functools
import itertools
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, final

from flexivit_jax import storage
from flexivit_jax.data import packs, record_bytes, remote_shards
from flexivit_jax.data.remote_shards import RemoteShards
from flexivit_jax.data.sources.base import Label, Record, Source
from flexivit_jax.data.splits import parse_split, split_names
from flexivit_jax.errors import UserError

_OPEN = 256  # shards that are open at a time


def packed_source(
  *,
  split: str,
  data_dir: str | os.PathLike[str],
  cache_gb: float = remote_shards.CACHE_GB,
) -> Source:
  """A data set that `flexivit pack` wrote into `data_dir`; records, classes and order are those of its input.

  At opening, the checksum of the manifest and the sizes of the shards are compared; a record is compared with its
  own checksum when it is read, and `flexivit verify` reads everything.

  Args:
    split: of the packed splits.
    data_dir: the folder, or its address in a bucket.
    cache_gb: of data in a bucket: GB of this machine's cache folder that hold records.
  """
  url = storage.address(data_dir)
  folder, remote = pathlib.Path(data_dir).expanduser(), None
  if url is not None:
    remote = remote_shards.RemoteShards(url, cache_gb=cache_gb)
    folder = remote.copies([n for n in remote.entries if packs.is_about(n)])
  with _shown(folder, url):
    return _opened(split, folder, remote)


@contextlib.contextmanager
def _shown(folder: pathlib.Path, url: str | None) -> Iterator[None]:
  """Names what is in a bucket by its address in errors, instead of the copy."""
  try:
    yield
  except UserError as e:
    if url is None:
      raise
    raise type(e)(str(e).replace(str(folder), url)) from e


def _opened(split: str, folder: pathlib.Path, remote: RemoteShards | None) -> Source:
  """Opens a folder; of one in a bucket it has the small files, and `remote` all others."""
  stored = {name: packs.split_of(folder, name) for name in split_names(split)}
  parts = parse_split(split, {name: content["examples"] for name, content in stored.items()})
  shards = {name: packs.shards_of(content) for name, content in stored.items()}
  wanted = list(itertools.chain.from_iterable(shards.values()))
  for shard in wanted:
    packs.check_present(folder, shard, remote.size if remote else None)
  if remote is not None:
    remote.expect({shard.file: shard.examples for shard in wanted})
  runs = [run for part in parts for run in _runs(shards[part.name], part.start, part.stop)]
  reader = _Reader(folder, tuple(runs), remote)
  first = stored[parts[0].name]  # all splits in a folder have the same classes
  groups = first.get("class_groups")
  labelled = all("label" in content["kinds"] for content in stored.values())
  return Source(
    "packed",
    split,
    first["num_classes"],
    first["class_names"] and tuple(first["class_names"]),
    sum(len(run.records) for run in runs),
    reader.read,
    reader.labels if labelled else None,
    first["upright"],
    ahead=reader.ahead if remote else None,
    class_groups=groups and {name: tuple(group) for name, group in groups.items()},
  )


class _Run(NamedTuple):
  """Records of one shard, one after the other."""

  shard: packs.Shard
  records: range


def _runs(shards: Sequence[packs.Shard], start: int, stop: int) -> list[_Run]:
  """Returns where the examples `start` to `stop` of a split are."""
  runs, first = [], 0
  for shard in shards:
    low, high = max(start - first, 0), min(stop - first, shard.examples)
    if low < high:
      runs.append(_Run(shard, range(low, high)))
    first += shard.examples
  return runs


@final
class _Reader:
  """Reads records by index; a copy in another process opens the files itself."""

  def __init__(self, folder: pathlib.Path, runs: tuple[_Run, ...], remote: RemoteShards | None):
    self._folder, self._runs, self._remote = folder, runs, remote
    self._starts = [0, *itertools.accumulate(len(run.records) for run in runs)]

  def read(self, indices: Sequence[int]) -> list[Record]:
    """Returns records in the order of the indices; each shard is asked once."""
    places = self._places(indices)
    if self._remote is not None:
      self.ahead(indices)  # all shards at once
    records: list[Record] = [{}] * len(indices)
    for shard, pairs in places.items():
      for (k, _), record in zip(pairs, self._read(shard, [n for _, n in pairs]), strict=True):
        records[k] = record
    return records

  def ahead(self, indices: Sequence[int]) -> None:
    """Begins to fetch records from a bucket."""
    places = self._places(indices)
    assert self._remote is not None
    self._remote.begin({s.file: [n for _, n in pairs] for s, pairs in places.items()})

  def _places(self, indices: Sequence[int]) -> dict[packs.Shard, list[tuple[int, int]]]:
    """Returns shard -> [(place among the indices, number of the record)]."""
    places: dict[packs.Shard, list[tuple[int, int]]] = {}
    for k, index in enumerate(indices):
      run = self._runs[number := bisect.bisect_right(self._starts, index) - 1]
      places.setdefault(run.shard, []).append((k, run.records[int(index) - self._starts[number]]))
    return places

  def labels(self) -> list[Label]:
    """Returns the label of every example, from the indices of the shards."""
    labels: list[Label] = []
    for run in self._runs:
      path = self._folder / run.shard.index_file
      stored = packs.read_json(path, run.shard.index_xxh3)["labels"]
      labels += [_label(stored[n]) for n in run.records]
    return labels

  def _read(self, shard: packs.Shard, numbers: Sequence[int]) -> list[Record]:
    remote, path = self._remote, self._folder / shard.file
    try:
      read = (
        _open(path, shard).read if remote is None else functools.partial(remote.read, shard.file)
      )
      return [record_bytes.decode(data) for data in read(numbers)]
    except (RuntimeError, ValueError) as e:  # array_record's; MessagePack's
      if isinstance(e, UserError):
        raise
      raise packs.damaged(remote.of(shard.file) if remote else path, e) from e


@functools.lru_cache(_OPEN)
def _open(path: pathlib.Path, shard: packs.Shard) -> Any:
  """Opens a shard for reading.

  Raises:
    DamagedError: it has another number of records than was written; array_record reads a damaged end as an empty file.
  """
  from array_record.python.array_record_module import ArrayRecordReader

  reader = ArrayRecordReader(str(path), remote_shards.READER)
  if reader.num_records() != shard.examples:
    raise packs.damaged(
      path, f"it has {reader.num_records()} records, written were {shard.examples}"
    )
  return reader


def _label(label: int | list[int]) -> Label:
  return tuple(label) if isinstance(label, list) else label
