"""Lists the images below a folder; counts what is left out by reason, see docs/image_folders.md."""

import collections
import heapq
import os
import stat
from collections.abc import Container, Iterable, Sequence
from typing import final

import numpy as np

from flexivit_jax.data import images

# Folders and files of file managers, network drives, archives and notebooks; in lower case.
_SYSTEM = frozenset(
  (
    "#recycle", "#snapshot", "$recycle.bin", "@eadir", "@recently-snapshot", "@recycle", "__macosx", "__pycache__",
    "desktop.ini", "ehthumbs.db", "lost+found", "network trash folder", "system volume information", "temporary items",
    "thumbs.db",
  )
)  # fmt: skip
_SHOWN = 3  # names and suffixes of a long list

_Key = tuple[int, int] | str  # Identifies a folder, whatever path leads to it.


def is_hidden(name: str) -> bool:
  """Whether a name belongs to a hidden file or folder, or to one that a system creates: never to data."""
  return name.startswith(".") or name.lower() in _SYSTEM


@final
class Tree:
  """The images below a folder. Links to folders are followed, but no folder is read twice.

  Attributes:
    images: paths below the folder, unsorted; of other files where other suffixes were asked for.
    again: (path, the path by which the same folder was read) of folders that are left out.
    followed: path of a link to a folder -> its target.
  """

  def __init__(self, folder: str | os.PathLike[str], suffixes: Container[str] | None = None):
    """Walks the tree.

    Args:
      folder: the top.
      suffixes: of the files to list, in lower case; None: those of images.

    If several paths lead to a folder, the one without a link is read; else the one with the fewest parts, the first in
    text order. A link to a folder that contains the link itself is left out.
    """
    self.folder = os.fspath(folder)
    self._listed = images.suffixes() if suffixes is None else suffixes
    self.images: list[str] = []
    self.again: list[tuple[str, str]] = []
    self.followed: dict[str, str] = {}
    self._inodes: list[int] = []
    self._counts: collections.Counter[str] = collections.Counter()
    self._suffixes: collections.Counter[str] = collections.Counter()
    self._broken: list[str] = []
    self._unreadable: list[str] = []
    self._read: dict[_Key, str] = {}
    self._links: list[tuple[int, str]] = []
    self._descend("")
    while self._links:
      self._follow(heapq.heappop(self._links)[1])

  def left_out(self) -> list[str]:
    """Returns one phrase for each reason why something was left out; [] for an ordinary tree."""
    count, phrases = self._counts, []
    for key, one in _KINDS.items():
      if count[key]:
        phrases.append(_count(count[key], *one))
    if self._suffixes:
      total = self._suffixes.total()
      what = _count(total, "file that is no image", "files that are no images")
      phrases.append(f"{what} ({_table(self._suffixes)}{_about_heic(self._suffixes)})")
    if self.again:
      pairs = [f"{path!r} is {first!r}" for path, first in self.again]
      phrases.append(f"{_count(len(pairs), 'folder', 'folders')} reached twice ({_list(pairs)})")
    if self._broken:
      names = _list(map(repr, sorted(self._broken)))
      phrases.append(f"{_count(len(self._broken), 'broken link', 'broken links')} ({names})")
    if self._unreadable:
      names = _list(map(repr, sorted(self._unreadable)))
      phrases.append(
        f"{_count(len(self._unreadable), 'unreadable folder', 'unreadable folders')} ({names})"
      )
    return phrases

  def copies(self) -> list[list[str]]:
    """Returns sorted groups of paths that are one file: links and hard links."""
    inodes = np.array(self._inodes, np.uint64)
    values, counts = np.unique(inodes, return_counts=True)
    several = np.isin(inodes, values[(counts > 1) & (values != 0)])
    groups = collections.defaultdict(list)
    for i in np.flatnonzero(several):
      # An inode number is of one drive only, and directory entries may hold other numbers than the files.
      status = os.stat(self.at(self.images[i]))
      groups[status.st_dev, status.st_ino].append(self.images[i])
    return sorted(sorted(group) for group in groups.values() if len(group) > 1)

  def at(self, path: str) -> str:
    """Returns the full path of a path below the folder."""
    return os.path.join(self.folder, path) if path else self.folder

  def _descend(self, top: str) -> None:
    """Reads a folder and everything below it without following links."""
    stack = [top]
    while stack:
      path = stack.pop()
      try:
        key = self._key(path)
        if key in self._read:
          self.again.append((path, self._read[key] or "."))
          continue
        with os.scandir(self.at(path)) as entries:
          listed = sorted(entries, key=lambda entry: entry.name)
      except OSError:
        self._unreadable.append(path or ".")
        continue
      self._read[key] = path
      stack.extend(reversed([path_ for e in listed if (path_ := self._sort(e, path)) is not None]))

  def _sort(self, entry: os.DirEntry[str], above: str) -> str | None:
    """Records one entry; returns the path of a folder, else None."""
    path = os.path.join(above, entry.name)
    if is_hidden(entry.name):
      self._counts["folder" if entry.is_dir(follow_symlinks=False) else "file"] += 1
    elif entry.is_symlink():
      self._sort_link(entry, path)
    elif entry.is_dir(follow_symlinks=False):
      return path
    elif entry.is_file(follow_symlinks=False):
      self._take(path, entry.inode())
    else:
      self._counts["special"] += 1  # Reading a pipe would block for ever.
    return None

  def _sort_link(self, entry: os.DirEntry[str], path: str) -> None:
    try:
      status = entry.stat()
    except OSError:
      self._broken.append(path)
      return
    if stat.S_ISDIR(status.st_mode):
      heapq.heappush(self._links, (path.count(os.sep), path))
    elif stat.S_ISREG(status.st_mode):
      self._take(path, status.st_ino)
    else:
      self._counts["special"] += 1

  def _take(self, path: str, inode: int) -> None:
    suffix = os.path.splitext(path)[1].lower()
    if suffix in self._listed:
      self.images.append(path)
      self._inodes.append(inode)
    else:
      self._suffixes[suffix or "no suffix"] += 1

  def _follow(self, link: str) -> None:
    target = os.path.realpath(self.at(link))
    for holder in (os.path.dirname(self.at(link)), self.folder):
      if is_in(os.path.realpath(holder), target):
        self.again.append((link, os.path.relpath(target, os.path.realpath(self.folder))))
        return
    self.followed[link] = target
    self._descend(link)

  def _key(self, path: str) -> _Key:
    status = os.stat(self.at(path))
    return (status.st_dev, status.st_ino) if status.st_ino else os.path.realpath(self.at(path))


_KINDS = {
  "folder": ("hidden or system folder", "hidden or system folders"),
  "file": ("hidden or system file", "hidden or system files"),
  "special": ("entry that is neither a file nor a folder", "entries that are neither files nor folders"),
}  # fmt: skip


def is_in(path: str, folder: str) -> bool:
  """Whether a real path is a folder or lies below it."""
  return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)


def _about_heic(suffixes: Container[str]) -> str:
  read = ".heic" in images.suffixes()
  asked = not read and any(suffix in suffixes for suffix in images.HEIF_SUFFIXES)
  return "; HEIC files are read where pillow-heif is installed" if asked else ""


def _count(number: int, one: str, several: str) -> str:
  return f"{number:,} {one if number == 1 else several}"


def _table(counts: collections.Counter[str]) -> str:
  """Returns the most frequent suffixes with their counts, as text."""
  ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
  shown = ((s if s.isprintable() else repr(s), count) for s, count in ranked)
  return _list([f"{suffix} {count}" for suffix, count in shown])


def _list(items: Iterable[str]) -> str:
  shown: Sequence[str] = list(items)
  more = [f"{len(shown) - _SHOWN} more"] if len(shown) > _SHOWN else []
  return ", ".join([*shown[:_SHOWN], *more])
