"""CLIP, SigLIP and OWL-ViT of `transformers`: the text tower that a folder holds beside the image tower."""

import json
import pathlib

import numpy as np

from flexivit_jax import errors, trees
from flexivit_jax.trees import Arrays, Json
from flexivit_jax.weights import folders, torch_layout, wrappers
from flexivit_jax.weights.big_vision import Fields
from flexivit_jax.weights.timm import folder as timm_folder
from flexivit_jax.weights.tower_names import Text
from flexivit_jax.weights.transformers import (
  config as transformers_config,
  folder as transformers_folder,
  shapes as transformers_shapes,
)
from flexivit_jax.weights.transformers.families import DETECTORS, FAMILIES

TOWER, PROJECTION, SCALE, BIAS = (
  "text_model.", "text_projection", "logit_scale", "logit_bias",
)  # fmt: skip
TOKENS, POSITIONS = "embeddings.token_embedding.weight", "embeddings.position_embedding.weight"
BLOCKS, NORM, HEAD = "encoder.layers", "final_layer_norm", "head"
BLOCK = FAMILIES["clip"].layout.block
TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
_SENTENCEPIECE = "spiece.model"
# Of folders that were written before there was a tokenizer.json: CLIP's byte pairs.
_VOCABULARY, _MERGES = "vocab.json", "merges.txt"
_SPECIAL = ("<|startoftext|>", "<|endoftext|>")
_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
# Before transformers 4.31 CLIP's config had this number; the largest token of a text was pooled, and still is there.
LEGACY_END = 2

# Of the config classes, as in `families`.
_SIZES = dict(num_hidden_layers=12)
DEFAULTS: dict[str, Json] = {
  "clip": _SIZES | dict(
    vocab_size=49408, hidden_size=512, intermediate_size=2048, num_attention_heads=8, max_position_embeddings=77,
    hidden_act="quick_gelu", layer_norm_eps=1e-5, eos_token_id=49407,
  ),
  "siglip": _SIZES | dict(
    vocab_size=32000, hidden_size=768, intermediate_size=3072, num_attention_heads=12, max_position_embeddings=64,
    hidden_act="gelu_pytorch_tanh", layer_norm_eps=1e-6,
  ),
}  # fmt: skip
DEFAULTS |= dict.fromkeys(DETECTORS, DEFAULTS["clip"] | {"max_position_embeddings": 16})
CLASSES = {"clip": "CLIPModel", "siglip": "SiglipModel"}


def read(path: pathlib.Path) -> Text | None:
  """Returns the text tower of a folder, its scalars and its tokenizer; None for a model without them.

  Raises:
    UserError: arrays that are not those of config.json, or a value there that cannot be.
  """
  config = transformers_folder.read_config(path)
  family = config.get("model_type")
  if family not in CLASSES or config.get("architectures") != [CLASSES[family]]:
    return None
  arrays = wrappers.unwrap(transformers_folder.read_arrays(path)).arrays
  return convert(path, config, arrays)


def convert(path: pathlib.Path, config: Json, arrays: Arrays) -> Text:
  """Returns the text tower among the arrays of a model, its scalars, and its tokenizer.

  Args:
    path: the folder.
    config: its config.json.
    arrays: those that are not of the text tower are left out.

  Raises:
    UserError: see `read`.
  """
  family = config["model_type"]
  fields, notes = _fields(config, family)
  ours = (TOWER, PROJECTION, SCALE, BIAS)
  arrays = {name: a for name, a in arrays.items() if name.startswith(ours)}
  transformers_shapes.compare(_shapes(family, fields, arrays), arrays)
  scalars = {"t": arrays[SCALE].reshape(1)}
  scalars |= {"b": arrays[BIAS].reshape(1)} if family == "siglip" else {}
  found, more = tokenizer(path, family, fields)
  params = trees.unflatten(_convert(family, fields, arrays))
  return Text(params, fields, scalars, found, [*notes, *more])


def settings(config: Json, family: str) -> Json:
  """Returns the settings of the text tower in a config.json, all of them."""
  given = config.get("text_config_dict") or config.get("text_config") or {}
  if not isinstance(given, dict):
    raise errors.UserError(f"config.json has text_config={given!r}; expected an object.")
  return {**DEFAULTS[family], **{k: v for k, v in given.items() if v is not None}}


