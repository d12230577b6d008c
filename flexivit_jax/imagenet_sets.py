"""The test sets of ImageNet classifiers, and the protocols under which numbers on them are published.

Rules and sources of the sets: docs/evaluation_sets.md. A set is read from TFDS, or where DATA_DIR has a folder of the
set's name from DATA_DIR/SET/CLASS/*.jpg.
"""

import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from flexivit_jax import errors


class TestSet(NamedTuple):
  """A set of images.

  Attributes:
    published: its name in `published`.
    data: keyword arguments of `data.make_source`, without `data_dir`.
    label_map: of the evaluator: classes that may compete; None: all.
    several: an image may have several labels, or none, and then is left out.
    num_classes: of the models that it tests.
  """

  published: str
  data: dict[str, Any]
  label_map: str | None = None
  several: bool = False
  num_classes: int = 1000


SETS: dict[str, TestSet] = {
  "val": TestSet("imagenet2012/validation", dict(name="imagenet2012", split="validation")),
  "v2": TestSet(
    "imagenet_v2/matched-frequency", dict(name="imagenet_v2/matched-frequency", split="test")
  ),
  "a": TestSet("imagenet_a", dict(name="imagenet_a", split="test"), "i1k_a"),
  "r": TestSet("imagenet_r", dict(name="imagenet_r", split="test"), "i1k_r"),
  "sketch": TestSet("imagenet_sketch", dict(name="imagenet_sketch", split="test")),
  "real": TestSet(
    "imagenet2012_real",
    dict(name="imagenet2012_real", split="validation", label_key="real_label"),
    several=True,
  ),
  "i21k": TestSet(
    "imagenet21k", dict(name="imagenet21k", split="full[25600:51200]"), num_classes=21_843
  ),
}


class Protocol(NamedTuple):
  """How an image becomes the model's input, what is changed of the model, and where that is written."""

  pp: str
  says: str
  fields: tuple[tuple[str, str], ...] = ()


_TIMM = (("kernel_operator", "cubic_antialias"), ("grid_operator", "cubic_antialias"))
PROTOCOLS: dict[str, Protocol] = {
  "paper": Protocol(
    "resize(272)|central_crop(240)",
    "both sides to 272, bilinear, middle 240 (big_vision, configs/proj/flexivit/i1k_deit3_distill.py)",
  ),
  "paper_i21k": Protocol(
    "resize_small(272)|central_crop(240)",
    "short side to 272, middle 240 (big_vision, configs/proj/flexivit/i21k_sup.py)",
  ),
  "timm": Protocol(
    "resize_small(252, method='cubic')|central_crop(240)",
    "short side to 240 / 0.95, bicubic, middle 240 (timm, results/results-*.csv)",
  ),
  "bwconrad": Protocol(
    "resize_small(248, method='cubic')|central_crop(224)",
    "short side to 248, bicubic, middle 224; the kernel PI-resized by the bicubic operator with antialias (timm's for"
    " these weights, and its default, as github.com/bwconrad/flexivit has it)",
    _TIMM,
  ),
}


def section(
  name: str,
  protocol: Protocol,
  *,
  data_dir: pathlib.Path | None,
  seqhw: Sequence[Any],
  batch_size: int,
) -> dict[str, Any]:
  """Returns the section of `evals` that evaluates on a set.

  Args:
    name: of the set, in `SETS`.
    protocol: one of `PROTOCOLS`.
    data_dir: where TFDS prepared it, or of the folders of images; None: TFDS's own default.
    seqhw: the grids.
    batch_size: images at a time.

  Raises:
    UserError: another name; a folder of images of a set whose images have several labels.
  """
  if name not in SETS:
    raise errors.unknown("test set", name, SETS)
  chosen = SETS[name]
  where = {} if data_dir is None else {"data_dir": str(data_dir)}
  source, classes = chosen.data | where, chosen.num_classes
  if data_dir is not None and (data_dir / name).is_dir() and not is_prepared(chosen, data_dir):
    if chosen.several:
      raise errors.UserError(
        f"{data_dir / name}: images of {name!r} have several labels, which no folders tell; use TFDS."
      )
    source = {"name": "folder", "split": name, **where}
    classes = sum(p.is_dir() for p in (data_dir / name).iterdir())  # of A and R 200, or all
  labels = f"{'multihot' if chosen.several else 'onehot'}({classes})"
  made: dict[str, Any] = {
    "data": source,
    "pp": f"decode|{protocol.pp}|value_range(-1, 1)|{labels}|keep('image', 'labels')",
    "seqhw": tuple(seqhw),
    "batch_size": batch_size,
  }
  made |= {"label_map": chosen.label_map} if chosen.label_map else {}
  return made | ({"skip_unlabelled": True} if chosen.several else {})


def is_prepared(chosen: TestSet, data_dir: pathlib.Path) -> bool:
  """Whether `data_dir` has a folder of TFDS of this set."""
  return (data_dir / chosen.data["name"].partition("/")[0]).is_dir()
