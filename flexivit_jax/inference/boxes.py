"""Objects in image files at chosen patch sizes, and the forms in which boxes are written and drawn."""

import contextlib
import csv
import json
import pathlib
from collections.abc import Callable, Generator, Sequence
from typing import NamedTuple, TextIO

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8
from scipy import special

from flexivit_jax.data import annotations, box_pictures, class_colours
from flexivit_jax.data.inputs import Input
from flexivit_jax.inference import outputs, picture_files, predictor, whole_images
from flexivit_jax.inference.picture_files import Sizes
from flexivit_jax.sizes import Patch, SeqHw, size_text
from flexivit_jax.trees import Json

THRESHOLD = 0.1
TOP_K = 100


class Detection(NamedTuple):
  """A class at a place.

  Attributes:
    number: of the class, or of the name that was asked for.
    name: its name, or "".
    score: 0 to 1, of this class alone: one box may be of several classes.
    box: (x0, y0, x1, y1) in pixels of the file, upright; the whole image is (0, 0, w, h).
  """

  number: int
  name: str
  score: float
  box: tuple[float, float, float, float]


class Answer(NamedTuple):
  """What is found in one file at one size.

  Attributes:
    file: as it was named.
    size: None where the file cannot be read.
    hw: pixels of the image.
    found: the best first.
    image: the pixels of the file, upright, if they were asked for.
    ms: milliseconds of the forward pass for one image of a batch, where it was measured.
    error: why nothing is found.
  """

  file: str
  size: SeqHw | Patch | None = None
  hw: tuple[int, int] = (0, 0)
  found: Sequence[Detection] = ()
  image: UInt8[np.ndarray, "h w 3"] | None = None
  ms: float | None = None
  error: str | None = None


def answers(
  loaded: predictor.Loaded,
  inputs: Sequence[Input],
  sizes: Sizes,
  *,
  threshold: float = THRESHOLD,
  top_k: int = TOP_K,
  batch_size: int | None = None,
  timed: bool = False,
  pictures: bool = False,
) -> Generator[tuple[str, list[Answer]], None, None]:
  """Yields (file, what is found in it at each size) in order; of a bad file a single one, with its error.

  Args:
    loaded: a detector, see `queries.closed`.
    inputs: the files.
    sizes: at each of these; one that does not fit an image is an error of that file.
    threshold, top_k: see `detections`.
    batch_size, timed: see `predictor.outcomes`.
    pictures: whether the answers hold the pixels of the files.
  """
  names = predictor.names_of(loaded)
  loaded = predictor.fitting(loaded, sizes)
  with contextlib.closing(
    predictor.outcomes(loaded, boxes_and_logits, inputs, sizes, batch_size=batch_size, timed=timed)
  ) as outcomes:
    for file, found, error, ms in outcomes:
      origin = None if error is not None else _origin(loaded, file)
      image = whole_images.pixels(file) if pictures and origin is not None else None
      if origin is None or (pictures and image is None):
        yield file, [Answer(file, error=error or "changed while it was read")]
        continue
      hw = int(origin[0]), int(origin[1])
      times = ms or [None] * len(sizes)
      rows = []
      for size, one, time in zip(sizes, found, times, strict=True):
        best = detections(one[:, :4], one[:, 4:], origin, names, threshold, top_k)
        rows.append(Answer(file, size, hw, best, image, time))
      yield file, rows


def detections(
  boxes: Float[np.ndarray, "l 4"],
  logits: Float[np.ndarray, "l k"],
  origin: Float[np.ndarray, "6"],
  names: Sequence[str],
  threshold: float = THRESHOLD,
  top_k: int = TOP_K,
) -> list[Detection]:
  """Returns the best pairs of a box and a class, the best first; boxes that overlap are all kept, as in OWL-ViT.

  Args:
    boxes: (cx, cy, w, h) in shares of the image that the model was shown.
    logits: of each class.
    origin: the window of the file's image that the model was shown, see `annotations`.
    names: of the classes.
    threshold: the least score; boxes with nothing inside the image are left out, too.
    top_k: how many there are at most.
  """
  centre, half = np.float64(boxes[:, :2]), np.float64(boxes[:, 2:]) / 2
  on_image = annotations.on_original(np.concatenate([centre - half, centre + half], 1), origin)
  inside = np.all(on_image[:, 2:] > on_image[:, :2], axis=1)
  scores = special.expit(logits.astype(np.float32)) * inside[:, None]
  order = np.argsort(-scores.reshape(-1), kind="stable")[:top_k]
  rows, classes = np.divmod(order, logits.shape[1])
  return [
    Detection(int(k), names[k], float(scores[i, k]), tuple(on_image[i].tolist()))
    for i, k in zip(rows, classes, strict=True)
    if scores[i, k] >= threshold and inside[i]
  ]


def boxes_and_logits(result: predictor.Result) -> Float[Array, "n l _"]:
  """What an answer is made of: the four numbers of each box, then its logits."""
  return jnp.concatenate([result[1]["pred_boxes"], result[1]["class_logits"]], axis=-1)


def _origin(loaded: predictor.Loaded, path: str) -> Float[np.ndarray, "6"] | None:
  """The origin of a file that was read a moment ago, or None where it has gone."""
  try:
    return whole_images.origin(loaded.pp, path)
  except Exception:  # what was an image a moment ago
    return None


