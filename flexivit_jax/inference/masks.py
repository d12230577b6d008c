"""The class of each pixel of image files at chosen patch sizes, and the files in which the answers are written."""

import contextlib
import json
import pathlib
from collections.abc import Generator, Sequence
from typing import NamedTuple

import cv2
import jax
import numpy as np
from jaxtyping import Array, Float, UInt8, UInt16

from flexivit_jax import errors
from flexivit_jax.data import class_colours
from flexivit_jax.data.inputs import Input
from flexivit_jax.inference import outputs, overlays, picture_files, predictor, whole_images
from flexivit_jax.sizes import Patch, SeqHw, size_text
from flexivit_jax.trees import Json

MASKS = (".png",)


class Answer(NamedTuple):
  """The classes of the pixels of one file at one size.

  Attributes:
    file: as it was named.
    size: None where the file cannot be read.
    mask: numbers of classes at the file's own resolution, upright.
    image: the pixels of the file, upright.
    rows: the classes that it has, the largest first.
    ms: milliseconds of the forward pass for one image of a batch, where it was measured.
    error: why there is no mask.
  """

  file: str
  size: SeqHw | Patch | None = None
  mask: UInt16[np.ndarray, "h w"] | None = None
  image: UInt8[np.ndarray, "h w 3"] | None = None
  rows: Sequence[overlays.Row] = ()
  ms: float | None = None
  error: str | None = None


def answers(
  loaded: predictor.Loaded,
  inputs: Sequence[Input],
  sizes: picture_files.Sizes,
  batch_size: int | None = None,
  timed: bool = False,
) -> Generator[tuple[str, list[Answer]], None, None]:
  """Yields (file, its mask at each size) in order; of a bad file a single one, with its error.

  An image is prepared as the model's preprocessing says, the scores of its pixels are resized to the file's own
  resolution, bilinearly, and the largest is the class. Images of another shape are another program, so that many
  shapes take their time to compile.

  Args:
    loaded: a model that gives masks.
    inputs: the files.
    sizes: at each of these; one that does not fit an image is an error of that file.
    batch_size: images at a time; default 1 on CPUs, where scores of every pixel take memory, and 8 elsewhere.
    timed: see `predictor.outcomes`.
  """
  names = predictor.names_of(loaded)
  loaded = predictor.fitting(loaded, sizes)
  if batch_size is None:
    batch_size = 1 if jax.default_backend() == "cpu" else 8
  with contextlib.closing(
    predictor.outcomes(loaded, scores_of_pixels, inputs, sizes, batch_size=batch_size, timed=timed)
  ) as outcomes:
    for file, scores, error, ms in outcomes:
      image = None if error is not None else whole_images.pixels(file)
      if image is None:
        yield file, [Answer(file, error=error or "changed while it was read")]
        continue
      times = ms or [None] * len(sizes)
      rows = []
      for size, one, time in zip(sizes, scores, times, strict=True):
        mask = classes_at(one, (image.shape[0], image.shape[1]))
        rows.append(Answer(file, size, mask, image, overlays.rows_of(mask, names), time))
      yield file, rows


def classes_at(
  scores: Float[np.ndarray, "h w k"], hw: tuple[int, int]
) -> UInt16[np.ndarray, "new_h new_w"]:
  """Returns the class of the largest score of each pixel, after scores are resized between centres of pixels.

  One class after another, so that memory does not grow with their number.
  """
  best: np.ndarray | None = None
  mask = np.zeros(hw, np.uint16)
  for k in range(scores.shape[-1]):
    own = np.ascontiguousarray(scores[..., k], np.float32)
    plane = np.asarray(cv2.resize(own, hw[::-1], interpolation=cv2.INTER_LINEAR), np.float32)
    if best is None:
      best = plane
      continue
    larger = plane > best
    mask[larger] = k
    np.copyto(best, plane, where=larger)
  return mask


def scores_of_pixels(result: predictor.Result) -> Float[Array, "n h w k"]:
  """What an answer is made of."""
  return result[1]["pixel_logits"]


# --- where the answers go ---


class Targets(NamedTuple):
  """Files to write: of each (file, size) as `size_text` has it, or none."""

  masks: picture_files.Paths
  overlays: picture_files.Paths


def targets(
  inputs: Sequence[Input],
  sizes: picture_files.Sizes,
  out: pathlib.Path | None,
  overlay: pathlib.Path | None,
  overwrite: bool,
) -> Targets:
  """Returns where masks and overlays go; before anything is computed.

  A name with a suffix is the one file of one image at one size. A name without is a folder: each image's mask has its
  path there, as .png; several sizes have a folder each.

  Raises:
    UserError: a suffix that no mask can have, one file for several answers, or a file that is there.
  """
  files_ = list(dict.fromkeys(one.path for one in inputs if one.error is None))
  result = Targets(
    picture_files.targets("--out", out, MASKS, files_, sizes),
    picture_files.targets("--overlay", overlay, picture_files.SUFFIXES, files_, sizes),
  )
  everything = [*result.masks.values(), *result.overlays.values()]
  if len({*everything}) < len(everything):
    raise errors.UserError(
      f"--out={out} and --overlay={overlay} would be the same files; give two names."
    )
  picture_files.check_new(everything, overwrite)
  return result


def write(answer: Answer, to: Targets, classes: int) -> None:
  """Writes the mask and the overlay of an answer, each under a temporary name first."""
  assert answer.mask is not None and answer.image is not None
  key = answer.file, str(size_text(answer.size))  # type: ignore[arg-type]
  if key in to.masks:
    picture_files.save(overlays.palette_image(answer.mask, classes), to.masks[key])
  if key in to.overlays:
    picture_files.save(overlays.overlay(answer.image, answer.mask, answer.rows), to.overlays[key])


# --- forms of an answer ---


def as_text(answer: Answer) -> str:
  """Returns lines for people: the classes with their colours, the largest first."""
  assert answer.size is not None
  lines = [outputs.heading(answer.file, answer.size, answer.ms)]
  for row in answer.rows:
    name = outputs.shown(row.name) or f"class {row.number}"
    lines.append(f"  {row.share:6.1%}  {class_colours.hex_colour(row.number)}  {name}")
  return "\n".join(lines)


def as_json(answer: Answer, to: Targets) -> str:
  """Returns a line of JSON; the classes with their shares of the pixels, the largest first."""
  if answer.error is not None:
    return json.dumps({"file": answer.file, "error": answer.error})
  size = answer.size
  assert size is not None
  key = answer.file, str(size_text(size))
  rows = [row_as_json(row) for row in answer.rows]
  line: Json = {"file": answer.file, "patch" if isinstance(size, Patch) else "seqhw": size}
  line |= {} if answer.ms is None else {"ms": round(answer.ms, 4)}
  for name, paths in (("mask", to.masks), ("overlay", to.overlays)):
    line |= {name: str(paths[key])} if key in paths else {}
  return json.dumps({**line, "classes": rows}, allow_nan=False)


def row_as_json(row: overlays.Row) -> Json:
  """Returns one class of an answer."""
  name = {"name": row.name} if row.name else {}
  colour = class_colours.hex_colour(row.number)
  return {"class": row.number, **name, "colour": colour, "share": round(row.share, 6)}
