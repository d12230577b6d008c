"""Two towers at one patch size as a folder of Hugging Face's `transformers`: its own CLIP, or its own SigLIP."""

import json
import os
import pathlib
from typing import NamedTuple

import numpy as np
from safetensors import numpy as safetensors

from flexivit_jax import errors, trees
from flexivit_jax.models import FlexiViT, TextTower, TwoTowers, vit
from flexivit_jax.sizes import SeqHw, Size, size_args
from flexivit_jax.trees import Arrays, Json, Params
from flexivit_jax.weights import folders, stated, torch_layout
from flexivit_jax.weights.baking import bake
from flexivit_jax.weights.transformers import (
  folder as transformers_folder,
  images as transformers_images,
  names as transformers_names,
  shapes as transformers_shapes,
  towers as transformers_towers,
  writer as transformers_writer,
)
from flexivit_jax.weights.transformers.families import FAMILIES

# What each of transformers' models has, and what can be folded is not among it.
_IMAGE = {
  "clip": {"pool_type": "tok", "pre_norm": True, "registers": 0},
  "siglip": {"pool_type": "map", "pre_norm": False, "registers": 0, "num_classes": 0},
}
_TEXT = {
  "clip": {"causal": True, "norm_first": True, "pool_type": "eos", "pad_token": None},
  "siglip": {"causal": False, "norm_first": True, "pool_type": "last", "pad_token": None},
}


def save_towers(
  out: str | os.PathLike[str],
  model: TwoTowers,
  params: Params,
  record: Json,
  *,
  image_hw: Size,
  seqhw: SeqHw | None = None,
) -> None:
  """Writes a folder that `CLIPModel.from_pretrained` or `SiglipModel.from_pretrained` loads.

  It holds config.json, model.safetensors, preprocessor_config.json, tokenizer.json where the record has one,
  flexivit_record.json and the manifest of these files. The folder appears under its name only when it is complete.

  Args:
    out: the folder; must not be there.
    model, params, record: what `towers.load` returns.
    image_hw: pixels of the images that the written model takes.
    seqhw: tokens per side; by default those of the kernel's own size.

  Raises:
    UserError: towers that neither of the two models has, a size that does not divide the image, images that are not
      square, or something at `out`.
  """
  image, text = model.parts["image"], model.parts["text"]
  family = _family(image, text)
  size = {} if seqhw is None else size_args(seqhw)
  fixed, baked = bake(image, params["image"], image_hw=image_hw, **size)
  _check_square(image_hw, fixed.patch_size)
  flat = {name: np.asarray(a) for name, a in trees.flatten(vit.unstack_blocks(baked)).items()}
  theirs = _Towers(family, fixed, text)
  arrays = _image(theirs, flat)
  arrays |= _text(theirs, {n: np.asarray(a) for n, a in trees.flatten(params["text"]).items()})
  arrays |= _scalars(family, params)
  arrays = {name: np.asarray(a, np.float32, order="C") for name, a in arrays.items()}
  record = stated.written_for(record, image_hw)
  channels = flat["embedding/kernel"].shape[2]
  files = {
    transformers_folder.CONFIG: transformers_writer.to_json(_config(theirs, channels, image_hw)),
    transformers_folder.WEIGHTS: safetensors.save(arrays, metadata={"format": "pt"}),
    transformers_images.PREPROCESSOR: transformers_writer.to_json(
      transformers_writer.preprocessor(image_hw, channels, record)
    ),
    **_tokenizer(record.get("text")),
    folders.RECORD: transformers_writer.to_json(_record(record, family, fixed, image_hw)),
  }
  transformers_writer.write(pathlib.Path(out), files)


class _Towers(NamedTuple):
  family: str
  image: FlexiViT
  text: TextTower


def _family(image: FlexiViT, text: TextTower) -> str:
  """Returns the model of transformers that has such towers.

  Raises:
    UserError: neither has; the features of the nearer one that these have not, all of them.
  """
  family = "siglip" if image.pool_type == "map" else "clip"
  lines = [
    f"{tower} tower: {name}={getattr(module, name)!r}, there {value!r}"
    for tower, module, wanted in (("image", image, _IMAGE), ("text", text, _TEXT))
    for name, value in wanted[family].items()
    if getattr(module, name) != value
  ]
  if family == "clip" and text.eos_token == transformers_towers.LEGACY_END != text.vocab_size - 1:
    lines.append("text tower: eos_token=2, by which transformers pools the largest token")
  if lines:
    raise errors.UserError(
      f"No model of transformers has these two towers; the nearest is {transformers_towers.CLASSES[family]}:\n  "
      + "\n  ".join(lines)
      + "\nAn .npz (flexivit convert OUT.npz) holds any two towers."
    )
  return family


