"""Where examples come from: TFDS (array_record), image folders with and without labels, ObjectNet, scikit-learn digits,
synthetic.

A source is a list of records `{"image": bytes or uint8 [h, w, c], "label": int, "id": str}`; bytes
are an encoded file, which preprocessing decodes. Where an image can have several labels, or none,
"label" is a tuple of ints.
"""

import dataclasses
import functools
import gc
import hashlib
import inspect
import itertools
import logging
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, final

import numpy as np

from flexivit_jax import class_names, label_maps
from flexivit_jax.data.splits import parse_split, split_names
from flexivit_jax.errors import UserError, nearest, unknown

Record = dict[str, Any]
Label = int | tuple[int, ...]
File = tuple[str, Label]  # Path below the root, label.
_LOG = logging.getLogger(__name__)
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")


@final
@dataclasses.dataclass(frozen=True)
class Source:
  """Random access to the examples of one split; indices are positions in the split as selected.

  Attributes:
    name, split: as given.
    num_classes: labels are 0 <= label < num_classes.
    class_names: in the order of the labels, where known.
    size: number of examples.
    read: indices -> records; may be called from several threads.
  """

  name: str
  split: str
  num_classes: int
  class_names: tuple[str, ...] | None
  size: int
  read: Callable[[Sequence[int]], list[Record]]

  def __len__(self) -> int:
    return self.size

  def __getitem__(self, index: int) -> Record:
    if not 0 <= index < self.size:
      raise IndexError(f"Example {index} of {self.name} {self.split!r} with {self.size} examples.")
    return self.read([index])[0]


def make_source(
  *,
  name: str,
  split: str,
  data_dir: str | os.PathLike[str] | None = None,
  image_key: str | None = None,
  label_key: str | None = None,
  image_size: int | Sequence[int] | None = None,
  num_classes: int | None = None,
  num_examples: int | None = None,
  seed: int | None = None,
  by_number: bool = False,
) -> Source:
  """Opens a data set.

  Args:
    name: a key of `SOURCES`, or any TFDS name (`cifar10`, `imagenet_v2/matched-frequency:3.0.0`).
    split: TFDS split syntax, e.g. `train[:99%]`; see `splits.parse_split`.
    data_dir: of TFDS (default: its own default), or the root of a folder of images.
    image_key, label_key, num_classes: TFDS only; see `tfds_source`.
    image_size, num_classes, num_examples, seed: synthetic only; see `synthetic_source`.
    by_number: leave its class names out, so that its classes are those of a model by number, whatever they are called.

  Raises:
    UserError: an unknown data set or split, an argument that this data set does not take, no data.
  """
  given = {
    "data_dir": data_dir,
    "image_key": image_key,
    "label_key": label_key,
    "image_size": image_size,
    "num_classes": num_classes,
    "num_examples": num_examples,
    "seed": seed,
  }
  given = {key: value for key, value in given.items() if value is not None}
  build = SOURCES.get(name) or functools.partial(tfds_source, name)
  takes = inspect.signature(build).parameters
  for key in given:
    if key not in takes:
      raise UserError(f"Data set {name!r} takes no {key!r}; it takes {list(takes)}.")
  for key, parameter in takes.items():
    if key not in given and key != "split" and parameter.default is parameter.empty:
      raise UserError(f"Data set {name!r} needs {key}=.")
  source = build(split=split, **given)
  return dataclasses.replace(source, class_names=None) if by_number else source


# --- digits ---


def digits_source(*, split: str) -> Source:
  """scikit-learn's 1,797 handwritten digits, 8 x 8 pixels as uint8 [8, 8, 3], 10 classes.

  `train` is 1,437 of them and `test` 360, divided by a fixed permutation; ids are
  scikit-learn's row numbers.
  """
  order = np.random.default_rng(0).permutation(1797).tolist()
  stored = {"train": order[:1437], "test": order[1437:]}
  rows = _select(split, stored)
  names = tuple(str(digit) for digit in range(10))
  return Source("digits", split, 10, names, len(rows), functools.partial(_read_digits, rows))


@functools.cache
def _load_digits() -> tuple[np.ndarray, np.ndarray]:
  from sklearn.datasets import load_digits  # Lazy: a second, and only this source needs it.

  images, labels = load_digits(return_X_y=True)
  grey = np.rint(images.reshape(-1, 8, 8, 1) * (255 / 16)).astype(np.uint8)
  return np.repeat(grey, 3, axis=-1), labels


def _read_digits(rows: Sequence[int], indices: Sequence[int]) -> list[Record]:
  images, labels = _load_digits()
  found = [rows[i] for i in indices]
  return [{"image": images[r], "label": int(labels[r]), "id": f"digits_{r:04}"} for r in found]


