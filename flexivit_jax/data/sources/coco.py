"""Boxes and captions in COCO's JSON, and in LVIS's."""

import dataclasses
import os
import pathlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int64

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
  caption,
  check_on_bad,
  data_root,
  file_hw,
  filled,
  fitted,
  number,
  stated_hw,
  whole,
)
from flexivit_jax.data.sources.base import Source
from flexivit_jax.data.splits import split_names
from flexivit_jax.errors import UserError

_ANNOTATIONS = (
  "annotations/instances_{split}.json",
  "instances_{split}.json",
  "annotations/{split}.json",
  "{split}.json",
  "{split}/_annotations.coco.json",
  "annotations/captions_{split}.json",
  "captions_{split}.json",
)
_IMAGES = ("{split}", "images/{split}", "images", "")
_Json = Mapping[str, Any]
_STATED = {"neg_labels": "neg_category_ids", "not_exhaustive": "not_exhaustive_category_ids"}
_FREQUENCIES = {"r": "rare", "c": "common", "f": "frequent"}  # of LVIS
_LVIS = "lvis_v1_{split}.json"
_SHOWN = 5  # files of a long list
_TRIED = 1000  # images that tell which folder holds them


def coco_source(
  *,
  split: str,
  data_dir: str | os.PathLike[str],
  annotations: str | None = None,
  images: str | None = None,
  on_bad: str = "raise",
  upright: bool = True,
) -> Source:
  """Images with boxes, or with captions, in COCO's JSON: see docs/annotated_data.md.

  The classes are the file's categories in the order of their ids, whatever gaps these have. Images without annotations
  are kept, except in a file of captions. Of LVIS's files, `neg_category_ids` and `not_exhaustive_category_ids` become
  "neg_labels" and "not_exhaustive", `frequency` the groups of classes, and images without `file_name` have the folder
  and the name of their `coco_url`.

  Args:
    split: of the files that `annotations` names.
    data_dir: holds the files and the images.
    annotations: path below data_dir, in which {split} is the split's name; None: the first that exists of
      annotations/instances_{split}.json, instances_{split}.json, annotations/{split}.json, {split}.json,
      {split}/_annotations.coco.json, and captions_{split}.json.
    images: folder below data_dir that the file names start from; None: where they are of {split}, images/{split},
      images and data_dir.
    on_bad: "raise" where a row is bad; "skip" leaves it out.
    upright: turn images as their EXIF data say.

  Raises:
    UserError: no or a damaged file, bad rows, categories that differ between splits.
  """
  check_on_bad(on_bad)
  root = data_root(data_dir)
  files, stored, categories, groups = Files(root), {}, {}, {}
  left_out: list[str] = []
  for name in split_names(split):
    path = _find(root, annotations, name)
    content = _read(path)
    findings = Findings(str(path))
    folder = _images_folder(files, content["images"], images, name, path)
    if content["categories"]:
      categories[name] = _categories(content["categories"], path)
      groups[name] = _groups(content["categories"], path)
    entries = _images(content["images"], files, folder, categories.get(name, {}), findings)
    if content["categories"]:
      entries = _sized(entries, root, upright, findings)
      stored[name] = _with_boxes(content["annotations"], entries, categories[name], findings)
    else:
      stored[name] = _with_captions(content["annotations"], entries, findings)
    left_out += findings.judge(on_bad)
  names = _same(categories, stored)
  source = annotated_source(
    "coco", split, root, stored, names, len(names or ()), upright=upright, left_out=left_out
  )
  return dataclasses.replace(source, class_groups=_same_groups(groups))


def lvis_source(
  *, split: str, data_dir: str | os.PathLike[str], on_bad: str = "raise", upright: bool = True
) -> Source:
  """LVIS v1 by `coco_source`: lvis_v1_{split}.json, or annotations/lvis_v1_{split}.json, and COCO's images.

  Args:
    split: "train" or "val".
    data_dir: holds the file, and train2017/ and val2017/ or images/ with both.
    on_bad, upright: see `coco_source`.
  """
  root = data_root(data_dir)
  here = any(root.glob(filled(_LVIS, "*")))
  pattern = _LVIS if here else f"annotations/{_LVIS}"
  source = coco_source(
    split=split, data_dir=data_dir, annotations=pattern, on_bad=on_bad, upright=upright
  )
  return dataclasses.replace(source, name="lvis")


