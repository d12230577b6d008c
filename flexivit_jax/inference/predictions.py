"""The most likely classes of image files at chosen patch sizes, and the forms in which they are written."""

import contextlib
import csv
import json
import os
import pathlib
from collections.abc import Callable, Generator, Sequence
from typing import NamedTuple, TextIO

import numpy as np

from flexivit_jax import errors
from flexivit_jax.data.inputs import Input
from flexivit_jax.inference import outputs, predictor, programs, texts
from flexivit_jax.sizes import SeqHw, size_text
from flexivit_jax.trees import Json


class Prediction(NamedTuple):
  """The most likely classes of one image at one size.

  Attributes:
    file: as it was named.
    seqhw: the size; None where the file cannot be read.
    top: (class index, its name or "", probability), the most likely first.
    ms: milliseconds of the forward pass for one image of a batch, where it was measured.
    error: why there are no classes.
  """

  file: str
  seqhw: SeqHw | None = None
  top: Sequence[tuple[int, str, float]] = ()
  ms: float | None = None
  error: str | None = None


def predict(
  images: Sequence[str | os.PathLike[str]],
  checkpoint: str | os.PathLike[str],
  seqhw: SeqHw,
  image_size: int | None = None,
  k: int = 5,
  batch_size: int | None = None,
) -> list[Prediction]:
  """Classifies image files with a checkpoint at one patch size.

  Args:
    images: image files, prepared as `weights.preparation` says.
    checkpoint: what `weights.load` takes.
    seqhw: tokens per side, or (per column, per row).
    image_size: pixels a side for weights that do not say; default that of a fixed model, or 240 as in the paper.
    k: how many classes.
    batch_size: images at a time; see `predictor.outcomes`.

  Raises:
    UserError: an image that cannot be read, a size that does not divide it, `image_size` where the weights say it.
  """
  loaded = predictor.load(checkpoint, image_size)
  check_classes(loaded)
  inputs = [Input(os.fspath(path)) for path in images]
  rows = [rows[0] for _, rows in predictions(loaded, inputs, [seqhw], k, batch_size)]
  if bad := [row for row in rows if row.error is not None]:
    raise errors.UserError(f"{bad[0].file}: {bad[0].error}.")
  return rows


def predictions(
  loaded: predictor.Loaded,
  inputs: Sequence[Input],
  sizes: Sequence[SeqHw],
  k: int = 5,
  batch_size: int | None = None,
  timed: bool = False,
  among: texts.Names | None = None,
  way: programs.Way = programs.PLAIN,
) -> Generator[tuple[str, list[Prediction]], None, None]:
  """Yields (file, its predictions at each size) in order; of a bad file a single one, with its error.

  Args:
    loaded: the model; with `among` two towers.
    inputs: the files.
    sizes: at each of these.
    k: how many classes.
    batch_size, timed: see `predictor.outcomes`.
    among: the classes, where they are texts; None: those of the model's head.
    way: what runs the model.
  """
  names: Sequence[str] = predictor.names_of(loaded) if among is None else among.names
  fn = programs.probabilities if among is None else texts.embedding
  with contextlib.closing(
    predictor.outcomes(loaded, fn, inputs, sizes, batch_size=batch_size, timed=timed, way=way)
  ) as outcomes:
    for file, results, error, ms in outcomes:
      if error is not None:
        yield file, [Prediction(file, error=error)]
        continue
      times = ms or [None] * len(sizes)
      each = results if among is None else map(among.probabilities, results)
      tops = [most_likely(probabilities, names, k) for probabilities in each]
      yield file, [Prediction(file, *row) for row in zip(sizes, tops, times, strict=True)]


def check_classes(loaded: predictor.Loaded) -> None:
  """Raises a UserError if a model has no classes."""
  if loaded.record.get("projection"):
    raise errors.UserError(
      f"{loaded.name} has no classes of its own: its head is a projection. With its text tower give --names, e.g."
      " --names=cat,dog; `flexivit embed` writes its features."
    )
  if not loaded.model.num_classes:
    raise errors.UserError(f"{loaded.name} has no classes; `flexivit embed` writes its features.")


def most_likely(
  probabilities: np.ndarray, names: Sequence[str], k: int
) -> list[tuple[int, str, float]]:
  """Returns (class index, its name or "", probability) of the `k` most likely classes."""
  order = np.argsort(-probabilities, kind="stable")[:k]
  return [(int(i), str(names[i]), float(probabilities[i])) for i in order]


# --- forms of an answer ---

Sink = Callable[[Prediction], None]


def sinks_of(
  out: pathlib.Path | None, *, json_lines: bool, k: int, timed: bool
) -> contextlib.AbstractContextManager[list[Sink]]:
  """Returns what takes each answer, see `outputs.sinks_of`.

  Args:
    out: a .csv or .jsonl file; None: only stdout.
    json_lines: print lines of JSON, also where there is a file.
    k: how many classes an answer has.
    timed: whether an answer has milliseconds.
  """
  to_stdout = _print_json if json_lines else _print if out is None else None
  return outputs.sinks_of(out, to_stdout, WRITERS, k, timed)


def _print(row: Prediction) -> None:
  if row.error is not None:
    return  # It is on stderr.
  assert row.seqhw is not None
  lines = [outputs.heading(row.file, row.seqhw, row.ms)]
  lines += [f"  {p:6.1%}  {outputs.shown(name) or index}" for index, name, p in row.top]
  print("\n".join(lines), flush=True)


def _print_json(row: Prediction) -> None:
  print(as_json(row), flush=True)


def as_json(row: Prediction) -> str:
  """Returns a line of JSON: letters beyond ASCII and bytes that are no letters are escaped."""
  if row.error is not None:
    return json.dumps({"file": row.file, "error": row.error})
  top = [class_as_json(index, name, p) for index, name, p in row.top]
  ms = {} if row.ms is None else {"ms": round(row.ms, 4)}
  return json.dumps({"file": row.file, "seqhw": row.seqhw, "top": top, **ms}, allow_nan=False)


def class_as_json(index: int, name: str, p: float) -> Json:
  """Returns one class of an answer; its probability is written with the digits that make this float32."""
  return {"class": index, **({"name": name} if name else {}), "probability": outputs.exact(p)}


def _csv_writer(file: TextIO, k: int, timed: bool) -> Sink:
  writer = csv.writer(file)
  columns = [f"{what}_{i}" for i in range(1, k + 1) for what in ("class", "name", "probability")]
  writer.writerow(["file", "seqhw", *columns, *(["ms"] if timed else []), "error"])

  def write(row: Prediction) -> None:
    cells = [cell for index, name, p in row.top[:k] for cell in (index, name, outputs.exact(p))]
    cells += [""] * (3 * k - len(cells))
    ms = [] if not timed else [""] if row.ms is None else [round(row.ms, 4)]
    size = "" if row.seqhw is None else size_text(row.seqhw)
    writer.writerow([row.file, size, *cells, *ms, row.error or ""])

  return write


def _jsonl_writer(file: TextIO, k: int, timed: bool) -> Sink:
  return lambda row: print(as_json(row), file=file)


WRITERS: dict[str, Callable[[TextIO, int, bool], Sink]] = {
  ".csv": _csv_writer,
  ".jsonl": _jsonl_writer,
}
