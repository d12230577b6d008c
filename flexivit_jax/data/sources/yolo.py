"""Boxes in YOLO's text files."""

import math
import os
import pathlib
from collections.abc import Sequence
from typing import Any

from flexivit_jax.data.sources import class_files
from flexivit_jax.data.sources.annotated import (
  BadRowError,
  Corners,
  Findings,
  Row,
  annotated_source,
  boxes_of,
  by_stem,
  check_on_bad,
  data_root,
  filled,
  fitted,
  only,
)
from flexivit_jax.data.sources.base import Source
from flexivit_jax.data.splits import split_names
from flexivit_jax.errors import UserError

_LAYOUTS = (
  ("images/{split}", "labels/{split}"),
  ("{split}/images", "{split}/labels"),
  ("{split}", "{split}"),
)
_CLASSES = ("data.yaml", "data.yml", "dataset.yaml", "classes.txt", "classes.json")
# Files that tools put between the labels; they are of no image.
_NO_LABELS = frozenset(("classes", "labels", "obj"))
_SLACK = 1e-3  # of a side: what rounding to three digits does to an edge


def yolo_source(
  *,
  split: str,
  data_dir: str | os.PathLike[str],
  classes: str | None = None,
  on_bad: str = "raise",
  upright: bool = True,
) -> Source:
  """Images with boxes in text files, `CLASS CX CY W H` a line in fractions of the sides: see docs/annotated_data.md.

  The images are in images/SPLIT and the labels in labels/SPLIT, or in SPLIT/images and SPLIT/labels, or both in SPLIT.
  A file of labels has the path of its image, with the suffix .txt. An image without one has no boxes. Of a polygon
  (`CLASS X1 Y1 X2 Y2 X3 Y3 ...`) the bounding box is taken. Ids of boxes are their line numbers, from 1.

  Args:
    split: a folder, as above.
    data_dir: holds the folders and data.yaml, whose `names` are the classes.
    classes: another file with the names of the classes; see `class_files.read`.
    on_bad: "raise" where a row is bad; "skip" leaves it out.
    upright: turn images as their EXIF data say.

  Raises:
    UserError: no folder of images, no names, bad rows, labels of keypoints.
  """
  check_on_bad(on_bad)
  root = data_root(data_dir)
  names = _class_names(root, classes)
  stored = {}
  left_out: list[str] = []
  for name in split_names(split):
    images, labels = _folders(root, name)
    findings = Findings(str(root / labels))
    stored[name] = _rows(root, images, labels, len(names), findings)
    left_out += findings.judge(on_bad)
  return annotated_source(
    "yolo",
    split,
    root,
    stored,
    names,
    len(names),
    upright=upright,
    left_out=left_out,
    relative=True,
  )


def _class_names(root: pathlib.Path, classes: str | None) -> tuple[str, ...]:
  path = class_files.find(root, classes, _CLASSES)
  if path is None:
    raise UserError(f"No class names in {root}: expected data.yaml with 'names: [...]'.")
  if path.suffix.lower() in (".yaml", ".yml") and "kpt_shape" in class_files.read_yaml(path):
    raise UserError(
      f"{path} has kpt_shape: labels of keypoints, whose lines could be taken for polygons. Write lines of five fields,"
      " and leave out kpt_shape."
    )
  return class_files.read(path)


def _folders(root: pathlib.Path, split: str) -> tuple[str, str]:
  """Returns the folders of the images and of the labels of a split, below data_dir."""
  for layout in _LAYOUTS:
    images, labels = (filled(pattern, split) for pattern in layout)
    if (root / images).is_dir():
      if not (root / labels).is_dir():
        raise UserError(f"{root / images} has no labels: expected the folder {root / labels}.")
      return images, labels
  looked = " or ".join(filled(images, split) for images, _ in _LAYOUTS)
  above = root / "images" if (root / "images").is_dir() else root
  there = sorted(path.name for path in above.iterdir() if path.is_dir())
  raise UserError(f"No folder {looked} in {root}; {above} has {', '.join(there) or 'no folder'}.")


def _rows(
  root: pathlib.Path, images: str, labels: str, num_classes: int, findings: Findings
) -> list[Row]:
  files, texts = by_stem(root / images, say=True), by_stem(root / labels, (".txt",))
  if files and not texts.keys() & files.keys():
    raise UserError(
      f"None of the {len(files):,} images in {root / images} has labels in {root / labels}; expected, for the first,"
      f" {next(iter(files))}.txt."
    )
  rows = []
  for stem, paths in files.items():
    try:
      image = only(paths, "images")
      label = texts.get(stem)
      lines = _lines(root / labels / only(label, "files of labels")) if label else []
    except BadRowError as error:
      findings.bad.append(f"{stem}: {error}")
      continue
    boxes = _boxes(lines, f"{stem}.txt", num_classes, findings)
    rows.append((os.path.join(images, image), boxes))
  for stem in sorted(texts.keys() - files.keys()):
    if os.path.basename(stem) not in _NO_LABELS:
      findings.bad.append(f"{stem}.txt: no image {stem} in {images}")
  return rows


def _lines(path: pathlib.Path) -> list[str]:
  try:
    return class_files.read_text(path).split("\n")
  except UserError as error:
    raise BadRowError(str(error)) from None


def _boxes(lines: Sequence[str], name: str, num_classes: int, findings: Findings) -> dict[str, Any]:
  corners, labels, ids = [], [], []
  for line, text in enumerate(lines, 1):
    if not text.strip():
      continue
    try:
      label, box = _box(text.split(), num_classes)
      inside = fitted(box, (1.0, 1.0), _SLACK)
    except BadRowError as error:
      findings.bad.append(f"{name} line {line}: {error}")
      continue
    # A side of 1 in steps of 1e-6 may miss the edge of the image by one step: that is no finding.
    findings.clipped += any(abs(a - b) > 1e-5 for a, b in zip(box, inside, strict=True))
    corners.append(inside)
    labels.append(label)
    ids.append(line)
  return boxes_of(corners, labels, ids)


def _box(fields: Sequence[str], num_classes: int) -> tuple[int, Corners]:
  """Returns the class and the corners, as fractions, of one line."""
  if len(fields) != 5 and (len(fields) < 7 or len(fields) % 2 == 0):
    raise BadRowError(
      f"{len(fields)} fields; expected 'class cx cy w h', or a class and three or more points"
    )
  try:
    values = [float(field) for field in fields]
  except ValueError:
    raise BadRowError(f"{' '.join(fields)!r:.80} are not numbers") from None
  if not all(map(math.isfinite, values)):
    raise BadRowError(f"{' '.join(fields)!r:.80} are not finite")
  label = int(values[0])
  if label != values[0] or not 0 <= label < num_classes:
    raise BadRowError(f"the class is {fields[0]}; expected 0..{num_classes - 1}")
  if len(fields) == 5:
    cx, cy, w, h = values[1:]
    return label, (cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2)
  xs, ys = values[1::2], values[2::2]
  return label, (min(xs), min(ys), max(xs), max(ys))
