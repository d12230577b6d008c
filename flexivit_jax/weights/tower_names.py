"""Two towers in big_vision's names: `img/...`, `txt/...`, `t` and `b`; and what text tower arrays belong to.

Source of the names: google-research/big_vision, models/proj/image_text/two_towers.py and text_transformer.py.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from flexivit_jax import errors, trees
from flexivit_jax.models import text as text_model, vit
from flexivit_jax.trees import Arrays, Json, Params
from flexivit_jax.weights import big_vision
from flexivit_jax.weights.big_vision import Fields

IMAGE, TEXT = "img/", "txt/"
SCALARS = ("t", "b")  # log of the scale of the products, and what is added to them
_EXTRA_POSITION = "Encoder_0/pos_embedding"
_OURS = {
  "Embed_0": "embedding",
  "Encoder_0": "Transformer",
}  # of the text tower; other names are the same
_THEIRS = {ours: theirs for theirs, ours in _OURS.items()}


class Text(NamedTuple):
  """What a file holds beside its image tower.

  Attributes:
    params: of the text tower, by our names.
    fields: those of the `TextTower` that the arrays and the files beside them tell.
    scalars: "t", log of the scale, [1]; "b", the bias, [1], where there is one.
    tokenizer: entry "text" of the record, see `data.text.Tokens`; None where no file has it.
    notes: what a user should know.
  """

  params: Params
  fields: Fields
  scalars: Arrays
  tokenizer: Json | None = None
  notes: Sequence[str] = ()


def to_big_vision(params: Params) -> Params:
  """Returns the arrays of two towers by big_vision's names, blocks one by one."""
  flat = {f"{IMAGE}{n}": a for n, a in trees.flatten(vit.unstack_blocks(params["image"])).items()}
  flat |= {f"{TEXT}{_renamed(n, _THEIRS)}": a for n, a in trees.flatten(params["text"]).items()}
  return flat | {name: params[name] for name in SCALARS if name in params}


def of_big_vision(arrays: Arrays) -> Params:
  """Returns the parameters of two towers for arrays by big_vision's names ("params/img/..." or "img/...").

  Raises:
    UserError: there is no text tower, or no image tower.
  """
  flat = big_vision.plain(arrays)
  towers = {"image": _under(IMAGE, flat), "text": _under(TEXT, flat)}
  if lacking := [name for name, tower in towers.items() if not tower]:
    raise errors.UserError(f"There are no arrays of the {lacking[0]} tower.")
  text = {_renamed(name, _OURS): array for name, array in towers["text"].items()}
  # Some early files have positions in the encoder, too; they are added.
  extra = towers["text"].get(_EXTRA_POSITION)
  if extra is not None:
    del text[_renamed(_EXTRA_POSITION, _OURS)]
    text["pos_embedding"] = text["pos_embedding"] + extra
  both = {name: trees.unflatten(tower) for name, tower in (towers | {"text": text}).items()}
  if "Transformer" in both["text"]:
    both["text"] = vit.unstack_blocks(both["text"])
  return both | {name: np.reshape(flat[name], (1,)) for name in SCALARS if name in flat}


def has_text(names: Iterable[str]) -> bool:
  """Tells whether names, of an .npz, are those of two towers."""
  return any(name.removeprefix("params/").startswith(TEXT) for name in names)


def text_fields(params: Params) -> Fields:
  """Returns the fields of big_vision's text tower that parameters in our names belong to.

  Raises:
    UserError: another kind of text tower.
  """
  flat = trees.flatten(params)
  if pool := next((name for name in flat if name.startswith("MAPHead_0/")), None):
    raise errors.UserError(
      f"The text tower pools by attention ({pool}), which our text towers do not have; they pool one of"
      f" {', '.join(text_model.POOLS)}."
    )
  block = "Transformer/encoderblock_0"
  query = f"{block}/MultiHeadDotProductAttention_0/query/kernel"
  dense = f"{block}/MlpBlock_0/Dense_0/kernel"
  names = {"embedding/embedding": 2, "pos_embedding": 3, query: 3, dense: 2}
  big_vision.require(flat, names, "a text tower (text_transformer) in big_vision's")
  vocab_size, width = flat["embedding/embedding"].shape
  return dict(
    kind="big_vision",
    vocab_size=vocab_size,
    max_length=flat["pos_embedding"].shape[1],
    width=width,
    depth=len({name.split("/")[1] for name in flat if name.startswith(f"{block[:-1]}")}),
    mlp_dim=flat[dense].shape[1],
    num_heads=flat[query].shape[1],
    pool_type="last",
    num_classes=flat["head/kernel"].shape[1] if "head/kernel" in flat else 0,
  )


def _renamed(name: str, names: dict[str, str]) -> str:
  first, slash, rest = name.partition("/")
  return names.get(first, first) + slash + rest


def _under(prefix: str, flat: Arrays) -> Arrays:
  return {n.removeprefix(prefix): array for n, array in flat.items() if n.startswith(prefix)}
