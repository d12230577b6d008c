"""Scenes made from their number: cut-out pictures on a background, with exact boxes, masks and names.

What is shown follows from the seed, the split and the number of a scene, whatever reads it and in which order. Names
are as many as there are cut-outs, so that detection by words can be tried without a data set of photos.
"""

import functools
import json
import pathlib
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int32, UInt8
from PIL import Image

from flexivit_jax.data.sources import class_files
from flexivit_jax.data.sources.annotated import data_root
from flexivit_jax.data.sources.base import Record, Source, select
from flexivit_jax.data.walking import Tree
from flexivit_jax.errors import UserError
from flexivit_jax.specs import NO_CLASS

FILE = "metadata.jsonl"
SPLITS = ("train", "val", "test")
NAMES = ("base", "novel", "all")
_MAX_IOU = 0.3  # of the boxes of two objects
_MIN_VISIBLE = 0.5  # share of an object that those after it may not hide
_TRIES = 20  # places that are tried for an object before it is left out
_OPAQUE = 128  # alpha from which a pixel is of the object


_Box = tuple[int, int, int, int]


class _CutOuts(NamedTuple):
  """The cut-outs, in the order of the classes."""

  files: tuple[pathlib.Path, ...]
  names: tuple[str, ...]
  novel: tuple[bool, ...]


class _Layout(NamedTuple):
  """What all scenes of a source have in common."""

  cut_outs: _CutOuts
  backgrounds: tuple[pathlib.Path, ...]
  hw: tuple[int, int]
  number: tuple[int, int]
  sides: tuple[int, int]
  seed: int
  masks: bool


def scenes_source(
  *,
  split: str,
  data_dir: str,
  num_examples: int = 1000,
  image_size: int | Sequence[int] = 192,
  objects: Sequence[int] = (1, 6),
  sides: Sequence[int] = (24, 96),
  names: str = "all",
  backgrounds: str | None = None,
  with_masks: bool = False,
  seed: int = 0,
) -> Source:
  """Scenes of cut-out pictures, made when they are read.

  The classes are the names of the cut-outs that are shown, in their order. Cut-outs that metadata.jsonl calls novel are
  for tests alone; the groups of classes "base" and "novel" say which these are. A box is the extent of
  the visible pixels of an object, of which others hide less than half; boxes overlap by an IoU of less than 0.3.

  Args:
    split: of "train", "val" and "test", each with `num_examples` scenes of its own.
    data_dir: holds metadata.jsonl, a line {"file_name": ..., "name": ..., "novel": true or false} for each cut-out, and
      the files: images with an alpha channel. `tools/maintain/unpack_emoji.py --cutouts` makes one.
    num_examples: scenes of a split.
    image_size: pixels, an int or (h, w).
    objects: least and most of a scene; fewer where there is no place for them.
    sides: least and most pixels of an object's longer side.
    names: which cut-outs are shown: "base", "novel" or "all".
    backgrounds: folder of photos, of which parts are behind the objects; a fifth is for val and test alone. None:
      gradients.
    with_masks: adds "mask", the class of each pixel.
    seed: of everything.

  Raises:
    UserError: no or damaged metadata, a name twice, numbers that cannot be; later, a file that is no cut-out.
  """
  hw = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
  number, lengths = _range("objects", objects), _range("sides", sides)
  if len(hw) != 2 or lengths[1] > min(hw) or num_examples < 1 or seed < 0:
    raise UserError(
      f"image_size={image_size}, sides={lengths}, num_examples={num_examples}, seed={seed}; expected a side or"
      " two, as long as the largest object at least, 1 example or more, and a seed of 0 or more."
    )
  if names not in NAMES:
    raise UserError(f"names={names!r}; expected one of {', '.join(NAMES)}.")
  stored = {s: [(s, i) for i in range(num_examples)] for s in SPLITS}
  rows = select(split, stored)
  cut_outs = _chosen(_cut_outs(data_root(data_dir)), names, data_dir)
  behind = _photos(backgrounds, {s for s, _ in rows}) if backgrounds else {}
  layouts = {
    s: _Layout(
      cut_outs, behind.get(s, ()), (hw[0], hw[1]), number, lengths, seed, with_masks
    )
    for s in SPLITS
  }  # fmt: skip
  return Source(
    "scenes",
    split,
    len(cut_outs.names),
    cut_outs.names,
    len(rows),
    functools.partial(_read, rows, layouts),
    class_groups=_groups(cut_outs),
  )


def _range(name: str, given: Sequence[int]) -> tuple[int, int]:
  values = tuple(given)
  if len(values) != 2 or not 1 <= values[0] <= values[1]:
    raise UserError(f"{name}={given}; expected two numbers, 1 <= least <= most.")
  return values[0], values[1]