# --- synthetic ---


def synthetic_source(
  *,
  split: str,
  image_size: int | Sequence[int] = 32,
  num_classes: int = 10,
  num_examples: int = 1024,
  seed: int = 0,
) -> Source:
  """Images made from their number: a wave whose direction and colour tell the class, and noise.

  Args:
    split: of `train`, `validation`, `test`, `full`, each with `num_examples` different examples.
    image_size: pixels, an int or (h, w).
    num_classes: example i has label i modulo this.
    num_examples: in each split.
    seed: of the noise and the phases; the classes look the same for every seed.
  """
  hw = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
  if len(hw) != 2 or min(*hw, num_classes, num_examples) < 1 or seed < 0:
    raise UserError(
      f"image_size={image_size}, num_classes={num_classes}, num_examples={num_examples}, seed={seed}; expected one side"
      " or two, all 1 or more, and a seed of 0 or more."
    )
  names = ("train", "validation", "test", "full")
  stored = {s: range(k * num_examples, (k + 1) * num_examples) for k, s in enumerate(names)}
  rows = _select(split, stored)
  read = functools.partial(_read_synthetic, rows, (hw[0], hw[1]), num_classes, num_examples, seed)
  return Source("synthetic", split, num_classes, None, len(rows), read)


def _read_synthetic(
  rows: Sequence[int],
  hw: tuple[int, int],
  num_classes: int,
  num_examples: int,
  seed: int,
  indices: Sequence[int],
) -> list[Record]:
  def make(row: int) -> Record:
    label = row % num_examples % num_classes
    image = _wave(hw, label, num_classes, np.random.default_rng((seed, row)))
    return {"image": image, "label": label, "id": f"synthetic_{row}"}

  return [make(rows[i]) for i in indices]


def _wave(
  hw: tuple[int, int], label: int, num_classes: int, rng: np.random.Generator
) -> np.ndarray:
  turn = label / num_classes
  y, x = np.ogrid[: hw[0], : hw[1]]
  along = x / hw[1] * np.cos(np.pi * turn) + y / hw[0] * np.sin(np.pi * turn)
  wave = np.sin(2 * np.pi * (3 * along + rng.random()))[..., None]
  colour = 0.5 + 0.5 * np.cos(2 * np.pi * (turn + np.arange(3) / 3))
  noise = rng.standard_normal((*hw, 1), dtype=np.float32)
  return np.clip(127.5 + 80 * wave * colour + 25 * noise, 0, 255).astype(np.uint8)


# --- folder ---


def folder_source(*, split: str, data_dir: str | os.PathLike[str]) -> Source:
  """Images as files: `data_dir/SPLIT/CLASS/**/*.jpg` (also png, webp, bmp, ...).

  The classes are the folders of `train`, or of the split itself where there is no `train`, in the order of
  `class_names.in_order`: as numbers where all are numbers, else as text. A split may lack some of them.
  Files are in a mixed order that depends on their paths alone, so that `train[:90%]` and `train[90%:]` both have all
  classes. Files of other kinds are left out, with a warning that counts them.
  """
  root = pathlib.Path(data_dir).expanduser()
  folders = _split_folders(root, split)
  names = _class_names(root / ("train" if "train" in folders else split_names(split)[0]))
  stored = {s: _list_images(root / s, names) for s in split_names(split)}
  files = _select(split, stored)
  read = functools.partial(_read_files, root, files)
  return Source("folder", split, len(names), names, len(files), read)


def _split_folders(root: pathlib.Path, split: str) -> list[str]:
  """Returns the folders in `root`; raises a UserError if those of the split are not among them."""
  folders = _subfolders(root)
  if not folders:
    first = root / split_names(split)[0]
    raise UserError(f"No folders in {root}; expected {first}/CLASS/*.jpg and so on.")
  for name in split_names(split):
    if name not in folders:
      raise unknown(f"split folder in {root}", name, folders)
  return folders


def _subfolders(folder: pathlib.Path) -> list[str]:
  if not folder.is_dir():
    return []
  with os.scandir(folder) as entries:
    return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))


def _class_names(split: pathlib.Path) -> tuple[str, ...]:
  """The classes of the folders in a split, in the order of their labels."""
  found = _subfolders(split)
  class_names.check_distinct(found, f"the class folders in {split}")
  return tuple(class_names.in_order(class_names.plain(name) for name in found))


