"""What rows of an eval.json hold beside numbers: tables of classes, and samples to look at."""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int

from flexivit_jax.report import fields
from flexivit_jax.report.fields import Json
from flexivit_jax.report.rows import EvalRow, ImageSample, Key, key_of


def tables_of(
  data: Json, rows: Sequence[EvalRow], file: Path
) -> tuple[tuple[str, ...], dict[Key, Int[np.ndarray, "k k"]]]:
  """Returns the names of the classes and the tables "confusion" of the rows that have one.

  Args:
    data: of the file.
    rows: read from it, in its order.
    file: for errors.

  Raises:
    UserError: a table that is no square of counts, whose counts are not those of the row, or of other classes.
  """
  confusions: dict[Key, np.ndarray] = {}
  for i, item in enumerate(data["rows"]):
    if item.get("confusion") is None:
      continue
    at, row = f"rows[{i}].", rows[i]
    counts = np.array(fields.get(item, "confusion", list, file, at), object)
    square = counts.ndim == 2 and counts.shape[0] == counts.shape[1]
    if not square or not all(type(n) is int and n >= 0 for n in counts.flat):
      raise fields.bad(file, f"{at}confusion", "no table", "k lists of k counts")
    counts = counts.astype(np.int64)
    rest = item.get("unlabelled", 0)
    if counts.sum() + rest != row.n:
      raise fields.bad(
        file, f"{at}confusion", f"a table of {counts.sum()}", f"counts of {row.n} images"
      )
    confusions[key_of(row)] = counts
  sizes = {len(counts) for counts in confusions.values()}
  if not sizes:
    return (), {}
  if len(sizes) > 1:
    raise fields.bad(
      file, "classes", f"of {sorted(sizes)} rows", "one name for each row of each table"
    )
  return names_of(data, max(sizes), file), confusions


def names_of(data: Json, k: int, file: Path) -> tuple[str, ...]:
  """Returns the names of k classes; their numbers where the file has none."""
  classes = data.get("classes") or [str(number) for number in range(k)]
  named = isinstance(classes, list) and all(isinstance(name, str) for name in classes)
  if not named or len(classes) != k:
    raise fields.bad(file, "classes", f"of {k} rows", "one name for each row of each table")
  return tuple(classes)


def segments_of(
  data: Json, rows: Sequence[EvalRow], file: Path
) -> tuple[dict[Key, tuple[float | None, ...]], tuple[int, ...], dict[Key, tuple[Path, ...]]]:
  """Returns what rows of segmentation hold of classes: `ious`, `pixels` and `samples` of a `ReportRun`.

  Raises:
    UserError: see `of_classes` and `samples_of`.
  """
  ious, pixels = of_classes(data, rows, file, "class_iou", "class_pixels")
  return ious, pixels, samples_of(data, rows, file, "class_iou", "png")


def of_classes(
  data: Json, rows: Sequence[EvalRow], file: Path, key: str, counted: str
) -> tuple[dict[Key, tuple[float | None, ...]], tuple[int, ...]]:
  """Returns the values of the classes of the rows that have them, and what there is of each class.

  Args:
    data: of the file.
    rows: read from it, in its order.
    file: for errors.
    key: of the values.
    counted: of the counts.

  Raises:
    UserError: lists that are not of one length, values that cannot be.
  """
  found: dict[Key, tuple[float | None, ...]] = {}
  all_counts: tuple[int, ...] = ()
  for i, (item, row) in enumerate(zip(data["rows"], rows, strict=True)):
    if item.get(key) is None:
      continue
    at = f"rows[{i}]."
    values, counts = (fields.get(item, name, list, file, at) for name in (key, counted))
    if not all(v is None or ((type(v) is float or v in (0, 1)) and 0 <= v <= 1) for v in values):
      raise fields.bad(file, f"{at}{key}", values, "numbers from 0 to 1, or null")
    if not all(type(n) is int and n >= 0 for n in counts) or len(counts) != len(values):
      raise fields.bad(file, f"{at}{counted}", counts, f"as many counts as {key} has")
    if all_counts and all_counts != tuple(counts):
      raise fields.bad(file, f"{at}{counted}", counts, "those of the other rows")
    all_counts, found[key_of(row)] = tuple(counts), tuple(values)
  return found, all_counts


def samples_of(
  data: Json, rows: Sequence[EvalRow], file: Path, key: str, suffix: str
) -> dict[Key, tuple[Path, ...]]:
  """Returns the pictures that rows name, of those rows that have `key`.

  Raises:
    UserError: samples that are no names of pictures.
  """
  samples: dict[Key, tuple[Path, ...]] = {}
  for i, (item, row) in enumerate(zip(data["rows"], rows, strict=True)):
    if item.get(key) is None:
      continue
    names = item.get("samples") or []
    # Names come from a file that may be anybody's: they stay in the folder.
    named = isinstance(names, list) and all(isinstance(name, str) for name in names)
    if not named or not all(re.fullmatch(rf"\d+_[\w=]+\.{suffix}", name) for name in names):
      raise fields.bad(file, f"rows[{i}].samples", names, f"names such as 0_15x20.{suffix}")
    samples[key_of(row)] = tuple(samples_folder(file) / name for name in names)
  return samples


def images_of(
  data: Json, rows: Sequence[EvalRow], file: Path
) -> dict[Key, tuple[ImageSample, ...]]:
  """Returns the samples of rows of classification that have some.

  Raises:
    UserError: samples that are not described as `evaluators.image_samples` does, or not of the same images in all rows.
  """
  found: dict[Key, tuple[ImageSample, ...]] = {}
  for i, (item, row) in enumerate(zip(data["rows"], rows, strict=True)):
    if not item.get("samples"):
      continue
    at = f"rows[{i}].samples"
    samples = fields.get(item, "samples", list, file, f"rows[{i}].")
    made = tuple(_image(one, file, f"{at}[{k}]") for k, one in enumerate(samples))
    first = next(iter(found.values()), made)
    if [(one.file, one.label) for one in made] != [(one.file, one.label) for one in first]:
      raise fields.bad(file, at, "of other images", "the images of the other rows")
    found[key_of(row)] = made
  return found


def _image(item: object, file: Path, at: str) -> ImageSample:
  if not isinstance(item, dict):
    raise fields.bad(file, at, item, "an object")
  numbers = {
    key: fields.get(item, key, int, file, f"{at}.") for key in ("id", "label", "predicted")
  }
  for key, number in numbers.items():
    if isinstance(number, bool) or not -(key == "label") <= number <= fields.LARGEST:
      raise fields.bad(file, f"{at}.{key}", number, "a number of an image or a class")
  label = None if numbers["label"] < 0 else numbers["label"]
  picture = samples_folder(file) / f"{numbers['id']}.jpg"
  return ImageSample(
    picture, label, numbers["predicted"], fields.get(item, "right", bool, file, f"{at}.")
  )


def parts_of(item: Json, file: Path, at: str) -> dict[str, float]:
  """Returns the average precisions of boxes of some areas and of groups of classes, "ap_small" and "ap50_rare"."""
  names = [name for name in item if re.match(r"ap(50)?_", name)]
  return {name: fields.number(item, name, file, at, high=1.0) for name in names}


def samples_folder(file: Path) -> Path:
  """Where the pictures are that the rows of a file name, as `evaluators.results` writes them."""
  return file.with_name(f"{file.stem}_samples")