class _Entry(NamedTuple):
  """An image that can be used.

  Attributes:
    path: below data_dir.
    hw: its size as stated.
    row: its row in the file.
    stated: classes of which LVIS says more, by the key of the record.
  """

  path: str
  hw: HW | None
  row: str
  stated: Mapping[str, Int64[np.ndarray, " k"]]


# Image id -> image; None: the image is bad, and its annotations are left out with it.
_Entries = dict[int | str, _Entry | None]


def _find(root: pathlib.Path, annotations: str | None, split: str) -> pathlib.Path:
  patterns = _ANNOTATIONS if annotations is None else (annotations,)
  paths = [root / filled(pattern, split) for pattern in patterns]
  for path in paths:
    if path.is_file():
      return path
  there = sorted(
    path.relative_to(root).as_posix() for path in root.glob("**/*.json") if path.is_file()
  )
  has = f"It has {', '.join(there[:_SHOWN])}." if there else "It has no .json file."
  looked = ", ".join(filled(pattern, split) for pattern in patterns)
  raise UserError(
    f"No annotations of split {split!r} in {root}: looked for {looked}. {has} Give"
    " annotations='FOLDER/NAME_{split}.json'."
  )


def _read(path: pathlib.Path) -> dict[str, list[Any]]:
  """Returns the lists of a file; "categories" is empty in a file of captions."""
  content = class_files.read_json(path)
  if not isinstance(content, dict):
    kind = type(content).__name__
    raise UserError(f"{path} holds a JSON {kind}; expected an object with 'images', 'annotations'.")
  lists = {key: content.get(key) for key in ("images", "annotations")}
  lists["categories"] = content.get("categories") or []
  for key, value in lists.items():
    if not isinstance(value, list):
      raise UserError(f"{path}: {key!r} is {value!r:.40}; expected a list, as in COCO's files.")
  first = next(iter(lists["annotations"]), None)
  captions = isinstance(first, dict) and "caption" in first and "bbox" not in first
  if captions:
    lists["categories"] = []
  elif not lists["categories"]:
    raise UserError(f"{path} has neither categories, as for boxes, nor annotations with captions.")
  return lists


def _images_folder(
  files: Files, entries: Sequence[Any], images: str | None, split: str, path: pathlib.Path
) -> str:
  """Returns the folder, below data_dir, in which most of the first images are."""
  if images is not None:
    return filled(images, split)
  names = [_file_name(entry) for entry in entries[:_TRIED] if isinstance(entry, dict)]
  folders = [filled(pattern, split) for pattern in _IMAGES]
  found = {folder: sum(_is_there(files, name, folder) for name in names) for folder in folders}
  if names and not any(found.values()):
    raise UserError(
      f"None of the first {len(names)} images of {path} is in {files.root}, or its folders"
      f" {', '.join(folder for folder in folders if folder)}; the first is {names[0]!r:.200}. Give images='FOLDER'."
    )
  return max(folders, key=found.__getitem__)


def _file_name(entry: _Json) -> object:
  """Returns the name of an image's file; of LVIS, which has addresses of COCO's images, folder and name."""
  url = entry.get("coco_url")
  if entry.get("file_name") is None and isinstance(url, str):
    return "/".join(url.split("/")[-2:])
  return entry.get("file_name")


def _is_there(files: Files, name: object, folder: str) -> bool:
  try:
    files.find(name, folder)
  except BadRowError:
    return False
  return True