def _list_images(folder: pathlib.Path, names: Sequence[str]) -> list[File]:
  """Returns (path below the root, label) of every image, sorted by a hash of the path."""
  found = _subfolders(folder)
  class_names.check_distinct(found, f"the class folders in {folder}")
  numbers = {name: k for k, name in enumerate(names)}
  for name in found:
    if class_names.plain(name) not in numbers:
      raise UserError(
        f"{folder} has a class folder {name!r} that the train split has not; that has {class_names.shown(names)}."
        f"{nearest(name, names)}"
      )
  classes = (
    _images_below(folder / name, folder.parent, numbers[class_names.plain(name)]) for name in found
  )
  return _mixed(itertools.chain.from_iterable(classes))


def _images_below(folder: pathlib.Path, root: pathlib.Path, label: Label) -> list[File]:
  """Returns (path below the root, label) of every image below a folder, in a mixed order."""
  paths = _walk(folder)
  found = [path for path in paths if path.lower().endswith(IMAGE_SUFFIXES)]
  if others := len(paths) - len(found):
    _LOG.warning("%s: left out %d files that are not %s", folder, others, " ".join(IMAGE_SUFFIXES))
  return _mixed((os.path.relpath(path, root), label) for path in found)


def _mixed(files: Iterable[File]) -> list[File]:
  """Sorted by a hash of the path."""
  return sorted(files, key=lambda file: hashlib.sha256(os.fsencode(file[0])).digest())


def _walk(folder: pathlib.Path) -> list[str]:
  walk = os.walk(folder, followlinks=True)
  return [os.path.join(d, f) for d, _, files in walk for f in files if not f.startswith(".")]


def _read_files(root: pathlib.Path, files: Sequence[File], indices: Sequence[int]) -> list[Record]:
  found = [files[i] for i in indices]
  return [{"image": (root / p).read_bytes(), "label": k, "id": p} for p, k in found]


# --- ObjectNet ---


def objectnet_source(*, split: str, data_dir: str | os.PathLike[str]) -> Source:
  """ObjectNet's images of the 113 classes that ImageNet has too: `data_dir/SPLIT/CLASS/**/*.png`.

  The label is the tuple of ImageNet-1k's classes that are right: `pp` makes `multihot(1000)` of it. The folders of the
  other 200 classes are left out, and counted in the log. In the archive as it comes the split is called `images`.
  """
  root, classes = pathlib.Path(data_dir).expanduser(), label_maps.objectnet()
  _split_folders(root, split)
  for name in split_names(split):
    _check_objectnet(root / name)
  stored = {
    name: _mixed(
      file for c, label in classes.items() for file in _images_below(root / name / c, root, label)
    )
    for name in split_names(split)
  }
  files = _select(split, stored)
  read = functools.partial(_read_files, root, files)
  return Source("objectnet", split, label_maps.NUM_I1K, None, len(files), read)


def _check_objectnet(folder: pathlib.Path) -> None:
  found, classes = _subfolders(folder), label_maps.objectnet()
  if missing := [c for c in classes if c not in found]:
    raise UserError(
      f"{folder} lacks {len(missing)} of ObjectNet's {len(classes)} classes that ImageNet has too, the first"
      f" {missing[0]!r}; expected {folder}/{missing[0]}/*.png and so on."
    )
  others = len(found) - len(classes)
  _LOG.info("%s: left out %d folders of classes that ImageNet does not have", folder, others)


# --- images ---


def images_source(*, split: str, data_dir: str | os.PathLike[str]) -> Source:
  """Every image below a folder, without labels: `all`, in an order that depends on the paths alone.

  The label is 0 of one class. Slices divide it: `all[:90%]` and `all[90%:]`.
  """
  root = pathlib.Path(data_dir).expanduser()
  if not root.is_dir():
    raise UserError(f"{root} is no folder; give one with images below it.")
  found = _images_below(root, root, 0)
  if not found:
    raise UserError(
      f"No images below {root}; expected files that end in {' '.join(IMAGE_SUFFIXES)}."
    )
  files = _select(split, {"all": found})
  read = functools.partial(_read_files, root, files)
  return Source("images", split, 1, None, len(files), read)


# --- TFDS ---

_ID_KEYS = ("id", "file_name", "filename", "tfds_id")


