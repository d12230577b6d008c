"""A FlexiViT at one patch size as a folder of Hugging Face's `transformers`, which loads it as its own ViT."""

import json
import os
import pathlib
from collections.abc import Sequence

import numpy as np
from safetensors import numpy as safetensors

from flexivit_jax import errors, trees
from flexivit_jax.models import FlexiViT, vit
from flexivit_jax.sizes import SeqHw, Size, size_args
from flexivit_jax.trees import Arrays, Json, Params
from flexivit_jax.weights import folders, stated, torch_layout
from flexivit_jax.weights.baking import bake
from flexivit_jax.weights.transformers import (
  config as transformers_config,
  folder as transformers_folder,
  images as transformers_images,
)
from flexivit_jax.weights.transformers.families import FAMILIES

_VIT = FAMILIES["vit"]
_BILINEAR = 2  # Pillow's number


def save_transformers(
  out: str | os.PathLike[str],
  model: FlexiViT,
  params: Params,
  record: Json,
  *,
  image_hw: Size,
  seqhw: SeqHw | None = None,
) -> None:
  """Writes a folder that `ViTForImageClassification.from_pretrained` loads, or `ViTModel` where there is no head.

  It holds config.json, model.safetensors, preprocessor_config.json (images as the record says, else squashed to
  `image_hw`; pixels in [-1, 1]), flexivit_record.json and the manifest of these files. The folder appears under its
  name only when it is complete. `ViTModel` is to be loaded with `add_pooling_layer=False`; the output is then
  `last_hidden_state[:, 0]`.

  Args:
    out: the folder; must not be there.
    model, params, record: what `weights.load_with_record` returns; `class_names` become the labels.
    image_hw: pixels of the images that the written model takes.
    seqhw: tokens per side, or (per column, per row); by default those of the kernel's own size.

  Raises:
    UserError: a model that is no ViT of transformers, a size that does not divide the image, class names that are not
      as many as classes, or something at `out`.
  """
  out = pathlib.Path(out)
  _check(model)
  size = {} if seqhw is None else size_args(seqhw)
  fixed, baked = bake(model, params, image_hw=image_hw, **size)
  flat = {name: np.asarray(a) for name, a in trees.flatten(vit.unstack_blocks(baked)).items()}
  weights = safetensors.save(_arrays(fixed, flat), metadata={"format": "pt"})
  channels = flat["embedding/kernel"].shape[2]
  # Here, for it imports OpenCV, which `import flexivit_jax` does without.
  from flexivit_jax.data import class_names

  labels = class_names.of_record(record, model.num_classes, f"what is to be written to {out}")
  config = _config(fixed, channels, image_hw, labels.names)
  record = stated.written_for(record, image_hw)
  write(
    out,
    {
      transformers_folder.CONFIG: to_json(config),
      transformers_folder.WEIGHTS: weights,
      transformers_images.PREPROCESSOR: to_json(preprocessor(image_hw, channels, record)),
      folders.RECORD: to_json(_record(record, fixed, image_hw)),
    },
  )


def _check(model: FlexiViT) -> None:
  """Raises a UserError for a model that transformers' ViT cannot be."""
  wanted = {"pool_type": "tok", "registers": 0, "pre_norm": False}
  for name, value in wanted.items():
    if getattr(model, name) != value:
      raise errors.UserError(
        f"{name}={getattr(model, name)!r}: transformers' ViT has only {name}={value!r}. An .npz"
        " (flexivit convert) or an artifact (flexivit export) can hold this model."
      )


