"""Weights out, for timm: a folder that `timm.create_model("local-dir:FOLDER", pretrained=True)` loads.

Every argument that matters is written out, so the architecture's name decides one thing only: how timm resizes when it
is asked for another size. It does so bilinearly, as the paper, for flexivit_*, and bicubically for all others.
"""

import json
import os
import pathlib

import numpy as np
import safetensors.numpy

from flexivit_jax import errors, trees
from flexivit_jax.models import FlexiViT, vit
from flexivit_jax.sizes import SeqHw, Size, size_args
from flexivit_jax.trees import Arrays, Json, Params
from flexivit_jax.weights import (
  baking,
  folders,
  layouts,
  reading,
  stated,
  torch_layout,
)
from flexivit_jax.weights.timm import folder as timm_folder, names as timm_names

WEIGHTS = timm_folder.WEIGHTS[0]
_POOLS = {"tok": "token", "gap": "avg", "map": "map"}
_ACTIVATIONS = {ours: name for name, ours in timm_folder.ACTIVATIONS.items()}
_FLEXIVIT = {384: "flexivit_small", 768: "flexivit_base", 1024: "flexivit_large"}
_OTHERS = (
  "big_vision's .npz (`flexivit convert`) and the artifact (`flexivit export`) hold every model"
)


def save_timm(
  out: str | os.PathLike[str],
  model: FlexiViT,
  params: Params,
  record: Json,
  *,
  image_hw: Size,
  seqhw: SeqHw | None = None,
) -> None:
  """Writes a folder with config.json, model.safetensors and our record; it appears only when it is complete.

  With `seqhw` the kernel and the positions are those in use at this size, and timm resizes nothing. Without, they are
  as they are stored, and so is the image size that timm is told: kernel times grid. timm then runs another size by
  `create_model("local-dir:FOLDER", pretrained=True, img_size=240, patch_size=8)`, as we do unless the grid shrinks,
  where timm does not antialias. Its `set_input_size` resizes bicubically: another model.

  Args:
    out: a name that is not there yet.
    model, params, record: what `weights.load_with_record` returns; `class_names` become `label_names`.
    image_hw: pixels of the images, with seqhw.
    seqhw: tokens per side, or (per column, per row); None for all sizes.

  Raises:
    UserError: the name is there already; parameters that are not the model's; a model that timm cannot hold;
      a size that does not divide the image; class names that are not as many as classes.
  """
  out = pathlib.Path(out)
  _check(model)
  # Here, for it imports OpenCV, which `import flexivit_jax` does without.
  from flexivit_jax.data import class_names

  names = class_names.of_record(record, model.num_classes, f"what is to be written to {out}").names
  reading.check(model, params, f"What is to be written to {out}")
  if seqhw is not None:
    model, params = baking.bake(model, params, image_hw=image_hw, **size_args(seqhw))
  elif (model.posemb, model.kernel_resize) != ("learn", "pi"):
    raise errors.UserError(
      f"posemb={model.posemb!r}, kernel_resize={model.kernel_resize!r}: timm resizes learned positions, and kernels by"
      " PI-resize only; give seqhw for one size."
    )
  arrays = to_timm(model, params)
  record = stated.written_for(record, _hw(model))
  record = _record(model, record, None if seqhw is None else image_hw)
  described = config(model, arrays, stated.of_record(record)) | _labels(names, record)
  _write(out, arrays, described, record)


def to_timm(model: FlexiViT, params: Params) -> Arrays:
  """Returns the parameters in timm's names and layout, sine-cosine positions as numbers for the model's own grid."""
  flat = {n: np.asarray(a) for n, a in trees.flatten(vit.unstack_blocks(params)).items()}
  arrays = {"patch_embed.proj.weight": torch_layout.patches_to_torch(flat["embedding/kernel"])}
  arrays |= _positions(model, flat)
  arrays |= {to: flat[name] for name, to in _TOKENS.items() if name in flat}
  for i in range(model.depth):
    ours = torch_layout.under(f"Transformer/encoderblock_{i}/", flat)
    block = torch_layout.block_to_torch(ours, timm_names.BLOCK)
    arrays |= {f"blocks.{i}.{name}": array for name, array in block.items()}
  arrays |= torch_layout.norm_to_torch(flat, "Transformer/encoder_norm", "norm")
  if model.pre_norm:
    arrays |= torch_layout.norm_to_torch(flat, "pre_norm", "norm_pre")
  if model.pool_type == "map":
    pool = torch_layout.pool_to_torch(torch_layout.under("MAPHead_0/", flat), timm_names.POOL)
    arrays |= {f"attn_pool.{name}": array for name, array in pool.items()}
  if model.num_classes:
    arrays |= torch_layout.dense_to_torch(flat, "head", "head")
  return {name: np.ascontiguousarray(array) for name, array in arrays.items()}


_TOKENS = {"cls": "cls_token", "registers": "reg_token"}