def _fields(config: Json, family: str) -> tuple[Fields, list[str]]:
  text, whole = settings(config, family), transformers_config.whole
  if family == "siglip":
    outputs = whole({"projection_size": text["hidden_size"], **text}, "projection_size")
  else:
    outputs = whole({"projection_dim": 512, **config}, "projection_dim")
  gelu = transformers_config.known("hidden_act", text["hidden_act"], transformers_config.GELU)
  fields: Fields = dict(
    kind="siglip" if family == "siglip" else "clip",
    vocab_size=whole(text, "vocab_size"),
    max_length=whole(text, "max_position_embeddings"),
    width=whole(text, "hidden_size"),
    depth=whole(text, "num_hidden_layers"),
    mlp_dim=whole(text, "intermediate_size"),
    num_heads=whole(text, "num_attention_heads"),
    gelu=transformers_config.GELU[gelu],
    layer_norm_eps=transformers_config.positive(text, "layer_norm_eps"),
    num_classes=outputs,
    pool_type="last" if family == "siglip" else "eos",
  )
  if family == "siglip":
    return fields, []
  if family in DETECTORS:  # the largest token of a text is pooled, whatever config.json has
    return fields | {"eos_token": fields["vocab_size"] - 1}, []
  end = whole(text, "eos_token_id")
  if end != LEGACY_END:
    return fields | {"eos_token": end}, []
  last = fields["vocab_size"] - 1
  note = f"config.json has eos_token_id={LEGACY_END}, by which the largest token is pooled: the last, {last}, is taken."
  return fields | {"eos_token": last}, [note]


def _shapes(family: str, f: Fields, arrays: Arrays) -> transformers_shapes.Shapes:
  """All arrays of the text tower, and the scalars."""
  d = f["width"]
  shapes: transformers_shapes.Shapes = {
    TOKENS: (f["vocab_size"], d),
    POSITIONS: (f["max_length"], d),
  }
  shapes |= transformers_shapes.norm(NORM, d)
  block = transformers_shapes.block(BLOCK, d, f["mlp_dim"])
  if f["depth"] > len(arrays):
    raise errors.UserError(
      f"config.json has {f['depth']} layers of text; there are {len(arrays)} arrays."
    )
  for i in range(f["depth"]):
    shapes |= {f"{BLOCKS}.{i}.{name}": shape for name, shape in block.items()}
  if family == "siglip":
    shapes |= transformers_shapes.dense(HEAD, f["num_classes"], d)
  if TOWER + transformers_shapes.IDS in arrays:
    shapes[transformers_shapes.IDS] = (1, f["max_length"])
  whole = {TOWER + name: shape for name, shape in shapes.items()}
  if family == "siglip":
    return whole | {SCALE: (1,), BIAS: (1,)}
  return (
    whole | transformers_shapes.dense(PROJECTION, f["num_classes"], d, bias=False) | {SCALE: ()}
  )


def _convert(family: str, f: Fields, arrays: Arrays) -> Arrays:
  a = torch_layout.under(TOWER, arrays)
  flat = {
    "embedding/embedding": a[TOKENS],
    "pos_embedding": a[POSITIONS][None],
    **torch_layout.norm_from_torch(a, NORM, "Transformer/encoder_norm"),
  }
  for i in range(f["depth"]):
    theirs = torch_layout.under(f"{BLOCKS}.{i}.", a)
    block = torch_layout.block_from_torch(theirs, BLOCK, f["num_heads"])
    flat |= {f"Transformer/encoderblock_{i}/{name}": array for name, array in block.items()}
  if family == "siglip":
    return flat | torch_layout.dense_from_torch(a, HEAD, "head")
  return flat | {"head/kernel": np.ascontiguousarray(arrays[f"{PROJECTION}.weight"].T)}