def _cut_outs(root: pathlib.Path) -> _CutOuts:
  path = root / FILE
  if not path.is_file():
    raise UserError(
      f"{path} does not exist; expected a line {{'file_name': ..., 'name': ..., 'novel': ...}} for each cut-out."
    )
  found: dict[str, tuple[pathlib.Path, bool]] = {}
  for i, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
    try:
      row = json.loads(line)
      file, name, novel = root / row["file_name"], row["name"], row.get("novel", False)
    except (ValueError, KeyError, TypeError) as e:
      raise UserError(
        f"{path}, line {i}: {line!r:.80}; expected a JSON object with file_name and name."
      ) from e
    if not isinstance(name, str) or not name.strip() or not isinstance(novel, bool):
      raise UserError(
        f"{path}, line {i}: name {name!r}, novel {novel!r}; expected a text and true or false."
      )
    if name in found:
      raise UserError(f"{path}, line {i}: the name {name!r} has another cut-out, too.")
    if not file.is_file():
      raise UserError(f"{path}, line {i}: {file} does not exist.")
    found[name] = file, novel
  if not found:
    raise UserError(f"{path} is empty; expected a line for each cut-out.")
  names = class_files.checked(sorted(found), str(path))
  files, novel = zip(*(found[name] for name in names), strict=True)
  return _CutOuts(files, tuple(names), novel)


def _chosen(cut_outs: _CutOuts, names: str, data_dir: str) -> _CutOuts:
  """Returns those that are shown."""
  rows = [
    row for row in zip(*cut_outs, strict=True) if names == "all" or row[2] == (names == "novel")
  ]
  if not rows:
    raise UserError(f"{data_dir} has no {names} cut-outs; names='all' shows those that it has.")
  files, texts, novel = zip(*rows, strict=True)
  return _CutOuts(files, texts, novel)


def _groups(cut_outs: _CutOuts) -> dict[str, tuple[int, ...]]:
  """The classes that are trained, and those that are not, where there are any."""
  groups: dict[str, list[int]] = {}
  for k, novel in enumerate(cut_outs.novel):
    groups.setdefault("novel" if novel else "base", []).append(k)
  return {name: tuple(groups[name]) for name in NAMES if name in groups}


def _photos(folder: str, splits: set[str]) -> dict[str, tuple[pathlib.Path, ...]]:
  """Returns the backgrounds of each split; those of val and of test are the same."""
  root = pathlib.Path(folder).expanduser()
  if not root.is_dir():
    raise UserError(f"backgrounds={folder!r} is no folder; expected one of photos.")
  files = [root / path for path in sorted(Tree(root).images)]
  held_out = {file: zlib.crc32(file.name.encode()) % 5 == 0 for file in files}
  made = {
    split: tuple(file for file, held in held_out.items() if held == (split != "train"))
    for split in splits
  }
  if empty := [split for split, photos in made.items() if not photos]:
    raise UserError(
      f"backgrounds={folder!r} has {len(files)} images, and none of them is for {empty[0]}; give more, about ten."
    )
  return made


def _read(
  rows: Sequence[tuple[str, int]], layouts: dict[str, _Layout], indices: Sequence[int]
) -> list[Record]:
  return [_scene(layouts[rows[i][0]], *rows[i]) for i in indices]


def _scene(layout: _Layout, split: str, index: int) -> Record:
  rng = np.random.default_rng((layout.seed, SPLITS.index(split), index))
  image = _background(layout, rng)
  scene = _Scene(np.full(layout.hw, -1, np.int32), [], [], [])
  for _ in range(int(rng.integers(layout.number[0], layout.number[1], endpoint=True))):
    label = int(rng.integers(len(layout.cut_outs.files)))
    side = int(rng.integers(layout.sides[0], layout.sides[1], endpoint=True))
    picture = _resized(_cut_out(layout.cut_outs.files[label]), side)
    place = _added(scene, picture[..., 3] >= _OPAQUE, rng)
    if place is None:
      continue
    y, x = place
    _draw(image[y : y + picture.shape[0], x : x + picture.shape[1]], picture)
    scene.labels.append(label)
  labels = np.array(scene.labels, np.int64)
  record: Record = {
    "image": image,
    "id": f"{split}_{index}",
    "boxes": np.array(scene.boxes, np.float32).reshape(-1, 4),
    "box_labels": labels,
    "box_ids": np.arange(len(labels), dtype=np.int64) + index * layout.number[1],
  }
  if layout.masks:
    record["mask"] = np.append(labels, NO_CLASS).astype(np.int32)[scene.owner]
  return record


class _Scene(NamedTuple):
  """What is drawn so far.

  Attributes:
    owner: which object each pixel shows, by its place in the lists; -1: the background.
    boxes, visible: extent and number of the visible pixels of each object.
    labels: its class.
  """

  owner: Int32[np.ndarray, "h w"]
  boxes: list[_Box]
  visible: list[tuple[int, int]]  # pixels now, and when it was drawn
  labels: list[int]


