"""Images with masks: a PNG for each image, whose values are numbers of classes, or whose colours stand for classes."""

import dataclasses
import os
import pathlib
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from flexivit_jax.data import class_names, images as image_files, mask_labels
from flexivit_jax.data.sources import class_files
from flexivit_jax.data.sources.annotated import (
  HW,
  BadRowError,
  Findings,
  Row,
  annotated_source,
  by_stem,
  check_on_bad,
  data_root,
  filled,
  only,
  warn,
)
from flexivit_jax.data.sources.base import Source
from flexivit_jax.data.splits import split_names
from flexivit_jax.errors import UserError

_LAYOUTS = (
  ("images/{split}", "masks/{split}"),
  ("images/{split}", "annotations/{split}"),
  ("{split}/images", "{split}/masks"),
  ("{split}", "{split}_masks"),
)
_CLASSES = ("classes.txt", "classes.json")
_IGNORE = 255
_PNG = b"\x89PNG\r\n\x1a\n"
_GREY, _PALETTE = 0, 3  # colour types of PNG
_KINDS = {2: "colours", 4: "grey and alpha", 6: "colours and alpha"}
_EXPECTED = "expected grey or palette, whose values are classes"
_ADE20K = "objectInfo150.txt"  # ADE20K's own table; the last column is "Name"
Colors = str | Mapping[str, Any]


def masks_source(
  *,
  split: str,
  data_dir: str | os.PathLike[str],
  images: str | None = None,
  masks: str | None = None,
  classes: str | Sequence[str] | None = None,
  num_classes: int | None = None,
  ignore: int = _IGNORE,
  labels: str | None = None,
  colors: Colors | None = None,
  on_bad: str = "raise",
  upright: bool = True,
) -> Source:
  """Images with masks, which are PNG files in a folder beside that of the images: see docs/annotated_data.md.

  A mask has the path of its image, with the suffix .png, and is grey or of a palette; its values are the numbers of the
  classes, or `ignore`. With `colors` it may have any colours.

  Args:
    split: a folder; see `images`.
    data_dir: holds the folders and the names of the classes.
    images, masks: folders below data_dir, in which {split} is the split's name. FOLDER/*END are its files that end so,
      and * stands for what image and mask have in common. None: the first pair that exists of images/{split} with
      masks/{split} or annotations/{split}, {split}/images with {split}/masks, {split} with {split}_masks.
    classes: the names of the classes in the order of their numbers, or the file with them; None: classes.txt or
      classes.json.
    num_classes: instead of names.
    ignore: the value of pixels that count for no class. It may be that of a class.
    labels: what the values are: "zero_is_ignore", 0 for no class and the classes from 1 (ADE20K); "train_ids",
      Cityscapes' 34 label ids, of which 19 are classes. None: numbers of classes.
    colors: what the colours stand for, {name: [r, g, b]}, or a file; see `class_files.read_colors`. The classes are its
      names, or those of the file of classes; then other names are of no class.
    on_bad: "raise" where a row is bad; "skip" leaves it out.
    upright: turn images as their EXIF data say; masks are stored as they are seen.

  Raises:
    UserError: no such folders, no classes, bad rows.
  """
  check_on_bad(on_bad)
  root = data_root(data_dir)
  named = class_files.read_colors(colors, root) if colors is not None else None
  if named is not None and (labels is not None or ignore != _IGNORE):
    raise UserError(
      "colors= with labels= or ignore=, which are about numbers; a colour counts for no class if its name is none of"
      " the file of classes (classes.txt, classes=)."
    )
  known = mask_labels.convention(labels).names if labels else None
  names, number = _classes(root, classes, num_classes, known or (tuple(named) if named else None))
  if labels == "train_ids" and masks is not None and "TrainIds" in masks:
    raise UserError(
      f"labels='train_ids' maps label ids, and {masks} has training ids: without labels=."
    )
  said: dict[str, Any] = {"mask_ignore": ignore} | ({"mask_labels": labels} if labels else {})
  if named is not None:
    said = {"mask_colors": mask_labels.color_table(named, names or ())}
    others = [name for name in named if name not in (names or ())]
    if others:
      warn(f"{root}: of no class are the pixels in the colours of {', '.join(others)}.")
  if not 0 <= ignore < 2**16 or (ignore == _IGNORE and number > _IGNORE):
    raise UserError(
      f"ignore={ignore} with {number} classes; expected 0 to 65535, and of more than {_IGNORE} classes another than"
      f" {_IGNORE}."
    )
  stored = {}
  left_out: list[str] = []
  for part in split_names(split):
    folders = _folders(root, part, images, masks)
    findings = Findings(str(root / folders[1]))
    stored[part] = _rows(root, *folders, said, findings)
    left_out += findings.judge(on_bad)
  return annotated_source(
    "masks", split, root, stored, names, number, upright=upright, left_out=left_out
  )


