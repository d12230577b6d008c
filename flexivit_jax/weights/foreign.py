"""Other frameworks, where they are installed: the only file of the package that imports them.

Reading and writing weights needs none of them, but for PyTorch's own `.pth` and `.bin` files. What was written is run
here in the framework that it was written for, for the certificate.
"""

import importlib
import os
import types
from typing import Any

import numpy as np
from jaxtyping import Float

from flexivit_jax import errors

_ADVICE = "pip install -r requirements-convert.txt has the versions that are tested"


def require(package: str, why: str) -> types.ModuleType:
  """Imports a package that is no dependency of ours; a UserError that says why it is needed if it is not there."""
  try:
    return importlib.import_module(package)
  except ModuleNotFoundError as e:
    if e.name != package:
      raise
    raise errors.UserError(
      f"{why} needs the package {package}, which is not installed; {_ADVICE}."
    ) from e


def transformers_logits(
  folder: str | os.PathLike[str], image: Float[np.ndarray, "n h w c"]
) -> Float[np.ndarray, "n k"]:
  """Runs a folder of Hugging Face's transformers as it is, in float32 on the CPU.

  Args:
    folder: with config.json and model.safetensors; nothing is fetched from anywhere else.
    image: pixels as the model takes them, normalised with its own mean and std.

  Returns:
    The logits; of a model without a head its pooled output: the class token after the last LayerNorm, SigLIP's pooled
    token, CLIP's embedding of the image.

  Raises:
    UserError: transformers or torch is not installed, or arrays that the model has are not in the folder.
  """
  why = f"Running {folder}"
  torch, transformers = require("torch", why), require("transformers", why)
  config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
  name = config.architectures[0]
  given = {"add_pooling_layer": False} if name in ("ViTModel", "DeiTModel") else {}
  model, loaded = getattr(transformers, name).from_pretrained(
    folder, local_files_only=True, dtype=torch.float32, output_loading_info=True, **given
  )
  if lacking := sorted(loaded["missing_keys"]):
    raise errors.UserError(f"{folder} lacks arrays of {name}: {', '.join(lacking)}.")
  pixels = torch.from_numpy(np.ascontiguousarray(image.transpose(0, 3, 1, 2)))
  with torch.no_grad():
    output = _pooled(model.eval(), pixels)
  return output.numpy()


def _pooled(model: Any, pixels: Any) -> Any:
  """The one output of a model in transformers that stands for the whole image."""
  if hasattr(model, "get_image_features"):  # it has a tower for text, too
    return model.get_image_features(pixel_values=pixels).pooler_output
  out = model(pixel_values=pixels)
  for name in ("logits", "image_embeds", "pooler_output"):
    if getattr(out, name, None) is not None:
      return getattr(out, name)
  return out.last_hidden_state[:, 0]
