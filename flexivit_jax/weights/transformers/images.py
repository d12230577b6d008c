"""What transformers' image processor does to an image: how it resizes and crops; mean and std.

Its settings lie in preprocessor_config.json, or, as transformers 5 writes them, in a part of processor_config.json.
What they leave out is the default of the processor's class.
"""

import pathlib
from typing import NamedTuple

from flexivit_jax import errors
from flexivit_jax.sizes import Size
from flexivit_jax.trees import Json
from flexivit_jax.weights import class_labels
from flexivit_jax.weights.stated import FILTERS, Stated
from flexivit_jax.weights.timm import folder as timm_folder

PREPROCESSOR, PROCESSOR = "preprocessor_config.json", "processor_config.json"
_HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
CLIP = {
  "image_mean": [0.48145466, 0.4578275, 0.40821073],
  "image_std": [0.26862954, 0.26130258, 0.27577711],
}
_SHORTER = {"size": {"shortest_edge": 224}, "do_center_crop": True, "resample": 3}
# Defaults of the classes that the supported families use.
_DEFAULTS: dict[str, Json] = {
  "ViT": {"size": 224, "resample": 2} | _HALF,
  "DeiT": {"size": 256, "resample": 3, "do_center_crop": True} | _HALF,
  "CLIP": _SHORTER | CLIP,
  "Bit": _SHORTER | CLIP,
  "Siglip": {"size": 224, "resample": 3} | _HALF,
  "OwlViT": {"size": 768, "resample": 3} | CLIP,
  "Owlv2": {"size": 960, "resample": 2, "do_pad": True} | CLIP,
}
# The class that transformers takes by the model type where the file names none.
_OF_FAMILY = {
  "vit": "ViT",
  "deit": "DeiT",
  "dinov2": "Bit",
  "dinov2_with_registers": "Bit",
  "clip": "CLIP",
  "clip_vision_model": "CLIP",
  "siglip": "Siglip",
  "siglip_vision_model": "Siglip",
  "owlvit": "OwlViT",
  "owlv2": "Owlv2",
}
_BY_SHORTER_SIDE = ("CLIP", "Bit")  # whose size as one number is that of the shorter side
_PADS = "Owlv2"  # makes a square of an image before it is resized
_FLEXIBLE = ("dinov2", "dinov2_with_registers")  # take images of any size


class Normalisation(NamedTuple):
  """Of the input, a number for each channel: the model takes `(pixel - mean) / std`, pixels in [0, 1]."""

  mean: list[float]
  std: list[float]


class Images(NamedTuple):
  """What the processor of a folder does, each part None where no file says it, and what a user should know."""

  where: str
  stated: Stated | None
  normalisation: Normalisation | None
  notes: list[str]


class Processor(NamedTuple):
  """The settings of an image processor, with the defaults of its class, and the file that they lie in."""

  path: pathlib.Path
  settings: Json
  kind: str

  @property
  def where(self) -> str:
    """Returns folder and file name, for messages."""
    return f"{self.path.parent.resolve().name}/{self.path.name}"


def read(folder: pathlib.Path, family: str, native: Size, channels: int) -> Images:
  """Returns what the files of a folder say of images.

  Args:
    folder: of transformers.
    family: the model type of config.json.
    native: pixels (h, w) of config.json's image_size.
    channels: of the kernel.

  Raises:
    UserError: a file that holds no JSON object, a mean, std or factor that is no number.
  """
  processor = find(folder, family)
  if processor is None:
    return Images("", None, None, [])
  values, (stated, notes) = normalisation(processor), preparation(processor, family, native)
  if values is not None:
    mean, more = _of_channels(processor, values.mean, channels)
    std, _ = _of_channels(processor, values.std, channels)
    values, notes = Normalisation(mean, std), notes + more
  return Images(processor.where, stated, values, notes)


def _of_channels(
  processor: Processor, values: list[float], channels: int
) -> tuple[list[float], list[str]]:
  if len(values) == channels:
    return values, []
  note = (
    f"{processor.where} has mean and std of {len(values)} channels, and the kernel has {channels}:"
    " their means are taken, as timm does."
  )
  return [sum(values) / len(values)] * channels, [note]


def find(folder: pathlib.Path, family: str) -> Processor | None:
  """Returns the processor of a folder, or None where no file says it; the newest form comes first, as in transformers.

  Raises:
    UserError: a file that holds no JSON object.
  """
  both, alone = folder / PROCESSOR, folder / PREPROCESSOR
  if both.is_file() and "image_processor" in (nested := timm_folder.read_json(both)):
    path, settings = both, nested["image_processor"]
    if not isinstance(settings, dict):
      raise errors.UserError(f"{both}: image_processor is {settings!r}; expected a JSON object.")
  elif alone.is_file():
    path, settings = alone, timm_folder.read_json(alone)
  else:
    return None
  kind = _kind(settings) or _OF_FAMILY[family]
  explicit = {name: value for name, value in settings.items() if value is not None}
  return Processor(path, _DEFAULTS.get(kind, {}) | explicit, kind)


def _kind(settings: Json) -> str:
  """The class without what all have in their names: "ViTFeatureExtractor", "ViTImageProcessorFast" are "ViT"."""
  name = settings.get("image_processor_type") or settings.get("feature_extractor_type") or ""
  return str(name).partition("ImageProcessor")[0].partition("FeatureExtractor")[0]