def _arrays(model: FlexiViT, flat: Arrays) -> Arrays:
  """The baked model's arrays in the names that `save_pretrained` writes."""
  names, d = _VIT.layout, model.width
  position = flat.get("pos_embedding")
  if position is None:
    position = vit.sincos2d(model.posemb_size, d).reshape(1, -1, d)
  tower = {
    f"{names.patch}.weight": torch_layout.patches_to_torch(flat["embedding/kernel"]),
    f"{names.patch}.bias": flat["embedding/bias"],
    # The class token has a position there, and none here.
    names.position: np.concatenate([np.zeros((1, 1, d), np.float32), position], axis=1),
    names.tokens[0]: flat["cls"],
    **torch_layout.norm_to_torch(flat, "Transformer/encoder_norm", names.norm),
  }
  for i in range(model.depth):
    ours = torch_layout.under(f"Transformer/encoderblock_{i}/", flat)
    block = torch_layout.block_to_torch(ours, names.block)
    tower |= {f"{names.blocks}.{i}.{name}": array for name, array in block.items()}
  prefix = _VIT.base if model.num_classes else ""
  arrays = {prefix + name: array for name, array in tower.items()}
  if model.num_classes:
    arrays |= torch_layout.dense_to_torch(flat, "head", "classifier")
  return {name: np.ascontiguousarray(array) for name, array in arrays.items()}


def _config(model: FlexiViT, channels: int, hw: Size, names: Sequence[str] | None) -> Json:
  config = {
    "model_type": "vit",
    "architectures": ["ViTForImageClassification" if model.num_classes else "ViTModel"],
    "hidden_size": model.width,
    "num_hidden_layers": model.depth,
    "num_attention_heads": model.num_heads,
    "intermediate_size": model.mlp_dim,
    "hidden_act": hidden_act(model.gelu),
    "layer_norm_eps": model.layer_norm_eps,
    "image_size": _one_or_two(hw),
    "patch_size": _one_or_two(model.patch_size),
    "num_channels": channels,
    "qkv_bias": True,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
  }
  if not model.num_classes:
    return config
  labels = names or [f"LABEL_{i}" for i in range(model.num_classes)]
  ids = {label: i for i, label in enumerate(labels)}
  return config | {"id2label": {str(i): n for i, n in enumerate(labels)}, "label2id": ids}


def hidden_act(gelu: str) -> str:
  """Returns transformers' name of a GELU."""
  return next(theirs for theirs, ours in transformers_config.GELU.items() if ours == gelu)


def _one_or_two(size: Size) -> int | list[int]:
  """A square as one number, which is all that some of transformers' code takes."""
  return size[0] if size[0] == size[1] else list(size)


def preprocessor(hw: Size, channels: int, record: Json) -> Json:
  """Returns the preprocessor_config.json of images of `hw`, resized and cut as the record says, else squashed."""
  default = {
    "image_processor_type": "ViTImageProcessor",
    "do_resize": True,
    "size": {"height": hw[0], "width": hw[1]},
    "resample": _BILINEAR,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5] * channels,
    "image_std": [0.5] * channels,
  }
  return default | _resize(stated.of_record(record))


def _resize(images: stated.Stated | None) -> Json:
  """What is to be resized and cut, by the class of transformers that can do it; nothing where nothing is known."""
  if images is None:
    return {}
  if images.resize in ("contain", "pad"):
    note = (
      "transformers cannot put borders around an image, as the source does: images are squashed."
    )
    stated.print_notes({"notes": [note]})
  filter_ = {"resample": stated.FILTERS.index(images.filter)}
  (h, w), (crop_h, crop_w) = images.to, images.hw
  if images.resize in ("contain", "pad") or (images.resize == "squash" and images.to == images.hw):
    return filter_
  crop = {"do_center_crop": True, "crop_size": {"height": crop_h, "width": crop_w}}
  if images.resize == "squash":
    kind, size = "DeiTImageProcessor", {"height": h, "width": w}
  else:
    kind, size = "CLIPImageProcessor", {"shortest_edge": h}
  return filter_ | crop | {"image_processor_type": kind, "size": size}


def _record(record: Json, model: FlexiViT, hw: Size) -> Json:
  """The source's record, and what was made of it."""
  return record | {
    "format": "transformers folder, vit, written by flexivit",
    "image_size": list(hw),
    "patch_size": list(model.patch_size),
    "grid": list(model.posemb_size),
  }


def to_json(content: Json) -> bytes:
  """Returns a file of JSON."""
  return (json.dumps(content, indent=2, allow_nan=False) + "\n").encode()


def write(out: pathlib.Path, parts: dict[str, bytes]) -> None:
  """Writes files into a folder that appears when it is complete."""
  with folders.new(out) as folder:
    for name, content in parts.items():
      (folder / name).write_bytes(content)
