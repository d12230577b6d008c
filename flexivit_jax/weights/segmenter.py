"""Segmenter's published PyTorch files (github.com/rstrudel/segmenter), in and out: names, and the variant.yml beside.

A file has the weights of `encoder`, a ViT in timm's names, and of `decoder`, below "model". The variant.yml says what
arrays do not: heads, pixels of the training images, how these are normalised. LayerNorms have PyTorch's epsilon.
"""

import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import yaml

from flexivit_jax import errors, trees
from flexivit_jax.models import Segmenter
from flexivit_jax.sizes import SeqHw, Size, size_args
from flexivit_jax.trees import Arrays, Json, Params
from flexivit_jax.weights import optional, torch_layout

VARIANT, CHECKPOINT = "variant.yml", "checkpoint.pth"
EPS = 1e-5  # of PyTorch's LayerNorm, where timm's and AugReg's is 1e-6
# Mean and std of pixels in [0, 1], by the word for them in variant.yml.
NORMALISATIONS = {
  "vit": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
  "deit": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
_ENCODER, _DECODER = "encoder.", "decoder."
_ANCHOR = f"{_ENCODER}patch_embed.proj.weight"
_HEAD = ("head.weight", "head.bias")
_BLOCK = {
  "norm1": "norm1",
  "qkv": "attn.qkv",
  "out": "attn.proj",
  "norm2": "norm2",
  "fc1": "mlp.fc1",
  "fc2": "mlp.fc2",
}
_PLAIN = {"cls_emb": "classes", "proj_patch": "patch_kernel", "proj_classes": "class_kernel"}
_NORMS = {"decoder_norm": "blocks/encoder_norm", "mask_norm": "mask_norm"}
_CLASSES_OF_HEAD = 1000  # of the encoder's own head, which is never used


class Variant(NamedTuple):
  """What a variant.yml, and the file itself, say of the encoder.

  Attributes:
    fields: of the FlexiViT.
    normalisation: (mean, std) of the input, None where it is that of our models, or is not said.
    record: entries of the record of the weights.
    notes: for the user.
  """

  fields: Json
  normalisation: tuple[tuple[float, ...], tuple[float, ...]] | None
  record: Json
  notes: list[str]


def prefix_of(names: Iterable[str]) -> str | None:
  """Returns what stands before "encoder." and "decoder." in a Segmenter's names; None of other names."""
  names = list(names)
  prefix = next((n.removesuffix(_ANCHOR) for n in names if n.endswith(_ANCHOR)), None)
  if prefix is None or (prefix and prefix[-1] not in "./"):
    return None
  decoder = {
    n.removeprefix(f"{prefix}{_DECODER}") for n in names if n.startswith(prefix + _DECODER)
  }
  return prefix if decoder == {*_HEAD} or "mask_norm.weight" in decoder else None


# --- in ---


def variant_of(path: pathlib.Path) -> Variant:
  """Returns what is known of the encoder in a file that `prefix_of` recognises.

  Raises:
    UserError: a variant.yml that cannot be read, or with another normalisation.
  """
  fields: Json = {"layer_norm_eps": EPS, "grid_operator": "linear"}
  file = path.parent / VARIANT
  if not file.is_file():
    note = f"There is no {VARIANT} beside {path.name}, which would say heads and normalisation."
    return Variant(fields, None, {}, [note])
  content = _read(file)
  net = content["net_kwargs"]
  if isinstance(net.get("n_heads"), int):
    fields["num_heads"] = net["n_heads"]
  patch, pixels = net.get("patch_size"), net.get("image_size")
  if isinstance(patch, int) and isinstance(pixels, list) and len(pixels) == 2 and patch > 0:
    fields["posemb_size"] = (int(pixels[0]) // patch, int(pixels[1]) // patch)
  kind = net.get("normalization", "vit")
  if kind not in NORMALISATIONS:
    raise errors.unknown(f"normalization in {file}:", str(kind), NORMALISATIONS)
  mean, std = NORMALISATIONS[kind]
  record: Json = {"input": {"mean": list(mean), "std": list(std), "from": VARIANT}}
  names = content.get("class_names")
  if isinstance(names, list) and len(names) == net.get("n_cls"):
    record["class_names"] = [str(name) for name in names]
  return Variant(fields, None if kind == "vit" else (mean, std), record, [])


class _Loader(yaml.SafeLoader):
  """Plain values, and the tuples that PyYAML writes of Python's."""


_Loader.add_constructor(
  "tag:yaml.org,2002:python/tuple", lambda loader, node: loader.construct_sequence(node)
)


def _read(file: pathlib.Path) -> Json:
  """Returns a variant.yml, whose net_kwargs are a dict."""
  try:
    content = yaml.load(file.read_text(encoding="utf-8"), _Loader)  # a SafeLoader
    net = content["net_kwargs"]
  except (OSError, UnicodeDecodeError, yaml.YAMLError, LookupError, TypeError) as e:
    raise errors.UserError(
      f"{file} cannot be read as Segmenter's description of its model ({e!r:.200}); mend it or take it away."
    ) from e
  if not isinstance(net, dict):
    raise errors.UserError(f"{file}: net_kwargs is {net!r:.80}; expected names and values.")
  return content


def decoder_from_torch(arrays: Arrays, prefix: str) -> tuple[Json, Params]:
  """Returns (fields of the `Segmenter`, its parameters but those of the backbone).

  Args:
    arrays: of a file.
    prefix: of their names, see `prefix_of`.

  Raises:
    UserError: an array of the decoder that is missing, or unknown.
  """
  given = torch_layout.under(f"{prefix}{_DECODER}", arrays)
  if "head.weight" in given:
    flat = torch_layout.dense_from_torch(given, "head", "head")
    return {"decoder": "linear", "num_classes": len(given["head.bias"])}, trees.unflatten(flat)
  depth = len({name.split(".")[1] for name in given if name.startswith("blocks.")})
  width = given["proj_patch"].shape[0] if "proj_patch" in given else 0
  _check_names(given, depth)
  flat = torch_layout.dense_from_torch(given, "proj_dec", "projection")
  flat |= {ours: given[name] for name, ours in _PLAIN.items()}
  for name, ours in _NORMS.items():
    flat |= torch_layout.norm_from_torch(given, name, ours)
  for i in range(depth):
    block = torch_layout.under(f"blocks.{i}.", given)
    block = torch_layout.block_from_torch(block, _BLOCK, _heads(width))
    flat |= {f"blocks/encoderblock_{i}/{name}": array for name, array in block.items()}
  fields = {
    "decoder": "mask", "decoder_depth": depth, "num_classes": given["cls_emb"].shape[1],
  }  # fmt: skip
  return fields, {"decoder": trees.unflatten(flat)}


def _heads(width: int) -> int:
  """Heads of the mask transformer, as `models.Segmenter` has them."""
  return max(1, width // 64)


def _check_names(given: Arrays, depth: int) -> None:
  dense = ["proj_dec", *_NORMS]
  parts = [_BLOCK[part] for part in ("norm1", "qkv", "out", "norm2", "fc1", "fc2")]
  dense += [f"blocks.{i}.{part}" for i in range(depth) for part in parts]
  expected = {f"{name}.{leaf}" for name in dense for leaf in ("weight", "bias")} | {*_PLAIN}
  if expected != given.keys():
    lacking, extra = sorted(expected - given.keys()), sorted(given.keys() - expected)
    lines = [f"missing: {_DECODER}{n}" for n in lacking] + [
      f"unknown: {_DECODER}{n}" for n in extra
    ]
    raise errors.UserError(
      "The decoder is not Segmenter's mask transformer:\n  " + "\n  ".join(lines)
    )


# --- out ---


def save_segmenter(
  out: str | os.PathLike[str],
  model: Segmenter,
  params: Params,
  record: Json,
  *,
  image_hw: Size,
  seqhw: SeqHw | None = None,
) -> None:
  """Writes a folder with checkpoint.pth and variant.yml, as Segmenter's own `load_model` reads them. Needs PyTorch.

  The kernel and the positions are those of one patch size: the code does resize positions, but no kernels. The head of
  the encoder, which that code has and never uses, is zeros.

  Args:
    out: a name that is not there yet.
    model, params, record: what `weights.tasks.load` returns.
    image_hw: pixels of the images, `window_size` in variant.yml.
    seqhw: tokens per side, or (per column, per row); None: the kernel and the positions as they are stored.

  Raises:
    UserError: the name is there already, no PyTorch, or a model that the published code cannot be.
  """
  # Here, since they import `bare`, which imports this.
  from flexivit_jax.weights import baking, folders
  from flexivit_jax.weights.timm import writer

  torch = optional.require("torch", "Writing Segmenter's checkpoint")
  _check_writable(model)
  vit, own = model.parts["backbone"], params["backbone"]
  if seqhw is not None:
    vit, own = baking.bake(vit, own, image_hw=image_hw, **size_args(seqhw))
  if vit.patch_size[0] != vit.patch_size[1]:
    raise errors.UserError(
      f"Patches of {vit.patch_size} pixels are not square, as Segmenter's are; give a size with which they are."
    )
  arrays = _encoder_to_torch(writer.to_timm(vit, own)) | _decoder_to_torch(model, params)
  state = {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}
  with folders.new(pathlib.Path(out)) as part:
    torch.save({"model": state}, part / CHECKPOINT)
    (part / VARIANT).write_text(yaml.safe_dump(_variant(model, vit, record)), encoding="utf-8")


def _encoder_to_torch(arrays: Arrays) -> Arrays:
  """Names of timm below "encoder."; the class token has a position here, which is part of the token already."""
  position = arrays["pos_embed"]
  width = position.shape[-1]
  arrays = arrays | {
    "pos_embed": np.concatenate([np.zeros((1, 1, width), np.float32), position], axis=1),
    "head.weight": np.zeros((_CLASSES_OF_HEAD, width), np.float32),
    "head.bias": np.zeros(_CLASSES_OF_HEAD, np.float32),
  }
  return {f"{_ENCODER}{name}": array for name, array in arrays.items()}


def _decoder_to_torch(model: Segmenter, params: Params) -> Arrays:
  """The inverse of `decoder_from_torch`."""
  if model.decoder == "linear":
    flat = {n: np.asarray(a) for n, a in trees.flatten({"head": params["head"]}).items()}
    arrays = torch_layout.dense_to_torch(flat, "head", "head")
  else:
    flat = {n: np.asarray(a) for n, a in trees.flatten(params["decoder"]).items()}
    arrays = torch_layout.dense_to_torch(flat, "projection", "proj_dec")
    arrays |= {name: flat[ours] for name, ours in _PLAIN.items()}
    for name, ours in _NORMS.items():
      arrays |= torch_layout.norm_to_torch(flat, ours, name)
    for i in range(model.decoder_depth):
      block = torch_layout.under(f"blocks/encoderblock_{i}/", flat)
      block = torch_layout.block_to_torch(block, _BLOCK)
      arrays |= {f"blocks.{i}.{name}": array for name, array in block.items()}
  return {f"{_DECODER}{name}": array for name, array in arrays.items()}


def _check_writable(model: Segmenter) -> None:
  """Raises a UserError that lists what Segmenter's code computes otherwise."""
  vit = model.parts["backbone"]
  wanted = dict(
    pool_type="tok", registers=0, pre_norm=False, posemb="learn", gelu="exact", layer_norm_eps=EPS,
    mlp_dim=4 * vit.width,
  )  # fmt: skip
  lines = [
    f"{name}: {getattr(vit, name)!r} in the backbone, {value!r} there"
    for name, value in wanted.items()
    if getattr(vit, name) != value
  ]
  lines += [f"fuse: {model.fuse} here; there is one pass"] if model.fuse else []
  if lines:
    raise errors.UserError(
      "Segmenter's published code computes something else than this model:\n  " + "\n  ".join(lines)
    )


def _variant(model: Segmenter, vit: Any, record: Mapping[str, Any]) -> Json:
  pixels = [p * g for p, g in zip(vit.patch_size, vit.posemb_size, strict=True)]
  decoder = {"name": "linear"} if model.decoder == "linear" else {
    "name": "mask_transformer", "n_layers": model.decoder_depth, "drop_path_rate": 0.0,
    "dropout": model.decoder_dropout,
  }  # fmt: skip
  net = {
    "backbone": _backbone_name(vit), "patch_size": vit.patch_size[0], "image_size": pixels,
    "d_model": vit.width, "n_heads": vit.num_heads, "n_layers": vit.depth, "n_cls": model.num_classes,
    "distilled": False, "dropout": vit.dropout, "drop_path_rate": vit.stochastic_depth,
    "normalization": "vit", "decoder": decoder,
  }  # fmt: skip
  names = record.get("class_names")
  window = {"im_size": min(pixels), "window_size": min(pixels), "window_stride": min(pixels)}
  about = {"net_kwargs": net, "inference_kwargs": window}
  return about | ({"class_names": list(names)} if names else {})


def _backbone_name(vit: Any) -> str:
  """Timm's name of the nearest: that code looks weights to start from up by it."""
  kind = {192: "tiny", 384: "small", 768: "base", 1024: "large"}.get(vit.width, "tiny")
  return f"vit_{kind}_patch{vit.patch_size[0]}_384"