def ade20k_source(
  *, split: str, data_dir: str | os.PathLike[str], on_bad: str = "raise", upright: bool = False
) -> Source:
  """ADE20K's 150 classes, as the folder ADEChallengeData2016 has them, by `masks_source`.

  Args:
    split: "training" or "validation".
    data_dir: holds images/, annotations/ and objectInfo150.txt, which names the classes.
    on_bad, upright: see `masks_source`.
  """
  root = data_root(data_dir)
  table = root / _ADE20K
  source = masks_source(
    split=split,
    data_dir=root,
    images="images/{split}",
    masks="annotations/{split}",
    num_classes=150,
    labels="zero_is_ignore",
    on_bad=on_bad,
    upright=upright,
  )
  if source.class_names is None and table.is_file():
    rows = [line.split("\t") for line in class_files.read_text(table).strip().split("\n")]
    names = [row[-1].strip() for row in rows if row[-1].strip() != "Name"]
    if len(names) != source.num_classes:
      raise UserError(f"{table} has {len(names)} names; expected {source.num_classes}.")
    source = dataclasses.replace(source, class_names=class_files.checked(names, str(table)))
  return dataclasses.replace(source, name="ade20k")


def cityscapes_source(
  *, split: str, data_dir: str | os.PathLike[str], on_bad: str = "raise", upright: bool = False
) -> Source:
  """Cityscapes' 19 classes, of its folders leftImg8bit and gtFine, by `masks_source`.

  Args:
    split: "train" or "val".
    data_dir: holds the two folders; the masks are *_gtFine_labelIds.png, as they are published.
    on_bad, upright: see `masks_source`.
  """
  source = masks_source(
    split=split,
    data_dir=data_dir,
    images="leftImg8bit/{split}/*_leftImg8bit.png",
    masks="gtFine/{split}/*_gtFine_labelIds.png",
    labels="train_ids",
    on_bad=on_bad,
    upright=upright,
  )
  return dataclasses.replace(source, name="cityscapes")


def _classes(
  root: pathlib.Path,
  classes: str | Sequence[str] | None,
  num_classes: int | None,
  known: tuple[str, ...] | None,
) -> tuple[tuple[str, ...] | None, int]:
  """Returns the names of the classes and their number; `known` are those of a convention, or of colours."""
  path = None
  if classes is None or isinstance(classes, str):
    path = class_files.find(root, classes, _CLASSES)
    names = class_files.read(path) if path else known
  else:
    names = class_files.checked(tuple(classes), "classes")
  if names is None and num_classes is None:
    raise UserError(
      f"No class names in {root}: expected classes.txt with a name a line, or classes.json, or classes=FILE; or give"
      " num_classes=."
    )
  number = len(names) if num_classes is None else num_classes
  if number < 1 or (names is not None and number != len(names)):
    listed = f"{path or 'the masks'} has {len(names)} names" if names else "expected 1 or more"
    raise UserError(f"num_classes={num_classes}; {listed}.")
  return names, number


