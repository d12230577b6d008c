"""Divides a folder of images for `flexivit flexify` into training and held-out images, for usual layouts."""

import pathlib
from typing import NamedTuple

from flexivit_jax import data, errors
from flexivit_jax.trees import Json

HELD_OUT = ("val", "validation", "valid", "test")  # The first of these that has images is held out.
_FEWEST = 5  # images, so that a tenth can be held out

Source = Json  # Arguments of `data.make_source`.


class Layout(NamedTuple):
  """The images of training and test, and sentences for the user about them."""

  sources: dict[str, Source]
  notes: list[str]


def divide(images: pathlib.Path, batch_size: int | None = None) -> Layout:
  """Finds the images of training and test.

  `train/` and one of `val/`, `validation/`, `valid/`, `test/` are used if both exist; otherwise a tenth of the images
  is held out. If images lie in class folders, these are their labels.

  Args:
    images: any folder of images.
    batch_size: the least number of training images; None: nothing is trained.

  Raises:
    UserError: there are no images, or too few.
  """
  train = images / "train"
  kinds = {name: data.has_classes(images / name) for name in HELD_OUT}
  held = [name for name, kind in kinds.items() if kind is not None]
  if not train.is_dir():
    sources = _tenth(_unlabelled(images))
    notes = []
  else:
    labelled = data.has_classes(train)
    if labelled is None:
      raise errors.UserError(f"No images below {train}; put some there, or remove the folder.")
    if held:
      sources = _both(images, held[0], labelled, bool(kinds[held[0]]))
    else:
      sources = _tenth(_classes(images, "train") if labelled else _unlabelled(train))
    notes = [f"{images / name} is not used: {images / held[0]} is held out" for name in held[1:]]
  numbers = {key: len(data.make_source(**source)) for key, source in sources.items()}
  if batch_size and numbers["train"] < batch_size:
    raise errors.UserError(
      f"{images} has {numbers['train']} images to train on, fewer than the {batch_size} of a step; give more images or"
      f" --batch_size={numbers['train']}."
    )
  shown = [f"{numbers[key]} images of {_shown(source)}" for key, source in sources.items()]
  return Layout(sources, [f"training on {shown[0]}, measured on {shown[1]}", *notes])


def _both(
  images: pathlib.Path, held: str, labelled: bool, held_labelled: bool
) -> dict[str, Source]:
  train = _classes(images, "train") if labelled else _unlabelled(images / "train")
  classes = labelled and held_labelled
  return {"train": train, "test": _classes(images, held) if classes else _unlabelled(images / held)}


def _classes(images: pathlib.Path, split: str) -> Source:
  source: Source = dict(name="folder", data_dir=str(images), split=split)
  if split != "train":
    return source
  # A class without images does not matter: labels measure, they never train.
  lenient = source | {"allow_empty": True}
  opened = data.make_source(**lenient)
  return source if len(set(opened.labels())) == opened.num_classes else lenient


def _unlabelled(folder: pathlib.Path) -> Source:
  return dict(name="images", data_dir=str(folder), split="all")


def _tenth(source: Source) -> dict[str, Source]:
  """Holds out a tenth of a source."""
  number = len(data.make_source(**source))
  if number < _FEWEST:
    raise errors.UserError(
      f"{source['data_dir']} has {number} images; at least {_FEWEST} are needed, of which a tenth is held out."
    )
  return {
    "train": source | {"split": f"{source['split']}[:90%]"},
    "test": source | {"split": f"{source['split']}[90%:]"},
  }


def _shown(source: Source) -> str:
  folder, (name, _, part) = pathlib.Path(source["data_dir"]), source["split"].partition("[")
  folder = folder if source["name"] == "images" else folder / name
  return f"{folder}{f' [{part}' if part else ''}"