def _images(
  entries: Sequence[Any],
  files: Files,
  folder: str,
  categories: Mapping[int, str],
  findings: Findings,
) -> _Entries:
  """Returns the images by their id; of two with one id, or of one file, neither can be used."""
  label_of = {key: label for label, key in enumerate(categories)}
  federated = any(isinstance(e, dict) and any(k in e for k in _STATED.values()) for e in entries)
  ids = Counter(map(_id, entries))
  found: _Entries = {}
  row_of: dict[str, str] = {}
  for i, entry in enumerate(entries):
    row = f"images[{i}]"
    try:
      key = _id(entry)
      if key is None:
        raise BadRowError(f"{entry!r:.80}; expected an object with an id")
      row += f" (id {key!r})"
      found[key] = None
      if ids[key] > 1:
        raise BadRowError("several images have this id")
      path = files.find(_file_name(entry), folder)
      hw = stated_hw(entry.get("height"), entry.get("width"))
      if path in row_of:
        raise BadRowError(f"{path!r} is {row_of[path]}, too")
      stated = {k: _labels(entry, name, label_of) for k, name in _STATED.items() if federated}
      row_of[path] = row
      found[key] = _Entry(path, hw, row, stated)
    except BadRowError as error:
      findings.bad.append(f"{row}: {error}")
  return found


def _labels(entry: _Json, key: str, label_of: Mapping[int, int]) -> Int64[np.ndarray, " k"]:
  """Returns the classes of a list of ids of categories; none where there is no list."""
  ids = entry.get(key, [])
  if not isinstance(ids, list):
    raise BadRowError(f"{key} is {ids!r:.80}; expected a list of ids")
  numbers = [whole(i, f"an id of {key}") for i in ids]
  for i in numbers:
    if i not in label_of:
      raise BadRowError(f"no category has the id {i} ({key})")
  return np.array(sorted({label_of[i] for i in numbers}), np.int64)


def _id(entry: object, key: str = "id") -> int | str | None:
  """Returns the id under a key of an image or an annotation; None if there is none."""
  value = entry.get(key) if isinstance(entry, dict) else None
  if isinstance(value, float) and value.is_integer():
    return int(value)
  return value if isinstance(value, int | str) and not isinstance(value, bool) else None


def _sized(entries: _Entries, root: pathlib.Path, upright: bool, findings: Findings) -> _Entries:
  """Returns the images, each with its size: that of its header where the file states none."""
  sized = dict(entries)
  for key, entry in entries.items():
    if entry is not None and entry.hw is None:
      try:
        sized[key] = entry._replace(hw=file_hw(root / entry.path, upright))
      except BadRowError as error:
        findings.bad.append(f"{entry.row}: {error}")
        sized[key] = None
  return sized


def _categories(entries: Sequence[Any], path: pathlib.Path) -> dict[int, str]:
  """Returns id -> name, in the order of the ids."""
  names: dict[int, str] = {}
  for i, entry in enumerate(entries):
    where = f"{path}: categories[{i}]"
    key = entry.get("id") if isinstance(entry, dict) else None
    if not isinstance(key, int) or isinstance(key, bool):
      raise UserError(f"{where} is {entry!r:.80}; expected an object with a whole id and a name.")
    if key in names:
      raise UserError(f"{where}: the id {key} is that of {names[key]!r}, too.")
    names[key] = entry.get("name")
  names = dict(sorted(names.items()))
  class_files.checked(list(names.values()), f"{path} (categories)")
  return names


def _groups(entries: Sequence[Any], path: pathlib.Path) -> dict[str, tuple[int, ...]] | None:
  """Returns the classes of each of LVIS's frequencies; None: the file says none."""
  ordered = sorted(entries, key=lambda entry: entry["id"])
  if not any("frequency" in entry for entry in ordered):
    return None
  found: dict[str, list[int]] = {name: [] for name in _FREQUENCIES.values()}
  for label, entry in enumerate(ordered):
    if entry.get("frequency") not in _FREQUENCIES:
      raise UserError(
        f"{path}: the frequency of category {entry['id']} is {entry.get('frequency')!r:.40}; expected"
        f" {', '.join(map(repr, _FREQUENCIES))}, as LVIS has it, or none for any category."
      )
    found[_FREQUENCIES[entry["frequency"]]].append(label)
  return {name: tuple(labels) for name, labels in found.items()}


def _same_groups(
  groups: Mapping[str, Mapping[str, tuple[int, ...]] | None],
) -> Mapping[str, tuple[int, ...]] | None:
  first = next(iter(groups), None)
  for name, found in groups.items():
    if found != groups[first]:
      raise UserError(
        f"The splits {first!r} and {name!r} differ in the frequencies of their categories, so they cannot be joined."
      )
  return None if first is None else groups[first]