def _folders(
  root: pathlib.Path, split: str, images: str | None, masks: str | None
) -> tuple[str, str]:
  if (images is None) != (masks is None):
    raise UserError("Give both images= and masks=, or neither.")
  layouts = _LAYOUTS if images is None else ((images, masks),)
  pairs = [(filled(a, split), filled(b, split)) for a, b in layouts]
  for pair in pairs:
    if all((root / pattern.partition("*")[0]).is_dir() for pattern in pair):
      return pair
  looked = ", ".join(f"{a} with {b}" for a, b in pairs)
  there = sorted(path.name for path in root.iterdir() if path.is_dir())
  raise UserError(
    f"No folders of images and masks of split {split!r} in {root}: looked for {looked}; it has"
    f" {', '.join(there) or 'no folder'}. Give images='FOLDER/{{split}}', masks='FOLDER/{{split}}'."
  )


def _rows(
  root: pathlib.Path, images: str, masks: str, said: Mapping[str, Any], findings: Findings
) -> list[Row]:
  images, pictures = _chosen(root, images, None)
  masks, drawn = _chosen(root, masks, (".png",))
  if pictures and not pictures.keys() & drawn.keys():
    raise UserError(
      f"None of the {len(pictures):,} images in {root / images} has a mask in {root / masks}; expected, for the first,"
      f" {next(iter(pictures))}.png, or masks='FOLDER/*END.png'."
    )
  rows: list[Row] = []
  shown = ""
  for stem in sorted(pictures.keys() | drawn.keys()):
    try:
      image = only(pictures.get(stem, []), "images")
      mask = os.path.join(masks, only(drawn.get(stem, []), "masks (.png)"))
      hw, kind = _head(root / mask)
      if kind in _KINDS and "mask_colors" not in said:
        shown = shown or _colors_in(root / mask)  # of the first one only: a mask has to be decoded
        raise BadRowError(f"the mask has {_KINDS[kind]}; {_EXPECTED}{shown}")
    except BadRowError as error:
      findings.bad.append(f"{stem}: {error}")
      shown = shown and " (as above)"
      continue
    rows.append((os.path.join(images, image), {"mask": mask, "annotated_hw": hw, **said}))
  return rows


def _colors_in(path: pathlib.Path) -> str:
  """Returns what to do about a mask of colours, and which it has."""
  try:
    colors = image_files.decode_mask_colors(path.read_bytes(), max_pixels=2**26)
  except (OSError, SyntaxError, ValueError):
    return ""
  first = mask_labels.rgb(int(np.unique(colors)[0]))
  return (
    f". Its colours: {mask_labels.shown(colors)}. Give colors=FILE with a name for each, or colors={{'sky':"
    f" {list(first)}, ...}}"
  )


def _chosen(
  root: pathlib.Path, pattern: str, suffixes: Sequence[str] | None
) -> tuple[str, dict[str, list[str]]]:
  """Returns the folder of a pattern FOLDER or FOLDER/*END, and its files by what image and mask have in common."""
  folder, _, end = pattern.replace("**/", "").partition("*")
  if "*" in end or "/" in end:
    raise UserError(f"Cannot read {pattern!r}; expected FOLDER, or FOLDER/*END.")
  folder = folder.rstrip("/")
  found = by_stem(root / folder, suffixes, say=suffixes is None)
  if not end:
    return folder, found
  paths = (path for paths in found.values() for path in paths if path.endswith(end))
  return folder, {class_names.plain(path.removesuffix(end)): [path] for path in paths}


def _head(path: pathlib.Path) -> tuple[HW, int]:
  """Returns the size of a mask and its colour type by its header, which is checked."""
  try:
    with path.open("rb") as file:
      head = file.read(33)
  except OSError as error:
    raise BadRowError(f"the mask cannot be read: {error.strerror}") from None
  if len(head) < 33 or head[:8] != _PNG or head[12:16] != b"IHDR":
    raise BadRowError("the mask is no PNG file")
  width, height, _, kind = struct.unpack(">IIBB", head[16:26])
  if kind not in (_GREY, _PALETTE, *_KINDS):
    raise BadRowError(f"the mask has colour type {kind}; {_EXPECTED}")
  if not width or not height:
    raise BadRowError(f"the mask is {width} wide and {height} high")
  return (height, width), kind
