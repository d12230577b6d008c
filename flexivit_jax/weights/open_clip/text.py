"""The text tower of an OpenAI or OpenCLIP file, beside the image tower: `transformer.resblocks.*`, or below `text.`."""

import pathlib
import re

import numpy as np

from flexivit_jax import errors, trees
from flexivit_jax.trees import Arrays, Json
from flexivit_jax.weights import bare, contents, npz, torch_layout
from flexivit_jax.weights.big_vision import Fields
from flexivit_jax.weights.open_clip import images as open_clip_images
from flexivit_jax.weights.timm import folder as timm_folder
from flexivit_jax.weights.tower_names import Text
from flexivit_jax.weights.transformers import shapes, towers as transformers_towers

_TOKENS, _POSITIONS, _NORM, _PROJECTION = (
  "token_embedding.weight", "positional_embedding", "ln_final", "text_projection",
)  # fmt: skip
_BLOCKS = "transformer.resblocks"
_BLOCK = {
  "norm1": "ln_1",
  "qkv": "attn.in_proj",
  "out": "attn.out_proj",
  "scale1": "ls_1.gamma",
  "norm2": "ln_2",
  "fc1": "mlp.c_fc",
  "fc2": "mlp.c_proj",
  "scale2": "ls_2.gamma",
}
_PARTS = (_TOKENS, _POSITIONS, _NORM, _PROJECTION, "transformer.", "cls_emb")
_HEAD_WIDTH = 64  # of OpenAI's text towers, and OpenCLIP's where nothing says another
_POOLS = {"argmax": "eos", "last": "last", "first": "first"}


def read(path: pathlib.Path, given: Fields) -> Text | None:
  """Returns the text tower of a file, its scalars and the tokenizer beside it; None for a file without.

  What open_clip_config.json beside the file leaves out is OpenCLIP's default, and that is CLIP's.

  Args:
    path: the file.
    given: fields of the tower that the caller gives: `num_heads`, and `gelu` where no config says it.

  Raises:
    UserError: a text tower that a `TextTower` cannot be; several of them.
  """
  suffix = path.suffix.lower()
  contents.check(path, suffix if suffix in npz.READERS else contents.TORCH)
  arrays, _ = bare.READERS[suffix](path)
  prefixes = [
    name.removesuffix(_TOKENS) for name in arrays if re.search(rf"(^|\.){_TOKENS}$", name)
  ]
  if not prefixes:
    if foreign := next(
      (n for n in arrays if re.search(r"(^|\.)text\.(transformer|model)\.", n)), None
    ):
      raise errors.UserError(
        f"{path}: the text tower ({foreign}, ...) is a model of transformers inside OpenCLIP, which is not read; give"
        " OpenCLIP's own text tower, or the two towers as a folder of transformers."
      )
    return None
  if len(prefixes) > 1:
    raise errors.UserError(
      f"{path} holds several text towers, below {' and '.join(map(repr, prefixes))}."
    )
  return _read(path, arrays, prefixes[0], given)


def _read(path: pathlib.Path, arrays: Arrays, prefix: str, given: Fields) -> Text:
  below = torch_layout.under(prefix, arrays)
  tower = {name: a for name, a in below.items() if name.startswith(_PARTS)}
  if "cls_emb" in tower:
    raise errors.UserError(
      f"{path}: the text tower has an embedding of its own that is pooled (cls_emb, as CoCa's), which our text towers"
      " do not have."
    )
  config = path.parent / open_clip_images.CONFIG
  stated = timm_folder.read_json(config).get("model_cfg") if config.is_file() else None
  model = stated if isinstance(stated, dict) else {}
  fields, notes = _fields(path, tower, model, given)
  shapes.compare(_shapes(fields, tower), tower)
  outside = torch_layout.under(prefix.removesuffix("text."), arrays)
  if "logit_scale" not in outside:
    raise errors.UserError(f"{path} has a text tower and no logit_scale.")
  named = {"t": "logit_scale", "b": "logit_bias"}
  scalars = {ours: outside[name].reshape(1) for ours, name in named.items() if name in outside}
  family = "clip" if fields["pool_type"] == "eos" else "siglip"
  tokenizer, more = transformers_towers.tokenizer(path.parent, family, fields)
  return Text(trees.unflatten(_convert(fields, tower)), fields, scalars, tokenizer, [*notes, *more])