def tfds_source(
  name: str,
  *,
  split: str,
  data_dir: str | os.PathLike[str] | None = None,
  image_key: str = "image",
  label_key: str = "label",
  num_classes: int | None = None,
) -> Source:
  """A TFDS data set that was prepared as array_record, read without TensorFlow.

  Only prepared files are read, never the data set's own code: nothing is downloaded.

  Args:
    name: `NAME`, `NAME/CONFIG`, `NAME:VERSION`.
    split: TFDS split syntax.
    data_dir: where TFDS prepared it; None is TFDS's own default.
    image_key, label_key: its features; the label may be a sequence of classes (`imagenet2012_real`).
    num_classes: needed only where the label is a plain integer.
  """
  builder = _builder(name, data_dir)
  features = builder.info.features
  for key in (image_key, label_key):
    if key not in features:
      raise unknown(f"feature of {name} (image_key=, label_key=)", key, features)
  known = getattr(features[label_key], "num_classes", None)
  if (known or num_classes) is None:
    raise UserError(f"Feature {label_key!r} of {name} does not say num_classes; give num_classes=.")
  if None not in (known, num_classes) and known != num_classes:
    raise UserError(f"num_classes={num_classes}, but {name} has {known} classes.")
  parts = parse_split(split, {s: info.num_examples for s, info in builder.info.splits.items()})
  names = tuple(features[label_key].names) if known else None
  id_key = next((key for key in _ID_KEYS if key in features), None)
  data = _open(builder, split, image_key)
  read = functools.partial(_read_tfds, data, image_key, label_key, id_key, f"{name}/{split}")
  size = sum(p.stop - p.start for p in parts)
  return Source(name, split, known or num_classes, names, size, read)


def is_prepared(name: str, data_dir: str | os.PathLike[str] | None = None) -> bool:
  """Whether TFDS prepared a data set there as array_record; arguments as of `tfds_source`."""
  try:
    _builder(name, data_dir)
  except UserError:
    return False
  return True


def _builder(name: str, data_dir: str | os.PathLike[str] | None) -> Any:
  tfds = _tfds()
  where = None if data_dir is None else os.path.expanduser(data_dir)
  try:
    builder = tfds.core.read_only_builder.builder_from_files(name, data_dir=where)
  except tfds.core.DatasetNotFoundError:
    shown = where or tfds.core.constants.DATA_DIR
    known = [*SOURCES, *_subfolders(pathlib.Path(shown))]
    raise UserError(
      f"Data set {name!r} is not prepared in {shown} and is none of {sorted(known)}."
      f"{nearest(name, known)} {_how_to_prepare(name, where)}"
    ) from None
  if "array_record" not in {f.value for f in builder.info.available_file_formats()}:
    found = builder.info.file_format.value
    raise UserError(
      f"Data set {name!r} in {builder.data_dir} is prepared as {found}, which TensorFlow alone "
      f"reads; expected array_record. {_how_to_prepare(name, where)}"
    )
  return builder


def _how_to_prepare(name: str, data_dir: str | None) -> str:
  where = f" --data_dir {data_dir}" if data_dir else ""
  return (
    f"To prepare a TFDS data set, in another environment: `pip install tensorflow-datasets "
    f"tensorflow && tfds build {name} --file_format=array_record{where}`"
  )


def _open(builder: Any, split: str, image_key: str) -> Any:
  return builder.as_data_source(split, decoders={image_key: _tfds().decode.SkipDecoding()})


def _tfds() -> Any:
  """TensorFlow Datasets, imported where it is first needed: half a second.

  No garbage is collected meanwhile: for a part of its import `__import__` is that of etils, under which a finaliser
  that imports, as that of a semaphore does, would fail.
  """
  collecting = gc.isenabled()
  gc.disable()
  try:
    import tensorflow_datasets as tfds
  finally:
    if collecting:
      gc.enable()
  return tfds


def _read_tfds(
  data: Any, image_key: str, label_key: str, id_key: str | None, prefix: str, indices: Sequence[int]
) -> list[Record]:
  def record(index: int, raw: dict[str, Any]) -> Record:
    key = raw[id_key] if id_key else f"{prefix}#{index}"
    key = key.decode() if isinstance(key, bytes) else str(key)
    return {"image": raw[image_key], "label": _label(raw[label_key]), "id": key}

  indices = [int(i) for i in indices]
  return [record(i, raw) for i, raw in zip(indices, data.__getitems__(indices), strict=True)]


def _label(value: Any) -> Label:
  return tuple(int(v) for v in value) if np.ndim(value) else int(value)


SOURCES: dict[str, Callable[..., Source]] = {
  "digits": digits_source,
  "folder": folder_source,
  "images": images_source,
  "objectnet": objectnet_source,
  "synthetic": synthetic_source,
}


def _select(split: str, stored: Mapping[str, Sequence[Any]]) -> list[Any]:
  """The rows of the stored splits that a split string selects, in its order."""
  parts = parse_split(split, {name: len(rows) for name, rows in stored.items()})
  return [row for part in parts for row in stored[part.name][part.start : part.stop]]