def _positions(model: FlexiViT, flat: Arrays) -> Arrays:
  """Positions and the patch embedding's bias; where a norm follows, timm has no bias, and each position takes it."""
  grid, bias = flat.get("pos_embedding"), flat["embedding/bias"]
  if grid is None:
    grid = vit.sincos2d(model.posemb_size, model.width).reshape(1, -1, model.width)
  if model.pre_norm:
    return {"pos_embed": grid + bias[None, None]}
  return {"pos_embed": grid, "patch_embed.proj.bias": bias}


def _hw(model: FlexiViT) -> Size:
  """Pixels of the images for which kernel and grid are as they are."""
  (ph, pw), (gh, gw) = model.patch_size, model.posemb_size
  return ph * gh, pw * gw


def config(model: FlexiViT, arrays: Arrays, images: stated.Stated | None = None) -> Json:
  """Returns the config.json of a model at its own kernel and grid size; `images` states their preparation."""
  hw = list(_hw(model))
  channels = arrays["patch_embed.proj.weight"].shape[1]
  args = {
    "img_size": hw,
    "patch_size": list(model.patch_size),
    "in_chans": channels,
    "num_classes": model.num_classes,
    "global_pool": _POOLS[model.pool_type],
    "embed_dim": model.width,
    "depth": model.depth,
    "num_heads": model.num_heads,
    "mlp_ratio": _ratio(model.mlp_dim, model.width),
    "qkv_bias": True,
    "class_token": model.pool_type == "tok",
    "no_embed_class": True,
    "reg_tokens": model.registers,
    "pre_norm": model.pre_norm,
    "fc_norm": False,
    "pool_include_prefix": model.pool_type == "map",
    "act_layer": _ACTIVATIONS[model.gelu],
  }
  return {
    "architecture": _architecture(model),
    "num_classes": model.num_classes,
    "num_features": model.width,
    "global_pool": args["global_pool"],
    "model_args": args,
    "pretrained_cfg": {
      "input_size": [channels, *hw],
      "fixed_input_size": True,
      **_prepared(images),
      "mean": [0.5] * channels,
      "std": [0.5] * channels,
      "num_classes": model.num_classes,
      "first_conv": "patch_embed.proj",
      "classifier": "head",
    },
  }


def _prepared(images: stated.Stated | None) -> Json:
  """What timm resizes and cuts; where nothing is known, what it does for its own FlexiViTs."""
  if images is None:
    return {"interpolation": "bilinear", "crop_pct": 0.95}
  modes = {"squash": "squash", "contain": "border", "pad": "border"}
  return {
    "interpolation": images.filter,
    "crop_pct": images.one_crop_pct(),
    "crop_mode": modes.get(images.resize, "center"),
  }


def _labels(names: tuple[str, ...] | None, record: Json) -> Json:
  """The names of the classes where timm looks for them: beside `pretrained_cfg`, into which it puts them."""
  if names is None:
    return {}
  texts = record.get("class_descriptions")
  described = isinstance(texts, list) and len(texts) == len(names)
  more = {"label_descriptions": dict(zip(names, texts, strict=True))} if described else {}
  return {"label_names": list(names), **more}


def _architecture(model: FlexiViT) -> str:
  """One that resizes as the model does, and has its epsilon, which is no argument of timm's."""
  if model.layer_norm_eps == 1e-5:
    return "vit_base_patch16_clip_224"
  if model.kernel_operator == "linear":
    return _FLEXIVIT.get(model.width, "flexivit_base")
  return "vit_base_patch16_224"


def _ratio(mlp_dim: int, width: int) -> float:
  """The number that timm, which rounds down, multiplies the width with."""
  exact = mlp_dim / width
  return exact if int(width * exact) == mlp_dim else (mlp_dim + 0.5) / width


def _check(model: FlexiViT) -> None:
  if model.pool_type not in _POOLS:
    raise errors.UserError(
      f"timm has no pooling like pool_type={model.pool_type!r}, only {', '.join(_POOLS)}; {_OTHERS}."
    )
  if model.layer_norm_eps not in (1e-6, 1e-5):
    raise errors.UserError(
      f"layer_norm_eps={model.layer_norm_eps:g} cannot be said in timm's config.json, only 1e-6 and 1e-5; {_OTHERS}."
    )


def _record(model: FlexiViT, record: Json, image_hw: Size | None) -> Json:
  """The record, which is now about the arrays that are written."""
  patch, grid = list(model.patch_size), list(model.posemb_size)
  about = {"native_patch_size": patch, "native_grid": grid, "position": layouts.POSITIONS["learn"]}
  about |= {} if image_hw is None else {"image_size": list(image_hw)}
  written = {"patch_size": patch, "posemb_size": grid, "posemb": "learn", "scan": False}
  written["kernel_moment"] = None if model.kernel_moment is None else list(model.kernel_moment)
  return record | about | {"model": record["model"] | written}


def _write(out: pathlib.Path, arrays: Arrays, config: Json, record: Json) -> None:
  with folders.new(out) as part:
    safetensors.numpy.save_file(arrays, part / WEIGHTS, metadata={"format": "pt"})
    for name, content in ((timm_folder.CONFIG, config), (folders.RECORD, record)):
      (part / name).write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")
