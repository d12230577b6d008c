"""Label maps: from the logits of a model to the classes of a data set, and from other classes to ImageNet's.

The lists are files in this folder; its README.md gives their sources.
"""

import functools
import json
from importlib import resources
from typing import NamedTuple

from flexivit_jax import errors

NUM_I1K, NUM_I21K = 1000, 21843


class LabelMap(NamedTuple):
  """Restricts a model and the labels of a data set to the same classes in the same order.

  Attributes:
    model_classes: number of logits of the model.
    columns: the logits that remain, one a class.
    labels: number of classes of the labels -> the classes that remain. Labels may be over ImageNet-1k's 1000 classes,
      or over the data set's own classes, as in a folder of images.
  """

  model_classes: int
  columns: tuple[int, ...]
  labels: dict[int, tuple[int, ...]]


def columns(name: str) -> tuple[int, ...]:
  """Returns the logits that remain, in the order of the data set's classes. See `label_map`."""
  return label_map(name).columns


@functools.cache
def label_map(name: str) -> LabelMap:
  """Returns the label map `MODEL_CLASSES`.

  `i1k_a`, `i1k_r`, `i1k_objectnet`: of the 1000 logits the 200 of ImageNet-A or -R, the 125 of ObjectNet. `i21k_i1k`,
  `i21k_i1k_a`, `i21k_i1k_r`, `i21k_i1k_objectnet`: the same, and all 1000, of ImageNet-21k's 21,843 logits; there
  class 850 (n04399382, teddy bear) does not exist, so one is missing from each of these but R.

  Raises:
    UserError: another name.
  """
  if name not in LABEL_MAPS:
    raise errors.unknown("label map", name, LABEL_MAPS)
  model_classes, classes = LABEL_MAPS[name]
  logit = _numbers("i21k_i1k") if model_classes == NUM_I21K else range(NUM_I1K)
  chosen = _classes(classes)
  present = [k for k, c in enumerate(chosen) if logit[c] >= 0]
  return LabelMap(
    model_classes,
    columns=tuple(logit[chosen[k]] for k in present),
    labels={len(chosen): tuple(present), NUM_I1K: tuple(chosen[k] for k in present)},
  )


# Name: (logits of the model, classes that stay).
LABEL_MAPS: dict[str, tuple[int, str]] = {
  "i1k_a": (NUM_I1K, "a"),
  "i1k_r": (NUM_I1K, "r"),
  "i1k_objectnet": (NUM_I1K, "objectnet"),
  "i21k_i1k": (NUM_I21K, "i1k"),
  "i21k_i1k_a": (NUM_I21K, "a"),
  "i21k_i1k_r": (NUM_I21K, "r"),
  "i21k_i1k_objectnet": (NUM_I21K, "objectnet"),
}


@functools.cache
def objectnet() -> dict[str, tuple[int, ...]]:
  """Returns {folder: ImageNet-1k classes} of the 113 of ObjectNet's 313 folders that are also in ImageNet-1k."""
  return _json("objectnet.json")


@functools.cache
def cue_conflict() -> dict[str, tuple[int, ...]]:
  """Returns {category: ImageNet-1k classes} of the 16 sorted cue-conflict categories; 207 classes in all."""
  return _json("cue_conflict.json")


def _classes(name: str) -> tuple[int, ...]:
  """Returns the ImageNet-1k classes of a data set, ascending."""
  if name == "objectnet":
    return tuple(sorted(c for classes in objectnet().values() for c in classes))
  return tuple(range(NUM_I1K)) if name == "i1k" else _numbers(f"i1k_{name}")


def _numbers(name: str) -> tuple[int, ...]:
  return tuple(int(line) for line in _text(f"{name}.txt").split())


def _json(file: str) -> dict[str, tuple[int, ...]]:
  return {name: tuple(classes) for name, classes in json.loads(_text(file)).items()}


def _text(file: str) -> str:
  return (resources.files(__package__) / file).read_text(encoding="utf-8")
