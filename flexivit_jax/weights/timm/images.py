"""What timm's config.json says of images and classes: mean and std, size, crop, filter; names of the classes.

A value that is missing is timm's default, as `timm.data.resolve_data_config` has it.
"""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

from flexivit_jax import errors
from flexivit_jax.sizes import Size
from flexivit_jax.trees import Json
from flexivit_jax.weights import class_labels
from flexivit_jax.weights.stated import FILTERS, Stated

IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
_CROP_PCT = 0.875
_RESIZES = {"center": "shorter", "squash": "squash", "border": "contain"}


class Images(NamedTuple):
  """The preparation of images, the (mean, std) of the input, and what a user should know."""

  stated: Stated
  mean: tuple[float, ...]
  std: tuple[float, ...]
  notes: list[str]


def read(
  where: str,
  config: Json,
  pretrained: Json,
  native: Size,
  channels: int,
) -> Images:
  """Returns what the config says.

  Args:
    where: the file, as it is to be shown.
    config: all of it.
    pretrained: its "pretrained_cfg", or all of it where it has one level only.
    native: pixels (h, w) of the images that the weights are for.
    channels: of the kernel.

  Raises:
    UserError: a mean or std that is no list of numbers.
  """
  notes: list[str] = []
  mean, std = (_numbers(where, pretrained, name, channels, notes) for name in ("mean", "std"))
  hw = _input_size(where, config, pretrained, native, notes)
  crop_pct = _crop_pct(where, pretrained, notes)
  mode = _known(where, pretrained, "crop_mode", _RESIZES, "center", notes)
  to = math.floor(hw[0] / crop_pct), math.floor(hw[1] / crop_pct)
  resize = "cover" if mode == "center" and to[0] != to[1] else _RESIZES[mode]
  stated = Stated(
    hw,
    resize,
    to,
    (crop_pct, crop_pct),
    "pil_" + _known(where, pretrained, "interpolation", FILTERS, "bicubic", notes),
    "even",
    [round(255 * value) for value in mean] if mode == "border" else 0,
    where,
  )
  return Images(stated, mean, std, notes)


def labels(where: str, config: Json, pretrained: Json, classes: int) -> tuple[Json, list[str]]:
  """Returns what the record says of the classes, and notes of names that cannot be used."""

  def said(name: str) -> Any:
    return config.get(name) or pretrained.get(name)

  key = "label_names" if said("label_names") else "labels"  # timm's oldest name
  names, notes = class_labels.in_order(f"{key} of {where}", said(key), classes)
  described = said("label_descriptions")
  if names is None or not isinstance(described, dict):
    return ({} if names is None else {"class_names": names}), notes
  texts = [str(described.get(name, name)) for name in names]
  return {"class_names": names, "class_descriptions": texts}, notes


def _numbers(
  where: str, pretrained: Json, name: str, channels: int, notes: list[str]
) -> tuple[float, ...]:
  values = pretrained.get(name)
  if values is None or values == []:
    values = IMAGENET[name]
    notes.append(f"{where} has no {name}: timm's default, {values}, is taken.")
  values = [values] if class_labels.is_number(values) else values
  if not isinstance(values, list) or not all(class_labels.is_number(v) for v in values):
    raise errors.UserError(f"{where}: {name} is {values!r}; expected a list of numbers.")
  if len(values) not in (1, channels):
    notes.append(
      f"{name} in {where} is {values}, and the kernel has {channels} input channel(s): its mean is taken, as in timm."
    )
    values = [sum(values) / len(values)]
  return tuple(values * (channels if len(values) == 1 else 1))


def _input_size(
  where: str,
  config: Json,
  pretrained: Json,
  native: Size,
  notes: list[str],
) -> Size:
  """Pixels of the images: those of the weights, unless timm's model takes images of any size."""
  size, args = pretrained.get("input_size"), config.get("model_args") or {}
  whole = isinstance(size, list) and len(size) == 3 and all(type(n) is int and n > 0 for n in size)
  if not isinstance(size, list) or not whole or tuple(size[1:]) == native:
    return native
  if args.get("dynamic_img_size") or pretrained.get("fixed_input_size") is False:
    return size[1], size[2]
  if args.get("img_size") is None:
    notes.append(
      f"input_size in {where} is {size}; the weights are for {native[0]}x{native[1]} pixels, and images are"
      " prepared for these."
    )
  return native


def _crop_pct(where: str, pretrained: Json, notes: list[str]) -> float:
  value = pretrained.get("crop_pct") or _CROP_PCT
  if class_labels.is_number(value) and 0.01 <= value <= 10:
    return float(value)
  notes.append(
    f"crop_pct in {where} is {value!r}, no number that can be: timm's default, {_CROP_PCT}, is taken."
  )
  return _CROP_PCT


def _known(
  where: str,
  pretrained: Json,
  name: str,
  choices: Iterable[str],
  default: str,
  notes: list[str],
) -> str:
  value = pretrained.get(name) or default
  if isinstance(value, str) and value in choices:
    return value
  notes.append(
    f"{name} in {where} is {value!r}, not one of {', '.join(choices)}: {default} is taken."
  )
  return default