def _added(
  scene: _Scene, solid: Bool[np.ndarray, "_ _"], rng: np.random.Generator
) -> tuple[int, int] | None:
  """Adds an object where no box overlaps another one by much, and most of each object stays visible; or nowhere."""
  x0, y0, x1, y1 = _extent(solid)
  (h, w), (rows, columns) = scene.owner.shape, solid.shape
  for _ in range(_TRIES):
    y, x = int(rng.integers(h - rows + 1)), int(rng.integers(w - columns + 1))
    box = (x + x0, y + y0, x + x1, y + y1)
    if any(_iou(box, other) >= _MAX_IOU for other in scene.boxes):
      continue
    there = scene.owner[y : y + rows, x : x + columns]
    hidden = np.bincount(there[solid & (there >= 0)], minlength=len(scene.boxes)).tolist()
    left = [(now - n, first) for n, (now, first) in zip(hidden, scene.visible, strict=True)]
    if any(now < _MIN_VISIBLE * first for now, first in left):
      continue
    there[solid] = len(scene.boxes)
    for i in np.flatnonzero(hidden):
      scene.boxes[i] = _extent(scene.owner == i)
    scene.visible[:] = [*left, (int(solid.sum()),) * 2]
    scene.boxes.append(box)
    return y, x
  return None


def _extent(solid: Bool[np.ndarray, "h w"]) -> _Box:
  """The box around the pixels that are set."""
  rows, columns = np.flatnonzero(solid.any(1)), np.flatnonzero(solid.any(0))
  return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _iou(a: Sequence[int], b: Sequence[int]) -> float:
  w = min(a[2], b[2]) - max(a[0], b[0])
  h = min(a[3], b[3]) - max(a[1], b[1])
  both = max(w, 0) * max(h, 0)
  return both / (sum((x[2] - x[0]) * (x[3] - x[1]) for x in (a, b)) - both)


# --- pixels ---


@functools.lru_cache(maxsize=8192)
def _cut_out(file: pathlib.Path) -> Image.Image:
  """Reads a cut-out, without the transparent pixels around it."""
  try:
    with Image.open(file) as opened:
      if "A" not in opened.getbands() and "transparency" not in opened.info:
        raise UserError(f"{file} has no alpha channel; expected a cut-out, e.g. an RGBA PNG.")
      picture = opened.convert("RGBA")
  except OSError as e:
    raise UserError(f"{file} cannot be read as an image: {e}.") from e
  solid = np.asarray(picture)[..., 3] >= _OPAQUE
  if not solid.any():
    raise UserError(f"{file} is transparent all over; expected a cut-out.")
  return picture.crop(_extent(solid))


def _resized(picture: Image.Image, side: int) -> UInt8[np.ndarray, "h w 4"]:
  scale = side / max(picture.size)
  w, h = (max(1, round(n * scale)) for n in picture.size)
  pixels = np.array(picture.resize((w, h), Image.Resampling.BILINEAR))
  if not (pixels[..., 3] >= _OPAQUE).any():  # thin ones fade as they shrink
    pixels[..., 3] = 255
  return pixels


def _draw(below: UInt8[np.ndarray, "h w 3"], picture: UInt8[np.ndarray, "h w 4"]) -> None:
  alpha = picture[..., 3:].astype(np.float32) / 255
  below[...] = np.rint(alpha * picture[..., :3] + (1 - alpha) * below)


def _background(layout: _Layout, rng: np.random.Generator) -> UInt8[np.ndarray, "h w 3"]:
  h, w = layout.hw
  if layout.backgrounds:
    photo = _photo(layout.backgrounds[int(rng.integers(len(layout.backgrounds)))], max(h, w))
    top, left = (int(rng.integers(n - m + 1)) for n, m in zip(photo.shape[:2], (h, w), strict=True))
    return photo[top : top + h, left : left + w].copy()
  first, second = rng.uniform(0, 255, (2, 3))
  turn = rng.uniform(0, 2 * np.pi)
  y, x = np.ogrid[:h, :w]
  along = (x / w - 0.5) * np.cos(turn) + (y / h - 0.5) * np.sin(turn)
  share = np.clip(along / np.sqrt(2) + 0.5, 0, 1)[..., None]
  return np.rint(first + share * (second - first)).astype(np.uint8)


@functools.lru_cache(maxsize=1024)
def _photo(file: pathlib.Path, least: int) -> UInt8[np.ndarray, "h w 3"]:
  """Reads a photo, whose shorter side gets 4/3 of the pixels that are cut out of it."""
  try:
    with Image.open(file) as opened:
      photo = opened.convert("RGB")
  except OSError as e:
    raise UserError(f"{file} cannot be read as an image: {e}.") from e
  scale = least * 4 / 3 / min(photo.size)
  size = [max(least, round(n * scale)) for n in photo.size]
  return np.asarray(photo.resize((size[0], size[1]), Image.Resampling.BILINEAR))
