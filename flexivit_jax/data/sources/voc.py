"""Boxes in Pascal VOC's XML."""

import contextlib
import functools
import itertools
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple
from xml.etree import ElementTree
from xml.parsers import expat

from flexivit_jax.data import class_names
from flexivit_jax.data.sources import class_files
from flexivit_jax.data.sources.annotated import (
  HW,
  BadRowError,
  Corners,
  Files,
  Findings,
  Row,
  annotated_source,
  boxes_of,
  by_stem,
  check_on_bad,
  data_root,
  file_hw,
  fitted,
  only,
  stated_hw,
)
from flexivit_jax.data.sources.base import Source
from flexivit_jax.data.splits import split_names
from flexivit_jax.errors import UserError, unknown

_CLASSES = ("classes.txt", "classes.json", "labels.txt")
_ANNOTATIONS, _IMAGES = "Annotations", "JPEGImages"
_LINE = "line"  # attribute of each element: the line where it begins


def voc_source(
  *,
  split: str,
  data_dir: str | os.PathLike[str],
  classes: str | None = None,
  on_bad: str = "raise",
  upright: bool = True,
) -> Source:
  """Images in JPEGImages with boxes in Annotations/*.xml, as Pascal VOC has them: see docs/annotated_data.md.

  Corners of the files are pixels counted from 1, both included; ours are edges: x0 = xmin - 1, x1 = xmax. Ids of boxes
  number the objects of a file, from 1.

  Args:
    split: a file ImageSets/Main/SPLIT.txt with a name without suffix a line; `all`: every file of Annotations.
    data_dir: holds Annotations, JPEGImages and perhaps ImageSets (VOC2012, for instance).
    classes: the file with the names of the classes; None: classes.txt, classes.json or labels.txt if one is there, else
      the names in all files of Annotations, in the order of text.
    on_bad: "raise" where a row is bad; "skip" leaves it out.
    upright: turn images as their EXIF data say.

  Raises:
    UserError: a folder or the split is missing, bad rows.
  """
  check_on_bad(on_bad)
  root = data_root(data_dir)
  paths = by_stem(_folder(root, _ANNOTATIONS), (".xml",))
  images, files = by_stem(_folder(root, _IMAGES)), Files(root)
  parse = functools.cache(functools.partial(_parse, root / _ANNOTATIONS))
  path = class_files.find(root, classes, _CLASSES)
  names = class_files.read(path) if path else _names_in(paths, parse, root)
  label_of = {class_names.plain(name): label for label, name in enumerate(names)}
  stored: dict[str, list[Row]] = {}
  left_out: list[str] = []
  for part in split_names(split):
    findings = Findings(str(root / _ANNOTATIONS))
    stored[part] = []
    for stem, row in _stems(root, part, paths, findings).items():
      try:
        file = only(paths.get(stem, []), "annotations")
        xml = parse(file)
        image = _image(stem, xml, images, files)
        hw = stated_hw(*xml.hw) or file_hw(root / image, upright)
        boxes = _boxes(xml, file, hw, label_of, findings)
        stored[part].append((image, boxes))
      except BadRowError as error:
        findings.bad.append(f"{row}: {error}")
    left_out += findings.judge(on_bad)
  return annotated_source(
    "voc", split, root, stored, names, len(names), upright=upright, left_out=left_out
  )


class _Object(NamedTuple):
  """An object of a file as it is written: the texts are not checked."""

  line: int
  name: str
  corners: tuple[str | None, ...]
  difficult: str


class _Xml(NamedTuple):
  """A file: height and width where they are stated, the file name of the image, the objects."""

  hw: tuple[int | None, int | None]
  filename: str
  objects: tuple[_Object, ...]


def _folder(root: pathlib.Path, name: str) -> pathlib.Path:
  if not (root / name).is_dir():
    raise UserError(
      f"No folder {root / name}; expected {_ANNOTATIONS}/*.xml and {_IMAGES}/*.jpg below data_dir, as Pascal VOC has"
      " them."
    )
  return root / name


def _names_in(
  paths: Mapping[str, list[str]], parse: Callable[[str], _Xml], root: pathlib.Path
) -> tuple[str, ...]:
  """Returns the names of all objects in all files; files that cannot be read are reported with their split."""
  names: set[str] = set()
  for path in itertools.chain.from_iterable(paths.values()):
    with contextlib.suppress(BadRowError):
      names.update(class_names.plain(found.name) for found in parse(path).objects if found.name)
  if not names:
    raise UserError(f"No file of {root / _ANNOTATIONS} names an object; give the names: classes=.")
  return tuple(sorted(names))


