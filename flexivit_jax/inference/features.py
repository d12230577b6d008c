"""Features of images (the pooled tokens before the head), and the files in which they are written."""

import contextlib
import csv
import functools
import pathlib
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, final

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from flexivit_jax import files, trees
from flexivit_jax.inference import predictor
from flexivit_jax.sizes import SeqHw, size_text


def features(result: predictor.Result, normalize: bool = False) -> Float[Array, "n d"]:
  """The pre-logits of a model's result; with `normalize` of length 1 each."""
  vectors = result[1]["pre_logits"]
  return vectors / jnp.linalg.norm(vectors, axis=-1, keepdims=True) if normalize else vectors


class Writer(Protocol):
  """Takes the features of one image after another."""

  def add(self, file: str, features: Sequence[Float32[np.ndarray, " d"]]) -> None:
    """Takes one image's features at each size."""

  def finish(self) -> None:
    """Writes what is not yet written."""

  def close(self) -> None:
    """Ends, also after an error."""


@final
class _Csv:
  """A row for each image and size: file, seqhw, f0, f1, ..."""

  def __init__(self, path: pathlib.Path, sizes: Sequence[SeqHw], loaded: predictor.Loaded):
    self._sizes = [size_text(size) for size in sizes]
    self._file = path.open("x", encoding="utf-8", errors="backslashreplace", newline="")
    self._writer = csv.writer(self._file)
    self._writer.writerow(["file", "seqhw", *(f"f{i}" for i in range(loaded.model.num_features))])

  def add(self, file: str, features: Sequence[np.ndarray]) -> None:
    for size, row in zip(self._sizes, features, strict=True):
      self._writer.writerow([file, size, *map(str, row)])

  def finish(self) -> None:
    self._file.flush()

  def close(self) -> None:
    self._file.close()


@final
class _Npz:
  """Arrays by name. Rows wait in files on the disk, so that memory does not grow with the images."""

  def __init__(self, path: pathlib.Path, sizes: Sequence[SeqHw], loaded: predictor.Loaded):
    self._path, self._sizes, self._loaded = path, sizes, loaded
    self._files: list[str] = []
    self._open = contextlib.ExitStack()
    temporary = functools.partial(tempfile.TemporaryFile, dir=path.parent)
    self._rows: list[Any] = [self._open.enter_context(temporary()) for _ in sizes]

  def add(self, file: str, features: Sequence[np.ndarray]) -> None:
    self._files.append(file)
    for rows, row in zip(self._rows, features, strict=True):
      rows.write(row.astype("<f4").tobytes())

  def finish(self) -> None:
    shape = (len(self._files), self._loaded.model.num_features)
    with zipfile.ZipFile(self._path, "x") as archive:
      for size, rows in zip(self._sizes, self._rows, strict=True):
        several = f"_{size_text(size)}" if len(self._sizes) > 1 else ""
        with _member(archive, f"features{several}") as member:
          _header(member, shape)
          rows.seek(0)
          shutil.copyfileobj(rows, member, 2**20)
      for name, array in self._about().items():
        with _member(archive, name) as member:
          np.lib.format.write_array(member, array, allow_pickle=False)

  def _about(self) -> dict[str, np.ndarray]:
    sizes = list(self._sizes)
    if len(sizes) > 1:  # Of several one form for all.
      sizes = [size if isinstance(size, tuple) else (size, size) for size in sizes]
    return {
      "files": np.array(self._files, np.str_),
      "seqhw": np.array(sizes if len(sizes) > 1 else sizes[0], np.int64),
      "checkpoint": np.array(self._loaded.name),
      "weights": np.array(trees.digest(self._loaded.params)),
    }

  def close(self) -> None:
    self._open.close()


@contextlib.contextmanager
def _member(archive: zipfile.ZipFile, name: str) -> Iterator[Any]:
  with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
    yield member


def _header(member: Any, shape: tuple[int, int]) -> None:
  np.lib.format.write_array_header_1_0(
    member, {"descr": "<f4", "fortran_order": False, "shape": shape}
  )


WRITERS: dict[str, Callable[[pathlib.Path, Sequence[SeqHw], predictor.Loaded], Writer]] = {
  ".npz": _Npz,
  ".csv": _Csv,
}

Add = Callable[[str, Sequence[np.ndarray]], None]


@contextlib.contextmanager
def written(
  out: pathlib.Path | None, sizes: Sequence[SeqHw], loaded: predictor.Loaded
) -> Iterator[Add]:
  """Yields what takes the features of each image; the file `out` is there only after the last one, and whole.

  Args:
    out: a file that ends as one of `WRITERS`; None: nothing is written, as by all processes but the first.
    sizes: of the features of an image.
    loaded: the model.

  Raises:
    UserError: the file cannot be written.
  """
  if out is None:
    yield lambda file, features: None
    return
  with files.replacing(out, unique=True) as part, contextlib.ExitStack() as stack:
    with files.write_errors(out):
      writer = WRITERS[out.suffix.lower()](part, sizes, loaded)
    stack.enter_context(contextlib.closing(writer))

    def add(file: str, features: Sequence[np.ndarray]) -> None:
      with files.write_errors(out):
        writer.add(file, features)

    yield add
    with files.write_errors(out):
      writer.finish()
