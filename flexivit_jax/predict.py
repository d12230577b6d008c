"""`flexivit predict`: the five most likely classes of images, at a chosen patch size."""

import argparse
import pathlib
import statistics
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from flexivit_jax import compilation, data, errors, weights

_PP = "decode|resize({size})|value_range(-1, 1)"
_REPEATS = 5


class Prediction(NamedTuple):
  """(class index, its name, probability) of the most likely classes, and milliseconds of the forward pass."""

  top: list[tuple[int, str, float]]
  ms: float


def run(args: argparse.Namespace) -> None:
  """Prints the predictions for args.image."""
  compilation.keep_programs()
  for path, prediction in zip(
    args.image, predict(args.image, args.checkpoint, args.seqhw, args.image_size), strict=True
  ):
    print(f"{path}  (seqhw={args.seqhw}, {prediction.ms:.2f} ms)")
    for index, name, p in prediction.top:
      print(f"  {p:6.1%}  {name or index}")


def predict(
  images: Sequence[pathlib.Path],
  checkpoint: pathlib.Path,
  seqhw: int,
  image_size: int | None = None,
  k: int = 5,
) -> list[Prediction]:
  """Classifies image files with a checkpoint at one patch size.

  Args:
    images: image files, prepared as in the run's evaluation (other weights: squashed to a square of `image_size`).
    checkpoint: what `weights.load` takes.
    seqhw: tokens per side.
    image_size: pixels a side for weights that are of no run; default that of a fixed model, or 240 as in the paper.
    k: how many classes.

  Raises:
    UserError: an image that cannot be read, a size that does not divide it, `image_size` where it is known already.
  """
  model, params, record = weights.load_with_record(checkpoint)
  if record.get("pp") and image_size:
    raise errors.UserError(
      f"--image_size={image_size}: {checkpoint} says how to prepare its images; leave it out."
    )
  prepare = data.parse(record.get("pp") or _PP.format(size=image_size or _side(record))).upright()
  forward = jax.jit(
    lambda p, image: jax.nn.softmax(model.apply({"params": p}, image, seqhw=seqhw)[0])
  )
  names = record.get("class_names") or [""] * model.num_classes
  return [_one(forward, params, _read(path, prepare), names, k) for path in images]


def _side(record: dict[str, Any]) -> int:
  return (record.get("image_size") or [240])[0]


def _read(path: pathlib.Path, prepare: data.Preprocess) -> np.ndarray:
  try:
    encoded = path.read_bytes()
  except OSError as e:
    raise errors.UserError(f"{path} cannot be read: {e.strerror}.") from e
  # An evaluation's preprocessing also makes labels; there are none, so it is given class 0.
  return prepare({"image": encoded, "label": 0, "id": str(path)}, np.random.default_rng(0))[
    "image"
  ][None]


def _one(forward: Any, params: Any, image: np.ndarray, names: Sequence[str], k: int) -> Prediction:
  probs = np.asarray(forward(params, image))[0]
  times = []
  for _ in range(_REPEATS):
    begin = time.perf_counter()
    jax.block_until_ready(forward(params, image))
    times.append(time.perf_counter() - begin)
  top = np.argsort(-probs)[:k]
  return Prediction(
    [(int(i), names[i], float(probs[i])) for i in top], statistics.median(times) * 1e3
  )
