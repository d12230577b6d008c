"""A data set that `flexivit pack` wrote: shards of records with random access."""

import bisect
import functools
import itertools
import os
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple, final

from flexivit_jax.data import packs, record_bytes
from flexivit_jax.data.sources.base import Label, Record, Source
from flexivit_jax.data.splits import parse_split, split_names
from flexivit_jax.errors import UserError

_OPEN = 256  # shards that are open at a time
_READER = "readahead_buffer_size:0,max_parallelism:0"  # array_record's advice for random access


def packed_source(*, split: str, data_dir: str | os.PathLike[str]) -> Source:
  """A data set that `flexivit pack` wrote into `data_dir`; records, classes and order are those of its input.

  At opening, the checksum of the manifest and the sizes of the shards are compared; a record is compared with its
  own checksum when it is read, and `flexivit verify` reads everything.

  Args:
    split: of the packed splits.
    data_dir: the folder.
  """
  folder = pathlib.Path(data_dir).expanduser()
  stored = {name: packs.split_of(folder, name) for name in split_names(split)}
  parts = parse_split(split, {name: content["examples"] for name, content in stored.items()})
  shards = {name: packs.shards_of(content) for name, content in stored.items()}
  for shard in itertools.chain.from_iterable(shards.values()):
    packs.check_present(folder, shard)
  runs = [run for part in parts for run in _runs(shards[part.name], part.start, part.stop)]
  reader = _Reader(folder, tuple(runs))
  first = stored[parts[0].name]  # all splits in a folder have the same classes
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

  def __init__(self, folder: pathlib.Path, runs: tuple[_Run, ...]):
    self._folder, self._runs = folder, runs
    self._starts = [0, *itertools.accumulate(len(run.records) for run in runs)]

  def read(self, indices: Sequence[int]) -> list[Record]:
    """Returns records in the order of the indices; each shard is asked once."""
    places: dict[packs.Shard, list[tuple[int, int]]] = {}
    for k, index in enumerate(indices):
      run = self._runs[number := bisect.bisect_right(self._starts, index) - 1]
      places.setdefault(run.shard, []).append((k, run.records[int(index) - self._starts[number]]))
    records: list[Record] = [{}] * len(indices)
    for shard, pairs in places.items():
      for (k, _), record in zip(pairs, self._read(shard, [n for _, n in pairs]), strict=True):
        records[k] = record
    return records

  def labels(self) -> list[Label]:
    """Returns the label of every example, from the indices of the shards."""
    labels: list[Label] = []
    for run in self._runs:
      path = self._folder / run.shard.index_file
      stored = packs.read_json(path, run.shard.index_xxh3)["labels"]
      labels += [_label(stored[n]) for n in run.records]
    return labels

  def _read(self, shard: packs.Shard, numbers: Sequence[int]) -> list[Record]:
    path = self._folder / shard.file
    try:
      return [record_bytes.decode(data) for data in _open(path, shard).read(numbers)]
    except (RuntimeError, ValueError) as e:  # array_record's; MessagePack's
      if isinstance(e, UserError):
        raise
      raise packs.damaged(path, e) from e


@functools.lru_cache(_OPEN)
def _open(path: pathlib.Path, shard: packs.Shard) -> Any:
  """Opens a shard for reading.

  Raises:
    DamagedError: it has another number of records than was written; array_record reads a damaged end as an empty file.
  """
  from array_record.python.array_record_module import ArrayRecordReader

  reader = ArrayRecordReader(str(path), _READER)
  if reader.num_records() != shard.examples:
    raise packs.damaged(
      path, f"it has {reader.num_records()} records, written were {shard.examples}"
    )
  return reader


def _label(label: int | list[int]) -> Label:
  return tuple(label) if isinstance(label, list) else label