def normalisation(processor: Processor) -> Normalisation | None:
  """Returns how pixels are normalised, as mean and std of pixels in [0, 1]; None if no file states it.

  Raises:
    UserError: a value that is no number.
  """
  settings = processor.settings
  if not settings.get("do_normalize", True):
    mean, std = [0.0] * 3, [1.0] * 3
  elif "image_mean" in settings and "image_std" in settings:
    mean, std = (_numbers(processor, name) for name in ("image_mean", "image_std"))
  else:
    return None
  factor = settings.get("rescale_factor", 1 / 255) if settings.get("do_rescale", True) else 1.0
  if not class_labels.is_number(factor) or not factor > 0:
    raise errors.UserError(
      f"{processor.path.name} has rescale_factor={factor!r}; expected a number > 0."
    )
  white = 255 * factor
  if abs(white - 1) < 1e-6:  # 0.00392156862745098 is meant to be 1 / 255
    return Normalisation(mean, std)
  return Normalisation([m / white for m in mean], [s / white for s in std])


def preparation(processor: Processor, family: str, native: Size) -> tuple[Stated, list[str]]:
  """Returns how an image is resized and cropped, and notes of what was not followed.

  Args:
    processor: of `read`.
    family: the model type of config.json.
    native: pixels (h, w) of config.json's image_size.
  """
  settings, where = processor.settings, processor.where
  notes = []
  if processor.kind not in _DEFAULTS:
    shown = processor.kind and f"{processor.kind}ImageProcessor"
    notes.append(
      f"{where} names the image processor {shown!r}, which is not known: its size, crop and filter are read as usual."
    )
  resize, to = _size(processor, native, notes)
  crop = _crop(processor, notes)
  if not settings.get("do_resize", True):
    notes.append(
      f"{where} has do_resize=false: an image of {_by(crop or native)} pixels is taken as it is, others are squashed."
    )
    resize, to, crop = "squash", crop or native, None
  if crop is None and resize == "shorter":
    notes.append(f"{where} has no crop: the centre is cut out of images that are not square.")
  if settings.get("do_pad") and processor.kind == _PADS and resize == "squash":
    resize = "pad"
    notes.append(
      f"{where} blurs an image before it makes it smaller; here the filter of Pillow does both at once."
    )
  hw = crop or to
  stated = Stated(hw, resize, to, _pct(hw, to), _filter(processor, notes), "down", 0, where)
  if hw != native and family not in _FLEXIBLE:
    notes.append(
      f"{where} makes images of {_by(hw)} pixels, and the model is for {_by(native)}, for which they are prepared."
    )
    stated = stated.at(native)
  if settings.get("do_pad") and resize != "pad":
    notes.append(f"do_pad in {where} is not used.")
  return stated, notes


def _size(processor: Processor, native: Size, notes: list[str]) -> tuple[str, Size]:
  """Whether both sides or the shorter one is resized, and to what."""
  size = processor.settings.get("size", native)
  if isinstance(size, int) and processor.kind in _BY_SHORTER_SIDE:
    size = {"shortest_edge": size}
  if isinstance(size, dict) and size.keys() == {"shortest_edge"}:
    if side := _pair(size["shortest_edge"]):
      return "shorter", side
  elif pair := _pair(size):
    return "squash", pair
  notes.append(
    f"size in {processor.where} is {size!r}, not understood: images are squashed to {_by(native)} pixels."
  )
  return "squash", native


def _crop(processor: Processor, notes: list[str]) -> Size | None:
  if not processor.settings.get("do_center_crop", False):
    return None
  size = processor.settings.get("crop_size", 224)
  if (pair := _pair(size)) is None:
    notes.append(f"crop_size in {processor.where} is {size!r}, not understood: nothing is cropped.")
  return pair


def _pair(size: object) -> Size | None:
  """Pixels (h, w) of one number, two, or a height and a width; None for what is none of these."""
  if isinstance(size, dict):
    size = [size.get("height"), size.get("width")] if size.keys() == {"height", "width"} else None
  sides = [size, size] if isinstance(size, int) else size
  if not isinstance(sides, (list, tuple)) or len(sides) != 2:
    return None
  whole = all(type(side) is int and 0 < side <= 2**14 for side in sides)
  return (sides[0], sides[1]) if whole else None


def _filter(processor: Processor, notes: list[str]) -> str:
  """Pillow's number, or its name; bilinear is the default of transformers."""
  value = processor.settings.get("resample", 2)
  if isinstance(value, str) and value.lower() in FILTERS:
    return f"pil_{value.lower()}"
  if type(value) is int and 0 <= value < len(FILTERS):
    return f"pil_{FILTERS[value]}"
  notes.append(
    f"resample in {processor.where} is {value!r}, no filter of Pillow: bilinear is taken."
  )
  return "pil_bilinear"


def _pct(hw: Size, to: Size) -> tuple[float, float]:
  return hw[0] / to[0], hw[1] / to[1]


def _by(size: Size) -> str:
  return f"{size[0]}x{size[1]}"


def _numbers(processor: Processor, name: str) -> list[float]:
  values = processor.settings[name]
  if not isinstance(values, list) or not all(type(value) in (int, float) for value in values):
    raise errors.UserError(
      f"{processor.path.name} has {name}={values!r}; expected a list of numbers."
    )
  return [float(value) for value in values]
