"""Embeddings of image files that are kept on disk, so that a search embeds only what is new.

One file for a set of weights, a preparation of images, a size, and the folders that are searched. It is replaced as a
whole, so that a crash leaves the one before; while many images are embedded it is written now and then, and a search
that was ended goes on from there.
"""

import hashlib
import io
import json
import os
import pathlib
import time
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32

from flexivit_jax import errors, files
from flexivit_jax.trees import Json

FORMAT = "flexivit search 1"
SAVE_EVERY = 30.0  # seconds


class Made(NamedTuple):
  """What became of a file: the digest of its content before it was decoded, and its embedding, or None."""

  file: str
  content: str | None
  vector: np.ndarray | None


Embed = Callable[[Sequence[str]], Iterable[Made]]


class Key(NamedTuple):
  """All that an embedding depends on but the image, and what is searched.

  Attributes:
    weights: sha256 of both towers.
    pp: how an image is prepared.
    size: of the grid of tokens, "8" or "4x6".
    roots: the files and folders that were named, absolute.
  """

  weights: str
  pp: str
  size: str
  roots: tuple[str, ...]

  @property
  def file(self) -> str:
    """Name of the index of this key; the size stands in it for people."""
    text = json.dumps(self._asdict(), sort_keys=True)
    return f"{hashlib.sha256(text.encode()).hexdigest()[:24]}-{self.size}.npz"


class Entry(NamedTuple):
  """What is known of a file: size in bytes, time of change in ns, digest of its content, its embedding."""

  bytes: int
  changed: int
  content: str
  vector: Float32[np.ndarray, "e"]


Entries = dict[str, Entry]  # by absolute path


class Changes(NamedTuple):
  """What an update did: how many files were embedded, were known, and are gone."""

  embedded: int
  known: int
  dropped: int


def read(path: pathlib.Path, key: Key, note: Callable[[str], None]) -> Entries:
  """Returns the entries of an index; {} where there is none, or where it is damaged, which is noted.

  Raises:
    UserError: the file is something else, or an index of another key: it is not replaced.
  """
  if not os.path.lexists(path):
    return {}
  try:
    with zipfile.ZipFile(path) as archive:
      names = set(archive.namelist())
      if "about.json" not in names:
        raise _foreign(path)
      about = json.loads(archive.read("about.json"))
      if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise _foreign(path)
      if about["key"] != _plain(key):
        raise errors.UserError(
          f"{path} is an index of other weights, images or sizes; remove it, or give another --index."
        )
      vectors = np.lib.format.read_array(io.BytesIO(archive.read("vectors.npy")))
    rows = about["files"]
    if vectors.dtype != np.float32 or vectors.ndim != 2 or len(rows) != len(vectors):
      raise ValueError(f"{len(rows)} files and vectors of shape {vectors.shape}")
    return {
      name: Entry(int(size), int(changed), str(content), vector)
      for (name, size, changed, content), vector in zip(rows, vectors, strict=True)
    }
  except errors.UserError:
    raise
  except OSError as e:
    raise errors.UserError(f"{path} cannot be read: {e.strerror or e}.") from e
  except Exception as e:  # A damaged zip raises nearly everything.
    if isinstance(e, zipfile.BadZipFile) and not _starts_as_zip(path):
      raise _foreign(path) from e
    note(f"{path} is damaged ({e}); it is made anew")
    return {}


def write(path: pathlib.Path, key: Key, entries: Mapping[str, Entry]) -> None:
  """Replaces an index.

  Raises:
    UserError: it cannot be written.
  """
  rows = [[name, e.bytes, e.changed, e.content] for name, e in entries.items()]
  vectors = np.stack([e.vector for e in entries.values()]) if entries else np.zeros((0, 0), "<f4")
  with (
    files.replacing(path, unique=True) as part,
    files.write_errors(path),
    zipfile.ZipFile(part, "x") as archive,
  ):
    archive.writestr(
      "about.json", json.dumps({"format": FORMAT, "key": _plain(key), "files": rows})
    )
    with archive.open("vectors.npy", "w", force_zip64=True) as member:
      np.lib.format.write_array(member, vectors.astype("<f4"), allow_pickle=False)


def update(
  path: pathlib.Path,
  key: Key,
  listed: Sequence[str],
  wanted: Sequence[str],
  embed: Embed,
  *,
  by_content: bool = False,
  note: Callable[[str], None],
) -> tuple[dict[str, Float32[np.ndarray, "e"]], Changes]:
  """Returns the embeddings of files, and brings the index up to date.

  A file whose size and time of change are those of the index is taken to be the same; of any other the content decides.
  A file that was moved is known by its content.

  Args:
    path: of the index.
    key: see `Key`.
    listed: all files that are searched; others leave the index.
    wanted: those of them whose embeddings are needed.
    embed: makes those of some files, one after the other.
    by_content: compare contents of all files, also where size and time are the same.
    note: called with a line about a damaged index.

  Raises:
    UserError: see `read` and `write`.
  """
  stored = read(path, key, note)
  at = {name: os.path.abspath(name) for name in listed}
  here = set(at.values())
  gone = {name: entry for name, entry in stored.items() if name not in here}
  entries = {name: entry for name, entry in stored.items() if name in here}
  moved = {entry.content: entry for entry in gone.values()}
  sizes = {entry.bytes for entry in gone.values()}
  stale, states, touched = [], {}, bool(gone)
  for name in dict.fromkeys(wanted):
    entry, state = entries.get(at[name]), _state(name)
    if entry and state == (entry.bytes, entry.changed) and not by_content:
      continue
    states[name] = state
    compared = entry is not None or (state is not None and state[0] in sizes)
    digest = content(name) if compared else None
    same = entry if entry and entry.content == digest else moved.get(digest or "")
    if same is None or state is None:
      touched |= entries.pop(at[name], None) is not None
      stale.append(name)
      continue
    entries[at[name]] = same._replace(bytes=state[0], changed=state[1])
    touched |= entry is None or state != (entry.bytes, entry.changed)
  embedded, last = 0, time.monotonic()
  for made in embed(stale) if stale else ():
    state = states[made.file]
    if made.vector is None or made.content is None or state is None:
      continue
    embedded, touched = embedded + 1, True
    entries[at[made.file]] = Entry(*state, made.content, made.vector.astype(np.float32))
    if time.monotonic() - last > SAVE_EVERY:
      write(path, key, entries)
      last = time.monotonic()
  if touched or (entries and not path.exists()):
    write(path, key, entries)
  vectors = {name: entries[at[name]].vector for name in wanted if at[name] in entries}
  return vectors, Changes(embedded, len(vectors) - embedded, len(gone))


def _plain(key: Key) -> Json:
  return {**key._asdict(), "roots": list(key.roots)}


def _state(name: str) -> tuple[int, int] | None:
  try:
    state = os.stat(name)
  except OSError:
    return None
  return state.st_size, state.st_mtime_ns


def content(name: str) -> str | None:
  """Returns a digest of a file's bytes; None where it cannot be read."""
  digest = hashlib.blake2b(digest_size=16)
  try:
    with open(name, "rb") as file:
      while chunk := file.read(2**20):
        digest.update(chunk)
  except OSError:
    return None
  return digest.hexdigest()


def _starts_as_zip(path: pathlib.Path) -> bool:
  with path.open("rb") as file:
    return file.read(4) in (b"PK\x03\x04", b"")


def _foreign(path: pathlib.Path) -> errors.UserError:
  return errors.UserError(
    f"{path} is no index of `flexivit search`; it stays as it is. Remove it, or give another --index."
  )
