"""What open_clip_config.json says of the image tower: its GELU, and how images are prepared.

What it leaves out is OpenCLIP's default: CLIP's mean and std, bicubic, the shorter side to the image's size.
"""

import pathlib
from typing import NamedTuple

from flexivit_jax.sizes import Size
from flexivit_jax.trees import Json
from flexivit_jax.weights.big_vision import Fields
from flexivit_jax.weights.stated import Stated
from flexivit_jax.weights.timm import folder as timm_folder, images as timm_images
from flexivit_jax.weights.transformers.images import CLIP

CONFIG = "open_clip_config.json"
_MODES = {"shortest": "center", "squash": "squash", "longest": "border"}


class Images(NamedTuple):
  """The preparation, the (mean, std) of the input, fields of the model, and what a user should know."""

  stated: Stated
  mean: tuple[float, ...]
  std: tuple[float, ...]
  fields: Fields
  notes: list[str]


def read(folder: pathlib.Path, native: Size, channels: int) -> Images:
  """Returns what the file in a folder says.

  Args:
    folder: beside the weights.
    native: pixels (h, w) of the images that the weights are for.
    channels: of the kernel.

  Raises:
    UserError: no JSON object; a mean or std that is no list of numbers.
  """
  config = timm_folder.read_json(folder / CONFIG)
  model, images = (_part(config, name) for name in ("model_cfg", "preprocess_cfg"))
  where, mode = f"{folder.resolve().name}/{CONFIG}", images.get("resize_mode") or "shortest"
  # The same settings by timm's names.
  pretrained = {
    "mean": images.get("mean") or CLIP["image_mean"],
    "std": images.get("std") or CLIP["image_std"],
    "interpolation": images.get("interpolation"),
    "crop_mode": _MODES.get(mode, mode) if isinstance(mode, str) else mode,
    "crop_pct": 1.0,
  }
  read_ = timm_images.read(where, {}, pretrained, native, channels)
  fields = {"gelu": "quick"} if model.get("quick_gelu") is True else {}
  return Images(read_.stated, read_.mean, read_.std, fields, read_.notes)


def _part(config: Json, name: str) -> Json:
  value = config.get(name)
  return value if isinstance(value, dict) else {}