def _check_square(image_hw: Size, patch_hw: Size) -> None:
  if image_hw[0] != image_hw[1] or patch_hw[0] != patch_hw[1]:
    raise errors.UserError(
      f"Images of {image_hw} pixels in patches of {patch_hw}: transformers' CLIP and SigLIP take squares alone; give"
      " image_size and seqhw of a square."
    )


def _image(t: _Towers, flat: Arrays) -> Arrays:
  model, names, d = t.image, FAMILIES[t.family].layout, t.image.width
  position = flat.get("pos_embedding")
  if position is None:
    position = vit.sincos2d(model.posemb_size, d).reshape(1, -1, d)
  position = position[0]
  tower = {f"{names.patch}.weight": torch_layout.patches_to_torch(flat["embedding/kernel"])}
  norm = torch_layout.norm_to_torch(flat, "Transformer/encoder_norm", names.norm)
  projection = {}
  if t.family == "clip":
    # The class token has a position there, and none here; patches have a bias here, and none there.
    position = np.concatenate([np.zeros((1, d)), position + flat["embedding/bias"]])
    tower[names.tokens[0]] = flat["cls"].reshape(d)
    tower |= torch_layout.norm_to_torch(flat, "pre_norm", names.pre_norm)
    kernel, norm[f"{names.norm}.bias"] = _projection(flat, norm[f"{names.norm}.bias"], "image")
    projection = {"visual_projection.weight": kernel.T}
  else:
    tower[f"{names.patch}.bias"] = flat["embedding/bias"]
    ours = torch_layout.under("MAPHead_0/", flat)
    pool = torch_layout.pool_to_torch(ours, transformers_names.POOL)
    head = transformers_shapes.MAP
    tower |= {f"{head}.{n.replace('in_proj.', 'in_proj_')}": a for n, a in pool.items()}
  tower |= {names.position: position} | norm | _blocks(flat, model.depth, names.blocks)
  return {FAMILIES[t.family].base + name: a for name, a in tower.items()} | projection


def _text(t: _Towers, flat: Arrays) -> Arrays:
  here = transformers_towers
  norm = torch_layout.norm_to_torch(flat, "Transformer/encoder_norm", here.NORM)
  tower = {here.TOKENS: flat["embedding/embedding"], here.POSITIONS: flat["pos_embedding"][0]}
  projection = {}
  if t.family == "clip":
    kernel, norm[f"{here.NORM}.bias"] = _projection(flat, norm[f"{here.NORM}.bias"], "text")
    projection = {f"{here.PROJECTION}.weight": kernel.T}
  else:
    kernel = _kernel(flat, t.text.width)
    tower[f"{here.HEAD}.weight"] = kernel.T
    tower[f"{here.HEAD}.bias"] = flat.get("head/bias", np.zeros(kernel.shape[1]))
  tower |= norm | _blocks(flat, t.text.depth, here.BLOCKS)
  return {here.TOWER + name: a for name, a in tower.items()} | projection


def _blocks(flat: Arrays, depth: int, theirs: str) -> Arrays:
  arrays: Arrays = {}
  for i in range(depth):
    ours = torch_layout.under(f"Transformer/encoderblock_{i}/", flat)
    block = torch_layout.block_to_torch(ours, transformers_towers.BLOCK)
    arrays |= {f"{theirs}.{i}.{name}": a for name, a in block.items()}
  return arrays


def _kernel(flat: Arrays, width: int) -> np.ndarray:
  """The projection [in, out]; of a tower without one, the identity."""
  kernel = flat.get("head/kernel")
  return np.eye(width) if kernel is None else kernel