def tokenizer(path: pathlib.Path, family: str, f: Fields) -> tuple[Json | None, list[str]]:
  """Returns the record of the tokenizer in a folder, and a note if there is one that cannot be used.

  Args:
    path: the folder.
    family: a key of `DEFAULTS`: CLIP's texts end with `eos_token`, SigLIP's are put into lower case.
    f: fields of the text tower.
  """
  # Here, for it imports OpenCV, which `import flexivit_jax` does without.
  from flexivit_jax.data import text

  file = next((path / n for n in (TOKENIZER, _SENTENCEPIECE) if (path / n).is_file()), None)
  parts = [path / _VOCABULARY, path / _MERGES]
  if file is None and family != "siglip" and all(part.is_file() for part in parts):
    file = parts[0]
  if file is None:
    return None, []
  config = path / TOKENIZER_CONFIG
  stated = timm_folder.read_json(config) if config.is_file() else {}
  if stated.get("padding_side") == "left":
    return None, [
      f"{file.name} is not used: {config.name} puts padding before a text, here it follows."
    ]
  end = _word(stated.get("eos_token")) or "</s>" if family == "siglip" else f["eos_token"]
  pad = _word(stated.get("pad_token")) or end
  options: Json = dict(length=f["max_length"], pad=pad, end=end, lower=family == "siglip")
  record = path / folders.RECORD  # of a folder that we wrote
  options |= (timm_folder.read_json(record).get("text") or {}) if record.is_file() else {}
  try:
    if file.name == _VOCABULARY:
      tokens = text.Tokens(**options | _of_merges(parts[0], parts[1], options["pad"]))
    else:
      tokens = text.load(file, **options)
    if tokens.vocab_size > f["vocab_size"]:
      raise errors.UserError(
        f"it has {tokens.vocab_size} tokens, the text tower {f['vocab_size']}."
      )
  except errors.UserError as e:
    return None, [f"{file.name} is not used: {e}"]
  notes = []
  if str(stated.get("tokenizer_class")).startswith("SiglipTokenizer"):
    notes.append(
      "SigLIP's own tokenizer leaves punctuation out; here it stays, so write texts without it."
    )
  return json.loads(json.dumps(tokens.record())), notes


def _of_merges(vocabulary: pathlib.Path, merges: pathlib.Path, pad: str | int) -> Json:
  """Returns CLIP's tokenizer of an old folder as a tokenizer.json would hold it, and the number of its padding.

  Raises:
    UserError: files that are broken, or without the special tokens.
  """
  vocab = timm_folder.read_json(vocabulary)
  if lacking := [word for word in (*_SPECIAL, pad) if isinstance(word, str) and word not in vocab]:
    raise errors.UserError(f"{vocabulary.name} has no token {lacking[0]!r}.")
  lines = merges.read_text(encoding="utf-8").splitlines()
  pairs = [line.split(" ") for line in lines if line.strip() and not line.startswith("#version")]
  if any(len(pair) != 2 for pair in pairs):
    raise errors.UserError(f"{merges.name}: expected two parts of a token on each line.")
  special = [
    dict(id=vocab[word], content=word, special=True, single_word=False, lstrip=False, rstrip=False,
         normalized=True)
    for word in _SPECIAL
  ]  # fmt: skip
  start, end = ([word, vocab[word]] for word in _SPECIAL)
  spaces = dict(type="Replace", pattern={"Regex": r"\s+"}, content=" ")
  words = dict(type="Split", pattern={"Regex": _WORDS}, behavior="Removed", invert=True)
  content = dict(
    version="1.0", truncation=None, padding=None, added_tokens=special, decoder=None,
    normalizer=dict(type="Sequence", normalizers=[dict(type="NFC"), spaces, dict(type="Lowercase")]),
    pre_tokenizer=dict(
      type="Sequence",
      pretokenizers=[words, dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=True)],
    ),
    post_processor=dict(
      type="RobertaProcessing", sep=end, cls=start, trim_offsets=False, add_prefix_space=False
    ),
    model=dict(
      type="BPE", dropout=None, unk_token=_SPECIAL[1], continuing_subword_prefix="", end_of_word_suffix="</w>",
      fuse_unk=False, vocab=vocab, merges=pairs,
    ),
  )  # fmt: skip
  return {"tokenizer": json.dumps(content), "pad": vocab[pad] if isinstance(pad, str) else pad}


def _word(token: object) -> str | None:
  """A special token, which may be an object with more about it."""
  token = token.get("content") if isinstance(token, dict) else token
  return token if isinstance(token, str) else None
