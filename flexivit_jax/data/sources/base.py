"""The type of all sources: a list of records that are read by index."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar, final

from flexivit_jax.data.splits import parse_split

# One example:
# - "image": bytes of an encoded file, which preprocessing decodes, or uint8 [h, w, c]; "id": text.
# - "label": an int, or a tuple of ints where an image can have several classes or none; only where whole images have
#   classes.
# - "boxes": float32 [m, 4], the edges (x0, y0, x1, y1) in pixels of the image, x to the right and y down: all of it is
#   0, 0, w, h. Each key that begins with "box_" has one row for each box: "box_labels" int64 [m], numbers of classes;
#   "box_ids" int64 [m], as the file has them, or the place in the file; "box_crowd" and "box_difficult" bool [m], where
#   the format has them.
# - "neg_labels" int64 [k]: classes that are known to be nowhere in the image, where not all of the others are;
#   "not_exhaustive" int64 [k]: classes of which not every object has a box (LVIS).
# - "mask": bytes of a PNG, or an integer array [h, w], of class numbers; "mask_ignore": the value of no class;
#   "mask_labels": what the numbers stand for, "mask_colors": what colours do, see `data.mask_labels`.
# - "captions": a tuple of texts.
# - "annotated_hw": (h, w) of the image as the annotations have it; the decoded image must have this size.
Record = dict[str, Any]
Label = int | tuple[int, ...]
File = tuple[str, Label]  # Path below the root, label.
_Row = TypeVar("_Row")


@final
@dataclasses.dataclass(frozen=True)
class Source:
  """Random access to the examples of one split; indices are positions in the split as selected.

  Attributes:
    name, split: as the user wrote them.
    num_classes: labels are 0 <= label < num_classes; 0: there are none.
    class_names: in the order of the labels; None: unknown.
    size: number of examples.
    read: indices -> records; may be called from several threads.
    labels: returns the label of every example without reading images; None: impossible, or images have no labels.
    upright: whether images are rotated as their EXIF data say. True for own photos, False for published data sets,
      because published results are of the stored pixels.
    where: the folder in which the ids of examples are paths of files; None: they are not.
    listing: returns the record of every example without what files hold ("image", "mask"), and without reading them;
      None: impossible. Boxes in it may be relative to the image's sides. `flexivit pack` tells by it whether the input
      is still the same.
    left_out: "ROW: REASON" of what is no example because its annotations are bad.
    ahead: told indices that are read soon, of data in a bucket; does not wait for them. None: of no use.
    class_groups: numbers of classes by the name of a group, on which an evaluator reports, too: LVIS's "rare",
      "common" and "frequent". None: there are none.
  """

  name: str
  split: str
  num_classes: int
  class_names: tuple[str, ...] | None
  size: int
  read: Callable[[Sequence[int]], list[Record]]
  labels: Callable[[], list[Label]] | None = None
  upright: bool = False
  where: str | None = None
  listing: Callable[[], Iterable[Record]] | None = None
  left_out: tuple[str, ...] = ()
  ahead: Callable[[Sequence[int]], None] | None = None
  class_groups: Mapping[str, tuple[int, ...]] | None = None

  def __len__(self) -> int:
    return self.size

  def __getitem__(self, index: int) -> Record:
    if not 0 <= index < self.size:
      raise IndexError(f"Example {index} of {self.name} {self.split!r} with {self.size} examples.")
    return self.read([index])[0]


def labels_of_files(files: Sequence[File]) -> Callable[[], list[Label]]:
  """Returns the function `Source.labels` for files."""
  return lambda: [label for _, label in files]


def listing_of_files(files: Sequence[File]) -> Callable[[], Iterable[Record]]:
  """Returns the function `Source.listing` for files."""
  return lambda: ({"label": label, "id": path} for path, label in files)


def select(split: str, stored: Mapping[str, Sequence[_Row]]) -> list[_Row]:
  """Returns the rows of the stored splits that a split string selects, in its order."""
  parts = parse_split(split, {name: len(rows) for name, rows in stored.items()})
  return [row for part in parts for row in stored[part.name][part.start : part.stop]]