def _with_boxes(
  annotations: Sequence[Any], entries: _Entries, categories: Mapping[int, str], findings: Findings
) -> list[Row]:
  label_of = {key: label for label, key in enumerate(categories)}
  boxes: dict[int | str, list[_Box]] = {key: [] for key, entry in entries.items() if entry}
  taken: set[int] = set()
  for i, annotation in enumerate(annotations):
    row = f"annotations[{i}]"
    try:
      key, entry = _image_of(annotation, entries)
      if entry is None:
        continue
      number_of = whole(annotation.get("id"), "the id")
      row += f" (id {number_of})"
      if number_of in taken:
        raise BadRowError("an annotation before has this id")
      taken.add(number_of)
      box = _box(annotation, number_of, entry.hw or (0, 0), label_of, findings)
      if box[1] in entry.stated.get("neg_labels", ()):
        raise BadRowError(
          f"its category is among the neg_category_ids of {entry.row}, so is not in that image"
        )
      boxes[key].append(box)
    except BadRowError as error:
      findings.bad.append(f"{row}: {error}")
  rows = []
  for key, found in boxes.items():
    entry = entries[key]
    columns = zip(*found, strict=True) if found else ((), (), (), ())
    corners, labels, ids, crowd = map(list, columns)
    values = boxes_of(corners, labels, ids, crowd=crowd)
    rows.append((entry.path, {**values, **entry.stated, "annotated_hw": entry.hw}))
  return rows


_Box = tuple[Corners, int, int, bool]  # corners, label, id, crowd


def _box(
  annotation: _Json, number_of: int, hw: HW, label_of: Mapping[int, int], findings: Findings
) -> _Box:
  category = whole(annotation.get("category_id"), "category_id")
  if category not in label_of:
    raise BadRowError(f"no category has the id {category}")
  bbox = annotation.get("bbox")
  if not isinstance(bbox, list) or len(bbox) != 4:
    raise BadRowError(f"bbox is {bbox!r:.80}; expected x, y, width, height")
  x, y, w, h = (number(value, "a number of bbox") for value in bbox)
  corners = x, y, x + w, y + h
  crowd = annotation.get("iscrowd", 0)
  if crowd not in (0, 1):
    raise BadRowError(f"iscrowd is {crowd!r:.80}; expected 0 or 1")
  inside = fitted(corners, hw)
  findings.clipped += inside != corners
  return inside, label_of[category], number_of, bool(crowd)


def _image_of(annotation: Any, entries: _Entries) -> tuple[int | str, _Entry | None]:
  if not isinstance(annotation, dict):
    raise BadRowError(f"{annotation!r:.80}; expected an object")
  key = _id(annotation, "image_id")
  if key is None or key not in entries:
    raise BadRowError(f"no image has the id {annotation.get('image_id')!r:.80}")
  return key, entries[key]


def _with_captions(annotations: Sequence[Any], entries: _Entries, findings: Findings) -> list[Row]:
  captions: dict[int | str, list[str]] = {key: [] for key, entry in entries.items() if entry}
  for i, annotation in enumerate(annotations):
    try:
      key, entry = _image_of(annotation, entries)
      if entry is not None:
        captions[key].append(caption(annotation.get("caption")))
    except BadRowError as error:
      findings.bad.append(f"annotations[{i}]: {error}")
  rows = []
  for key, texts in captions.items():
    entry = entries[key]
    if texts:
      size = {} if entry.hw is None else {"annotated_hw": entry.hw}
      rows.append((entry.path, {"captions": tuple(texts), **size}))
    else:
      findings.bad.append(f"{entry.row}: no caption")
  return rows


def _same(
  categories: Mapping[str, dict[int, str]], stored: Mapping[str, list[Row]]
) -> tuple[str, ...] | None:
  """Returns the class names, None of captions; a UserError if splits differ in them, or in what they hold."""
  if not categories:
    return None
  first = next(iter(categories))
  for name in stored:
    if categories.get(name) != categories[first]:
      raise UserError(
        f"The splits {first!r} and {name!r} have other categories, so they cannot be joined:"
        f" {categories[first]!r:.200} and {categories.get(name)!r:.200}."
      )
  return tuple(categories[first].values())
