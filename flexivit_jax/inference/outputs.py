"""Results of a command over many files: where they may be written, and which files could not be read."""

import contextlib
import os
import pathlib
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, TextIO, TypeVar, final

import numpy as np

from flexivit_jax import errors, files
from flexivit_jax.sizes import Patch, SeqHw, size_text

Answer = TypeVar("Answer")


def shown(name: str) -> str:
  """A file's name on one line, in letters that every terminal prints."""
  encoding = sys.stdout.encoding or "utf-8"
  line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)
  return line.encode(encoding, "backslashreplace").decode(encoding)


def note(text: str) -> None:
  """Prints what a user should know to stderr."""
  print(f"note: {shown(text)}", file=sys.stderr)


def check_new(
  out: pathlib.Path, suffixes: Collection[str], overwrite: bool, option: str = "--out"
) -> None:
  """Raises a UserError if results cannot go to a file: before anything is computed."""
  if out.suffix.lower() not in suffixes:
    raise errors.UserError(f"{option}={out}: expected a file that ends in {' or '.join(suffixes)}.")
  if os.path.lexists(out) and not out.is_dir() and not overwrite:
    raise errors.UserError(
      f"{option}={out} exists; give another name, or --overwrite to replace it."
    )
  check_writable(out, option)


def check_writable(out: pathlib.Path, option: str = "--out") -> None:
  """Raises a UserError if no file of this name can be written, or replaced: before anything is computed."""
  if out.is_dir():
    raise errors.UserError(f"{option}={out} is a folder; expected a file to write.")
  if not out.parent.is_dir():
    raise errors.UserError(
      f"{option}={out}: there is no folder {out.parent}; make it, or mend the name."
    )
  if not os.access(out.parent, os.W_OK | os.X_OK):
    raise errors.UserError(f"{option}={out}: the folder {out.parent} may not be written to.")


@contextlib.contextmanager
def new_file(out: pathlib.Path) -> Iterator[TextIO]:
  """Opens a file of answers under a temporary name; it has its own name only after all is written."""
  with files.replacing(out, unique=True) as part:
    with files.write_errors(out):
      file = part.open("x", encoding="utf-8", errors="backslashreplace", newline="")
    with file:
      yield file
      with files.write_errors(out):
        file.flush()


@contextlib.contextmanager
def sinks_of(
  out: pathlib.Path | None,
  to_stdout: Callable[[Answer], None] | None,
  writers: Mapping[str, Callable[..., Callable[[Answer], None]]],
  *given: Any,
) -> Iterator[list[Callable[[Answer], None]]]:
  """What takes each answer: stdout, the file `out`, or both. The file is there only after the last answer.

  Args:
    out: a file with a suffix of `writers`; None: only stdout.
    to_stdout: prints an answer; None: nothing is printed.
    writers: of each suffix, `(the open file, *given) -> what writes an answer there`.
    *given: what writers need to know.
  """
  sinks = [] if to_stdout is None else [to_stdout]
  if out is None:
    yield sinks
    return
  with new_file(out) as file:
    write = writers[out.suffix.lower()](file, *given)

    def sink(answer: Answer) -> None:
      with files.write_errors(out):
        write(answer)

    yield [*sinks, sink]


def heading(file: str, size: SeqHw | Patch, ms: float | None) -> str:
  """Returns the first line of an answer for people."""
  text = str(size_text(size))
  what = f"patch={text[1:]}" if isinstance(size, Patch) else f"seqhw={text}"
  return f"{shown(file)}  ({what}{'' if ms is None else f', {ms:.2f} ms'})"


def exact(score: float) -> float:
  """Returns the number with the fewest digits that is this float32."""
  return float(str(np.float32(score)))


@final
class Tally:
  """Counts files as they are done, names the bad ones on stderr and shows the progress.

  Attributes:
    done, bad: how many.
  """

  def __init__(self, total: int, first: bool = True, *, progress: bool):
    """Progress is shown for several files, and only on a terminal; of several processes only the first one speaks."""
    self._first = first
    self.done = self.bad = 0
    self._last = ""
    self._total, self._begin, self._drawn = total, time.monotonic(), 0.0
    self._progress = first and progress and total > 1 and sys.stderr.isatty()

  def add(self, name: str, error: str | None) -> None:
    """Counts one file."""
    self.done += 1
    if error is not None:
      self.bad += 1
      self.clear()
      self._last = f"{shown(name) or repr(name)}: {shown(error)}"
      if self._first and self._total > 1:
        print(self._last, file=sys.stderr, flush=True)
    self._draw()

  def _draw(self) -> None:
    now = time.monotonic()
    if self._progress and (now - self._drawn > 0.2 or self.done == self._total):
      self._drawn = now
      rate = self.done / max(now - self._begin, 1e-3)
      print(
        f"\r{self.done} of {self._total} images, {rate:.3g} a second\x1b[K",
        end="",
        file=sys.stderr,
        flush=True,
      )

  def clear(self) -> None:
    """Removes the progress line."""
    if self._progress and self._drawn:
      print("\r\x1b[K", end="", file=sys.stderr, flush=True)

  def check_any(self) -> None:
    """Raises a UserError if no file was good."""
    self.clear()
    if self.bad == self.done:
      all_bad = f"none of the {self.bad} images can be read; each is named above."
      raise errors.UserError(all_bad if self._total > 1 else self._last)

  def check_all(self, on_error: str) -> None:
    """Raises a UserError if a file was bad, unless these are to be skipped."""
    if self.bad and on_error == "raise":
      raise errors.UserError(
        f"{self.bad} of {self.done} images cannot be read; each is named above, the others are answered."
        " With --on_error=skip this is no error."
      )
