"""Writes a packed data set: an input becomes shards of records with random access, and a manifest.

Shards are written one after the other, in the order of the input. Where a shard ends depends on its own rows alone,
so a pack that was killed goes on with the first shard that is missing and ends with the same bytes. `packs` describes
the files.
"""

import contextlib
import itertools
import os
import pathlib
from collections.abc import Callable, Sequence

from flexivit_jax import files
from flexivit_jax.data import packs
from flexivit_jax.data.pack_inputs import Input
from flexivit_jax.data.packs import Content
from flexivit_jax.data.parquet_input import parquet_input
from flexivit_jax.data.shards import Done, Rows, Writer, sync
from flexivit_jax.data.tar_input import tar_input
from flexivit_jax.errors import UserError, unknown

ON_BAD = ("raise", "skip")
_MOST_THREADS = 1000
# Formats that only `flexivit pack` reads; every data set of `sources.SOURCES` is an input, too.
INPUTS: dict[str, Callable[..., Input]] = {"parquet": parquet_input, "tar": tar_input}


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
  if source.class_groups is not None:  # packs without them are as they were before there were any
    settings["class_groups"] = {name: list(group) for name, group in source.class_groups.items()}
  known = _begin(folder, split, settings, source.size, note)
  tolerated = max_errors if on_bad == "skip" else 0
  with contextlib.closing(Rows(source, threads)) as rows:
    writer = Writer(folder, split, rows, shard_bytes, shard_examples, tolerated, note, progress)
    indices: list[Content] = []
    while rows.any() and (known is None or writer.done.rows < known):
      indices.append(writer.shard(len(indices)))
    if known is not None and (rows.any() or writer.done.rows != known):
      raise UserError(
        f"{folder} holds split {split!r} of {known:,} rows, and the input has"
        f" {'more' if rows.any() else f'{writer.done.rows:,}'} now. Give another folder, or the input as it was."
      )
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
  if threads > _MOST_THREADS:
    raise UserError(f"threads={threads}; expected at most {_MOST_THREADS}.")


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
) -> int | None:
  """Checks that the folder is for this input, and records in it what is being packed.

  Returns:
    the number of rows if the split is complete.
  """
  check_folder(folder)
  splits, begun = packs.splits_of(folder), folder / f"{split}.begun.json"
  stored = splits.get(split)
  if stored is None and begun.exists():
    stored = packs.read_json(begun)
    if stored["rows"] != size:
      note(f"the input had {stored['rows']} rows when this pack began, and has {size} now")
  if stored is not None:
    lines = _differences({k: stored.get(k) for k in (*settings, "class_groups")}, settings)
    if lines:
      raise UserError(
        f"{folder} holds split {split!r} of another input: {'; '.join(lines)}. Give another folder, or another name of"
        " the split."
      )
  for name, other in splits.items():
    keys = ("num_classes", "class_names", "upright", "class_groups")
    if lines := _differences({k: other.get(k) for k in keys}, {k: settings.get(k) for k in keys}):
      raise UserError(
        f"Split {name!r} in {folder} does not fit: {'; '.join(lines)}. Give another folder."
      )
  with files.write_errors(folder):
    folder.mkdir(parents=True, exist_ok=True)
    for part in folder.glob(f"{split}[.-]*.tmp"):
      part.unlink()
  if stored is None:
    packs.write_json(begun, {**settings, "rows": size})
  return splits[split]["rows"] if split in splits else None


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
  sync(folder, folder / packs.MANIFEST)
  (folder / f"{split}.begun.json").unlink(missing_ok=True)
