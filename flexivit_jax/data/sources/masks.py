"""Images with masks: a PNG for each image, whose values are numbers of classes."""

import os
import pathlib
import struct
from collections.abc import Sequence

from flexivit_jax.data import class_names
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


def masks_source(
  *,
  split: str,
  data_dir: str | os.PathLike[str],
  images: str | None = None,
  masks: str | None = None,
  classes: str | None = None,
  num_classes: int | None = None,
  ignore: int = _IGNORE,
  on_bad: str = "raise",
  upright: bool = True,
) -> Source:
  """Images with masks, which are PNG files in a folder beside that of the images: see docs/annotated_data.md.

  A mask has the path of its image, with the suffix .png, and is grey or of a palette; its values are the numbers of the
  classes, or `ignore`. Records have `mask_ignore`.

  Args:
    split: a folder; see `images`.
    data_dir: holds the folders and the names of the classes.
    images, masks: folders below data_dir, in which {split} is the split's name. FOLDER/*END are its files that end so,
      and * stands for what image and mask have in common. None: the first pair that exists of images/{split} with
      masks/{split} or annotations/{split}, {split}/images with {split}/masks, {split} with {split}_masks.
    classes: the file with the names of the classes; None: classes.txt or classes.json.
    num_classes: instead of names.
    ignore: the value of pixels that count for no class. It may be that of a class, as in ADE20K's 0, "other".
    on_bad: "raise" where a row is bad; "skip" leaves it out.
    upright: turn images as their EXIF data say; masks are stored as they are seen.

  Raises:
    UserError: no such folders, no classes, bad rows.
  """
  check_on_bad(on_bad)
  root = data_root(data_dir)
  names, number = _classes(root, classes, num_classes)
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
    stored[part] = _rows(root, *folders, ignore, findings)
    left_out += findings.judge(on_bad)
  return annotated_source(
    "masks", split, root, stored, names, number, upright=upright, left_out=left_out
  )


def _classes(
  root: pathlib.Path, classes: str | None, num_classes: int | None
) -> tuple[tuple[str, ...] | None, int]:
  path = class_files.find(root, classes, _CLASSES)
  names = class_files.read(path) if path else None
  if names is None and num_classes is None:
    raise UserError(
      f"No class names in {root}: expected classes.txt with a name a line, or classes.json, or classes=FILE; or give"
      " num_classes=."
    )
  number = len(names) if num_classes is None else num_classes
  if number < 1 or (names is not None and number != len(names)):
    listed = f"{path} has {len(names)} names" if names else "expected 1 or more"
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
  root: pathlib.Path, images: str, masks: str, ignore: int, findings: Findings
) -> list[Row]:
  images, pictures = _chosen(root, images, None)
  masks, drawn = _chosen(root, masks, (".png",))
  if pictures and not pictures.keys() & drawn.keys():
    raise UserError(
      f"None of the {len(pictures):,} images in {root / images} has a mask in {root / masks}; expected, for the first,"
      f" {next(iter(pictures))}.png, or masks='FOLDER/*END.png'."
    )
  rows = []
  for stem in sorted(pictures.keys() | drawn.keys()):
    try:
      image = only(pictures.get(stem, []), "images")
      mask = os.path.join(masks, only(drawn.get(stem, []), "masks (.png)"))
      hw = _size(root / mask)
    except BadRowError as error:
      findings.bad.append(f"{stem}: {error}")
      continue
    values = {"mask": mask, "annotated_hw": hw, "mask_ignore": ignore}
    rows.append((os.path.join(images, image), values))
  return rows


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


def _size(path: pathlib.Path) -> HW:
  """Returns the size of a mask by its header, which is checked."""
  try:
    with path.open("rb") as file:
      head = file.read(33)
  except OSError as error:
    raise BadRowError(f"the mask cannot be read: {error.strerror}") from None
  if len(head) < 33 or head[:8] != _PNG or head[12:16] != b"IHDR":
    raise BadRowError("the mask is no PNG file")
  width, height, _, kind = struct.unpack(">IIBB", head[16:26])
  if kind not in (_GREY, _PALETTE):
    shown = _KINDS.get(kind, f"colour type {kind}")
    raise BadRowError(f"the mask has {shown}; expected grey or palette, whose values are classes")
  if not width or not height:
    raise BadRowError(f"the mask is {width} wide and {height} high")
  return height, width
