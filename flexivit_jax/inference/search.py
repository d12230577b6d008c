"""Search in image files by a text or an image: exact, by the products of unit vectors."""

import contextlib
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32

from flexivit_jax import errors, trees, weights
from flexivit_jax.data.inputs import Input
from flexivit_jax.inference import index, predictor, texts
from flexivit_jax.sizes import SeqHw, size_text


class Found(NamedTuple):
  """One image: its place from 1, its file, and how alike it is to the query, from -1 to 1."""

  rank: int
  file: str
  similarity: float


class Kept(NamedTuple):
  """Where embeddings are kept, and how they are made.

  Attributes:
    loaded: two towers.
    weights: sha256 of their parameters.
    pp: how an image is prepared.
    folder: of the indices.
    roots: what is searched, absolute paths.
    by_content: see `index.update`.
    batch_size: see `predictor.outcomes`.
    tell: called with each file that was embedded and, where it cannot be read, why.
    note: called with a line about a damaged index.
  """

  loaded: predictor.Loaded
  weights: str
  pp: str
  folder: pathlib.Path
  roots: tuple[str, ...]
  by_content: bool
  batch_size: int | None
  tell: Callable[[str, str | None], None]
  note: Callable[[str], None]

  def vectors(
    self, size: SeqHw, listed: Sequence[str], wanted: Sequence[str]
  ) -> tuple[dict[str, Float32[np.ndarray, "e"]], index.Changes]:
    """Returns the embeddings of the wanted files at a size, as far as they can be read; see `index.update`."""
    key = index.Key(self.weights, self.pp, str(size_text(size)), self.roots)
    embed = lambda files: self._embed(files, size)  # noqa: E731
    return index.update(
      self.folder / key.file, key, listed, wanted, embed, by_content=self.by_content, note=self.note
    )

  def _embed(self, files: Sequence[str], size: SeqHw) -> Iterator[index.Made]:
    contents: dict[str, str | None] = {}

    def prepare(source: str | bytes) -> np.ndarray:
      if isinstance(source, str):
        contents[source] = index.content(source)  # before it is read: a later change is then seen
      return self.loaded.prepare(source)

    loaded = self.loaded._replace(prepare=prepare)
    stream = predictor.outcomes(
      loaded, texts.embedding, [*map(Input, files)], [size], batch_size=self.batch_size
    )
    with contextlib.closing(stream):
      for file, outputs, error, _ in stream:
        self.tell(file, error)
        yield index.Made(file, contents.pop(file, None), None if error else outputs[0])


def kept(
  loaded: predictor.Loaded,
  named: Sequence[str],
  folder: pathlib.Path,
  *,
  image_size: int | None = None,
  by_content: bool = False,
  batch_size: int | None = None,
  tell: Callable[[str, str | None], None] = lambda file, error: None,
  note: Callable[[str], None] = lambda text: None,
) -> Kept:
  """Returns where embeddings are kept; makes the folder.

  Args:
    loaded: two towers, see `predictor.load`.
    named: the files and folders that are searched, as they were named.
    folder: of the indices.
    image_size: as for `predictor.load`.
    by_content, batch_size, tell, note: see `Kept`.

  Raises:
    UserError: the folder cannot be made.
  """
  try:
    folder.mkdir(parents=True, exist_ok=True)
  except OSError as e:
    raise errors.UserError(f"--index={folder} can be no folder: {e.strerror or e}.") from e
  roots = tuple(dict.fromkeys(os.path.abspath(os.path.expanduser(name)) for name in named))
  pp = weights.preparation(loaded.record, image_size)
  digest = trees.digest(loaded.params)
  return Kept(loaded, digest, pp, folder, roots, by_content, batch_size, tell, note)


def best(
  query: Float32[np.ndarray, "e"], vectors: dict[str, Float32[np.ndarray, "e"]], k: int
) -> list[Found]:
  """Returns the k files whose vectors are most alike to the query; equal ones in the order of `vectors`."""
  if not vectors:
    return []
  files = list(vectors)
  alike = np.stack([*vectors.values()]).astype(np.float64) @ query.astype(np.float64)
  order = np.argsort(-alike, kind="stable")[:k]
  return [Found(rank, files[i], float(alike[i])) for rank, i in enumerate(order, 1)]


def of_image(loaded: predictor.Loaded, path: str, size: SeqHw) -> Float32[np.ndarray, "e"]:
  """Returns the vector of an image that is the query.

  Raises:
    UserError: it cannot be read.
  """
  (row,) = predictor.outcomes(loaded, texts.embedding, [Input(path)], [size], batch_size=1)
  if row.error is not None:
    raise errors.UserError(f"--like={path}: {row.error}.")
  return row.outputs[0]