def _stems(
  root: pathlib.Path, split: str, paths: Mapping[str, list[str]], findings: Findings
) -> dict[str, str]:
  """Returns the paths without suffix of a split's files, each with the row for messages."""
  lists = root / "ImageSets" / "Main"
  path = lists / f"{split}.txt"
  if not path.is_file():
    if split == "all":
      return {stem: files[0] for stem, files in paths.items()}
    known = [found.stem for found in lists.glob("*.txt")] if lists.is_dir() else []
    raise unknown(f"split of {lists}", split, [*known, "all"])
  stems: dict[str, str] = {}
  for line, text in enumerate(class_files.read_text(path).split("\n"), 1):
    if not text.strip():
      continue
    stem, row = _stem(text.strip(), paths), f"{path.name} line {line} ({text.strip()})"
    if stem in stems:
      findings.bad.append(f"{row}: {stems[stem]} is the same")
    else:
      stems[stem] = row
  return stems


def _stem(text: str, paths: Mapping[str, list[str]]) -> str:
  """Returns the name in a line, which may have a suffix, or a flag behind it (as in aeroplane_train.txt)."""
  text = class_names.plain(text.replace("\\", "/"))
  name, _, flag = text.rpartition(" ")
  if text not in paths and flag in ("-1", "0", "1"):
    text = name.strip()
  return text if text in paths else os.path.splitext(text)[0]


def _image(stem: str, xml: _Xml, images: Mapping[str, list[str]], files: Files) -> str:
  """Returns the path of the image below data_dir: that of the same name, else the one that the file names."""
  if stem in images:
    return os.path.join(_IMAGES, only(images[stem], "images"))
  if not xml.filename:
    raise BadRowError(f"no image {stem} in {_IMAGES}")
  return files.find(xml.filename.replace("\\", "/").rpartition("/")[2], _IMAGES)


def _boxes(
  xml: _Xml, file: str, hw: HW, label_of: Mapping[str, int], findings: Findings
) -> dict[str, Any]:
  corners, labels, ids, difficult = [], [], [], []
  for number, found in enumerate(xml.objects, 1):
    try:
      label = label_of.get(class_names.plain(found.name))
      if label is None:
        raise BadRowError(f"no class is called {found.name!r}")
      if found.difficult not in ("0", "1"):
        raise BadRowError(f"difficult is {found.difficult!r}; expected 0 or 1")
      box = _edges(found.corners)
      inside = fitted(box, hw)
    except BadRowError as error:
      findings.bad.append(f"{file} line {found.line} (object {number}): {error}")
      continue
    findings.clipped += inside != box
    corners.append(inside)
    labels.append(label)
    ids.append(number)
    difficult.append(found.difficult == "1")
  return {**boxes_of(corners, labels, ids, difficult=difficult), "annotated_hw": hw}


def _edges(texts: tuple[str | None, ...]) -> Corners:
  """Returns the edges of a box whose corner pixels are counted from 1 and included."""
  try:
    xmin, ymin, xmax, ymax = (float(text or "") for text in texts)
  except ValueError:
    raise BadRowError(f"bndbox has {texts!r:.80}; expected xmin, ymin, xmax, ymax") from None
  return xmin - 1, ymin - 1, xmax, ymax


def _parse(folder: pathlib.Path, path: str) -> _Xml:
  root = _read_xml(folder / path)

  def text(element: ElementTree.Element | None, key: str) -> str:
    return "" if element is None else (element.findtext(key) or "").strip()

  def side(key: str) -> int | None:
    found = text(root.find("size"), key)
    if found and not found.isdecimal():
      raise BadRowError(f"the {key} in size is {found!r:.80}")
    return int(found) if found else None

  objects = [
    _Object(
      int(element.get(_LINE, 0)),
      text(element, "name"),
      tuple(text(element.find("bndbox"), key) for key in ("xmin", "ymin", "xmax", "ymax")),
      text(element, "difficult") or "0",
    )
    for element in root.findall("object")
  ]
  return _Xml((side("height"), side("width")), text(root, "filename"), tuple(objects))


def _read_xml(path: pathlib.Path) -> ElementTree.Element:
  """Returns the root of an XML file; every element has its line. Document types are refused, and so are entities.

  An entity can name another file or expand to gigabytes, and VOC's files have none.
  """
  builder, parser = ElementTree.TreeBuilder(), expat.ParserCreate()

  def start(tag: str, attributes: dict[str, str]) -> None:
    builder.start(tag, {**attributes, _LINE: str(parser.CurrentLineNumber)})

  def refuse(*_: object) -> None:
    raise BadRowError("the file declares a document type, which is not read: remove <!DOCTYPE ...>")

  parser.StartElementHandler, parser.EndElementHandler = start, builder.end
  parser.CharacterDataHandler, parser.StartDoctypeDeclHandler = builder.data, refuse
  try:
    parser.Parse(path.read_bytes(), True)
  except expat.ExpatError as error:
    raise BadRowError(f"the file is not XML: {error}") from None
  except OSError as error:
    raise BadRowError(f"the file cannot be read: {error.strerror}") from None
  return builder.close()
