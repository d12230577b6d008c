"""BERT in the names of transformers, turned into a `TextTower` of kind "bert".

Only what embeds texts is taken: the pooler and the heads of pre-training are left out. All texts are the first sentence
of BERT's pair, so that row 0 of the token types is added to the positions.
"""

import re
from collections.abc import Collection, Mapping
from typing import NamedTuple

import numpy as np

from flexivit_jax import errors, trees
from flexivit_jax.trees import Arrays, Json, Params
from flexivit_jax.weights import big_vision, torch_layout, wrappers
from flexivit_jax.weights.big_vision import Fields

_WORDS = "embeddings.word_embeddings.weight"
_POSITIONS, _TYPES = (
  "embeddings.position_embeddings.weight",
  "embeddings.token_type_embeddings.weight",
)
_NORM = "embeddings.LayerNorm"
_BLOCK = {
  "query": "attention.self.query",
  "key": "attention.self.key",
  "value": "attention.self.value",
  "out": "attention.output.dense",
  "norm1": "attention.output.LayerNorm",
  "fc1": "intermediate.dense",
  "fc2": "output.dense",
  "norm2": "output.LayerNorm",
}
_NUMBER = re.compile(r"^encoder\.layer\.(\d+)\.")
_CONSTANT = ("embeddings.position_ids", "embeddings.token_type_ids")  # numbers that count up, zeros
_LEFT_OUT = ("pooler.", "cls.")
# What transformers calls the three forms of GELU.
_GELU = {
  "gelu": "exact", "gelu_python": "exact", "gelu_new": "tanh", "gelu_fast": "tanh", "gelu_pytorch_tanh": "tanh",
  "quick_gelu": "quick",
}  # fmt: skip


class Bert(NamedTuple):
  """Parameters of a `TextTower` in our names, the fields that arrays and config.json tell, and notes for the user."""

  params: Params
  fields: Fields
  notes: list[str]


def is_bert(names: Collection[str]) -> bool:
  """Tells whether arrays have BERT's names."""
  return any(_ends(name, _WORDS) for name in names)


def convert(arrays: Arrays, config: Json, num_heads: int | None = None) -> Bert:
  """Turns a state dict of transformers' BERT into ours.

  Args:
    arrays: by name.
    config: what config.json says; {} where there is none.
    num_heads: where config.json does not say it.

  Raises:
    UserError: another model, an unknown number of heads, arrays that are missing or left over.
  """
  fields = _stated(config)
  inside, notes = _inside(arrays)
  first = f"encoder.layer.0.{_BLOCK['fc1']}.weight"
  told = {_WORDS: 2, _POSITIONS: 2, _TYPES: 2, first: 2}
  big_vision.require(inside, told, "BERT in transformers'")
  (vocab_size, width), length = inside[_WORDS].shape, len(inside[_POSITIONS])
  heads = _heads(fields.get("num_heads"), num_heads, width)
  blocks = 1 + max(int(m[1]) for name in inside if (m := _NUMBER.match(name)))
  _check_names(inside, blocks)
  positions = inside[_POSITIONS] + inside[_TYPES][:1]
  flat = {"embedding/embedding": inside[_WORDS], "pos_embedding": positions[None]}
  flat |= torch_layout.norm_from_torch(inside, _NORM, "pre_norm")
  for i in range(blocks):
    block = torch_layout.under(f"encoder.layer.{i}.", inside)
    ours = torch_layout.block_from_torch(block, _BLOCK, heads)
    flat |= {f"Transformer/encoderblock_{i}/{name}": array for name, array in ours.items()}
  fields |= dict(
    kind="bert",
    vocab_size=vocab_size,
    max_length=length,
    width=width,
    depth=blocks,
    mlp_dim=len(inside[first]),
    num_heads=heads,
  )
  return Bert(
    trees.unflatten({n: np.asarray(a, np.float32) for n, a in flat.items()}), fields, notes
  )


def pool_type(pooling: Json) -> str | None:
  """Returns how tokens are pooled by 1_Pooling/config.json of sentence-transformers; None: as we cannot."""
  known = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "first",
    "pooling_mode_max_tokens": "max",
  }
  modes = [mode for mode, on in pooling.items() if mode.startswith("pooling_mode_") and on is True]
  return known.get(modes[0]) if len(modes) == 1 else None


def _check_names(arrays: Arrays, blocks: int) -> None:
  """Raises a UserError that lists the arrays that are missing, and those that are no part of a BERT."""
  layers = [f"encoder.layer.{i}.{name}" for i in range(blocks) for name in _BLOCK.values()]
  ends = [f"{name}.{end}" for name in (_NORM, *layers) for end in ("weight", "bias")]
  expected = {_WORDS, _POSITIONS, _TYPES, *ends}
  lines = [f"missing {name}" for name in sorted(expected - arrays.keys())]
  lines += [f"no part of a BERT that we know: {name}" for name in sorted(arrays.keys() - expected)]
  if lines:
    raise errors.UserError("The arrays are not those of a BERT:\n  " + "\n  ".join(lines[:40]))


def _stated(config: Json) -> Fields:
  """The fields that config.json tells."""
  kind = config.get("model_type", "bert")
  positions = config.get("position_embedding_type") or "absolute"
  gelu = config.get("hidden_act", "gelu")
  if kind != "bert" or positions != "absolute" or gelu not in _GELU:
    raise errors.UserError(
      f"config.json says model_type={kind!r}, position_embedding_type={positions!r}, hidden_act={gelu!r}; expected"
      f" 'bert', 'absolute' and one of {', '.join(_GELU)}."
    )
  names = {
    "num_attention_heads": "num_heads",
    "layer_norm_eps": "layer_norm_eps",
    "pad_token_id": "pad_token",
  }
  stated = {
    ours: config[theirs] for theirs, ours in names.items() if config.get(theirs) is not None
  }
  return stated | {"gelu": _GELU[gelu]}


def _inside(arrays: Arrays) -> tuple[Arrays, list[str]]:
  """The arrays below the one BERT of a file, with the names of today; and a note on what is left out."""
  prefixes = [name.removesuffix(_WORDS) for name in arrays if _ends(name, _WORDS)]
  if len(prefixes) != 1:
    raise errors.UserError(f"The file holds {len(prefixes)} BERTs, below {prefixes}; expected one.")
  prefix = prefixes[0]
  inside = {_today(n.removeprefix(prefix)): a for n, a in arrays.items() if n.startswith(prefix)}
  left = [name for name in inside if name.startswith(_LEFT_OUT)]
  outside = [name for name in arrays if not name.startswith(prefix)]
  gone = {*left, *_CONSTANT}
  notes = [f"Left out: {wrappers.groups([*left, *outside])}."] if [*left, *outside] else []
  return {name: array for name, array in inside.items() if name not in gone}, notes


def _today(name: str) -> str:
  """The first BERTs call weight and bias of a LayerNorm gamma and beta."""
  return re.sub(r"LayerNorm\.(gamma|beta)$", lambda m: f"LayerNorm.{_OLD[m[1]]}", name)


_OLD: Mapping[str, str] = {"gamma": "weight", "beta": "bias"}


def _heads(stated: int | None, given: int | None, width: int) -> int:
  heads = stated or given
  if heads is None or (given is not None and given != heads):
    raise errors.UserError(
      f"Got num_heads={given}, config.json says {stated or 'nothing'}; expected the number of attention heads, which"
      " arrays do not tell."
    )
  if width % heads:
    raise errors.UserError(f"num_heads={heads} does not divide the width, {width}.")
  return heads


def _ends(name: str, anchor: str) -> bool:
  return name == anchor or name.endswith(f".{anchor}")