# --- where the answers go ---


def overlays_of(
  inputs: Sequence[Input], sizes: Sizes, overlay: pathlib.Path | None, overwrite: bool
) -> picture_files.Paths:
  """Returns where pictures go; before anything is computed.

  Raises:
    UserError: a suffix that no picture can have, one file for several pictures, or a file that is there.
  """
  files_ = list(dict.fromkeys(one.path for one in inputs if one.error is None))
  to = picture_files.targets("--overlay", overlay, picture_files.SUFFIXES, files_, sizes)
  picture_files.check_new(to.values(), overwrite)
  return to


def draw(answer: Answer, to: picture_files.Paths) -> None:
  """Writes the picture of an answer, if there is to be one."""
  if (path := to.get(_key(answer))) is not None:
    assert answer.image is not None
    drawn = [
      box_pictures.Drawn(one.box, one.number, f"{_name(one)} {one.score:.0%}")
      for one in answer.found
    ]
    picture_files.save(box_pictures.draw(answer.image, drawn), path)


def _key(answer: Answer) -> tuple[str, str]:
  assert answer.size is not None
  return answer.file, str(size_text(answer.size))


def _name(one: Detection) -> str:
  return one.name or f"class {one.number}"


# --- forms of an answer ---

Sink = Callable[[Answer], None]


def sinks_of(
  out: pathlib.Path | None, to: picture_files.Paths, *, json_lines: bool, timed: bool
) -> contextlib.AbstractContextManager[list[Sink]]:
  """Returns what takes each answer, see `outputs.sinks_of`.

  Args:
    out: a .csv or .jsonl file; None: only stdout.
    to: where pictures are, for JSON.
    json_lines: print lines of JSON, also where there is a file.
    timed: whether an answer has milliseconds.
  """
  to_stdout = _print if out is None else None
  if json_lines:
    to_stdout = lambda answer: print(as_json(answer, to), flush=True)  # noqa: E731
  return outputs.sinks_of(out, to_stdout, WRITERS, to, timed)


def _print(answer: Answer) -> None:
  if answer.error is None:  # else it is on stderr
    print(as_text(answer), flush=True)


def as_text(answer: Answer) -> str:
  """Returns lines for people: one for each detection."""
  assert answer.size is not None
  number = f"{len(answer.found)} at x0 y0 x1 y1" if answer.found else "nothing found"
  lines = [f"{outputs.heading(answer.file, answer.size, answer.ms)}  {number}"]
  names = [outputs.shown(_name(one)) for one in answer.found]
  width = max(map(len, names), default=0)
  for one, name in zip(answer.found, names, strict=True):
    box = " ".join(f"{value:7.1f}" for value in one.box)
    lines.append(f"  {one.score:6.1%}  {name:<{width}}  {box}")
  return "\n".join(lines)


def as_json(answer: Answer, to: picture_files.Paths) -> str:
  """Returns a line of JSON: letters beyond ASCII are escaped."""
  if answer.error is not None:
    return json.dumps({"file": answer.file, "error": answer.error})
  size = answer.size
  line: Json = {"file": answer.file, "patch" if isinstance(size, Patch) else "seqhw": size}
  line |= {"hw": answer.hw} | ({} if answer.ms is None else {"ms": round(answer.ms, 4)})
  line |= {"overlay": str(to[_key(answer)])} if _key(answer) in to else {}
  rows = [detection_as_json(one) for one in answer.found]
  return json.dumps({**line, "detections": rows}, allow_nan=False)


def detection_as_json(one: Detection) -> Json:
  """Returns one object of an answer."""
  name = {"name": one.name} if one.name else {}
  return {"class": one.number, **name, "score": outputs.exact(one.score), "box": _rounded(one)}


def drawn_as_json(one: Detection) -> Json:
  """Returns one object of an answer, with the colour in which it is drawn."""
  return detection_as_json(one) | {"colour": class_colours.hex_colour(one.number)}


def _rounded(one: Detection) -> list[float]:
  return [round(value, 3) for value in one.box]


def _csv_writer(file: TextIO, to: picture_files.Paths, timed: bool) -> Sink:
  writer = csv.writer(file)
  columns = ["class", "name", "score", "x0", "y0", "x1", "y1"]
  writer.writerow(["file", "seqhw", *columns, *(["ms"] if timed else []), "error"])

  def write(answer: Answer) -> None:
    size = "" if answer.size is None else size_text(answer.size)
    ms = [] if not timed else [""] if answer.ms is None else [round(answer.ms, 4)]
    rows = [
      [one.number, one.name, outputs.exact(one.score), *_rounded(one)] for one in answer.found
    ]
    for row in rows or [[""] * len(columns)]:
      writer.writerow([answer.file, size, *row, *ms, answer.error or ""])

  return write


def _jsonl_writer(file: TextIO, to: picture_files.Paths, timed: bool) -> Sink:
  return lambda answer: print(as_json(answer, to), file=file)


WRITERS: dict[str, Callable[[TextIO, picture_files.Paths, bool], Sink]] = {
  ".csv": _csv_writer,
  ".jsonl": _jsonl_writer,
}