def _fields(
  path: pathlib.Path, tower: Arrays, model: Json, given: Fields
) -> tuple[Fields, list[str]]:
  text = model.get("text_cfg") if isinstance(model.get("text_cfg"), dict) else {}
  (vocab_size, width), positions = tower[_TOKENS].shape, tower[_POSITIONS]
  blocks = {m[1] for name in tower if (m := re.match(rf"{_BLOCKS}\.(\d+)\.", name))}
  first = f"{_BLOCKS}.0.{_BLOCK['fc1']}.weight"
  if first not in tower:
    raise errors.UserError(f"{path}: the text tower has no array {first}.")
  pool = text.get("pool_type") or "argmax"
  if pool not in _POOLS:
    raise errors.unknown(f"pool_type in {open_clip_images.CONFIG}:", pool, _POOLS)
  bias = f"{_PROJECTION}.bias" in tower
  if bias and not text:
    raise errors.UserError(
      f"{path}: the projection of the text tower has a bias, so it is not CLIP's; what it is,"
      f" {open_clip_images.CONFIG} says: put it beside the file."
    )
  kernel = tower.get(_PROJECTION, tower.get(f"{_PROJECTION}.weight", np.zeros((0, 0))).T)
  approximate = (text.get("act_kwargs") or {}).get("approximate")
  fields: Fields = dict(
    kind="clip" if _POOLS[pool] == "eos" else "siglip",
    vocab_size=vocab_size,
    max_length=len(positions),
    width=width,
    depth=len(blocks),
    mlp_dim=len(tower[first]),
    num_heads=given.get("num_heads") or text.get("heads") or max(1, width // _HEAD_WIDTH),
    num_classes=kernel.shape[1],
    causal=not text.get("no_causal_mask"),
    pool_type=_POOLS[pool],
    layer_norm_eps=(text.get("norm_kwargs") or {}).get("eps", 1e-5),
    gelu="quick" if model.get("quick_gelu") else "tanh" if approximate == "tanh" else "exact",
    head_bias=bias,
  )
  if not model:
    fields["gelu"] = given.get("gelu", fields["gelu"])
  notes = []
  if not text:
    notes.append(
      f"No {open_clip_images.CONFIG} is beside {path.name}: the text tower is taken to be CLIP's, with"
      f" {fields['num_heads']} heads (in Python text=dict(num_heads=...)) and gelu={fields['gelu']!r} (--gelu)."
    )
  if fields["pool_type"] == "eos":
    fields["eos_token"] = vocab_size - 1
    notes.append(
      f"The largest token of a text is pooled: it is taken to be the last, {vocab_size - 1}."
    )
  return fields, notes


def _shapes(f: Fields, tower: Arrays) -> shapes.Shapes:
  d, out = f["width"], f["num_classes"]
  expected = {_TOKENS: (f["vocab_size"], d), _POSITIONS: (f["max_length"], d)} | shapes.norm(
    _NORM, d
  )
  parts = shapes.norm("ln_1", d) | shapes.norm("ln_2", d) | shapes.dense("attn.out_proj", d, d)
  parts |= {"attn.in_proj_weight": (3 * d, d), "attn.in_proj_bias": (3 * d,)}
  parts |= shapes.dense("mlp.c_fc", f["mlp_dim"], d) | shapes.dense("mlp.c_proj", d, f["mlp_dim"])
  scales = [_BLOCK["scale1"], _BLOCK["scale2"]]
  if any(name.endswith(tuple(scales)) for name in tower):
    parts |= dict.fromkeys(scales, (d,))
  for i in range(f["depth"]):
    expected |= {f"{_BLOCKS}.{i}.{name}": shape for name, shape in parts.items()}
  if _PROJECTION in tower:
    expected[_PROJECTION] = (d, out)
  elif out:
    expected |= shapes.dense(_PROJECTION, out, d, bias=f["head_bias"])
  return expected


def _convert(f: Fields, tower: Arrays) -> Arrays:
  flat = {
    "embedding/embedding": tower[_TOKENS],
    "pos_embedding": tower[_POSITIONS][None],
    **torch_layout.norm_from_torch(tower, _NORM, "Transformer/encoder_norm"),
  }
  for i in range(f["depth"]):
    theirs = torch_layout.under(f"{_BLOCKS}.{i}.", tower)
    theirs = {name.replace("in_proj_", "in_proj."): a for name, a in theirs.items()}
    block = torch_layout.block_from_torch(theirs, _BLOCK, f["num_heads"])
    flat |= {f"Transformer/encoderblock_{i}/{name}": a for name, a in block.items()}
  if _PROJECTION in tower:
    return flat | {"head/kernel": tower[_PROJECTION]}
  if not f["num_classes"]:
    return flat
  kernel = np.ascontiguousarray(tower[f"{_PROJECTION}.weight"].T)
  bias = {"head/bias": tower[f"{_PROJECTION}.bias"]} if f["head_bias"] else {}
  return flat | {"head/kernel": kernel} | bias