def _projection(flat: Arrays, norm_bias: np.ndarray, tower: str) -> tuple[np.ndarray, np.ndarray]:
  """Returns a projection without a bias, and the bias of the LayerNorm before it that makes up for it.

  `(y + s) W = y W + b` for `s W = b`, which has a solution where W does not make the vectors longer than they were.
  """
  kernel, bias = _kernel(flat, len(norm_bias)), flat.get("head/bias")
  if bias is None or not bias.any():
    return kernel, norm_bias
  shift = bias.astype(np.float64) @ np.linalg.pinv(kernel.astype(np.float64))
  if np.abs(shift @ kernel - bias).max() > 1e-5 * max(1.0, np.abs(bias).max()):
    raise errors.UserError(
      f"The projection of the {tower} tower has a bias that CLIP's projections, which have none, cannot express: it is"
      f" from {kernel.shape[0]} features to {kernel.shape[1]}. Train with head_bias=False, or keep the .npz."
    )
  return kernel, norm_bias + shift


def _scalars(family: str, params: Params) -> Arrays:
  scale = np.asarray(params["t"])
  bias = np.asarray(params.get("b", np.zeros(1)))
  if family == "siglip":
    return {transformers_towers.SCALE: scale, transformers_towers.BIAS: bias}
  if bias.any():
    note = (
      f"CLIPModel has no bias of the products: {bias[0]:.4g} is left out. The order of texts and the softmax over them"
      " stay as they are; sigmoids do not."
    )
    stated.print_notes({"notes": [note]})
  return {transformers_towers.SCALE: scale.reshape(())}


def _config(t: _Towers, channels: int, hw: Size) -> Json:
  image, text = t.image, t.text
  length = text.num_classes or text.width
  vision_config = _sizes(image) | {
    "image_size": hw[0],
    "patch_size": image.patch_size[0],
    "num_channels": channels,
  }
  text_config = _sizes(text) | {
    "vocab_size": text.vocab_size,
    "max_position_embeddings": text.max_length,
  }
  config: Json = {
    "model_type": t.family,
    "architectures": [transformers_towers.CLASSES[t.family]],
    "vision_config": vision_config,
    "text_config": text_config,
  }
  # The defaults of the other special tokens lie outside of a small vocabulary; no result depends on them.
  special = dict.fromkeys(("bos_token_id", "pad_token_id", "eos_token_id"))
  if t.family == "siglip":
    text_config |= special | {"projection_size": length}
    return config
  vision_config["projection_dim"] = text_config["projection_dim"] = length
  text_config |= special | {"eos_token_id": text.eos_token}
  return config | {"projection_dim": length}


def _sizes(tower: FlexiViT | TextTower) -> Json:
  return {
    "hidden_size": tower.width,
    "num_hidden_layers": tower.depth,
    "num_attention_heads": tower.num_heads,
    "intermediate_size": tower.mlp_dim,
    "hidden_act": transformers_writer.hidden_act(tower.gelu),
    "layer_norm_eps": tower.layer_norm_eps,
    "attention_dropout": 0.0,
  }


def _tokenizer(text: Json | None) -> dict[str, bytes]:
  """The files of the tokenizer; none where the record has none, or one that transformers cannot read from here."""
  if text is None:
    stated.print_notes({"notes": ["No tokenizer is known, so none is written."]})
    return {}
  try:
    content = json.loads(text["tokenizer"])
  except ValueError:
    note = "The tokenizer is one of SentencePiece, which is not written: add its tokenizer.json."
    stated.print_notes({"notes": [note]})
    return {}
  words = {v: k for k, v in _vocabulary(content).items()}
  special = {"pad_token": words.get(text["pad"]), "eos_token": words.get(text["end"])}
  config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": text["length"]}
  config |= {name: word for name, word in special.items() if word is not None}
  return {
    transformers_towers.TOKENIZER: text["tokenizer"].encode(),
    transformers_towers.TOKENIZER_CONFIG: transformers_writer.to_json(config),
  }


def _vocabulary(tokenizer: Json) -> dict[str, int]:
  """Tokens by their text."""
  vocab = tokenizer.get("model", {}).get("vocab", {})
  if isinstance(vocab, list):  # pieces with their scores
    vocab = {piece: i for i, (piece, _) in enumerate(vocab)}
  return vocab | {token["content"]: token["id"] for token in tokenizer.get("added_tokens", [])}


def _record(record: Json, family: str, model: FlexiViT, hw: Size) -> Json:
  """The source's record, and what was made of it; the tokenizer lies in a file of its own."""
  text = {k: v for k, v in (record.get("text") or {}).items() if k != "tokenizer"}
  return record | {
    "format": f"transformers folder, {family}, written by flexivit",
    "image_size": list(hw),
    "patch_size": list(model.patch_size),
    "grid": list(model.posemb_size),
    **({"text": text} if text else {}),
  }
