"""The test sets of ImageNet classifiers, and the protocols under which numbers on them are published.

Rules and sources of the sets: docs/evaluation_sets.md.
"""

from typing import NamedTuple


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
  data: dict[str, str]
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

  @property
  def size(self) -> int:
    """Pixels of a side of that input."""
    return int(self.pp.rpartition("central_crop(")[2].removesuffix(")"))


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
