"""Layers by the names of their parameters: smaller steps for early layers, and which layers do not move at all.

Groups as in BEiT's fine-tuning (arXiv 2106.08254): 0 is the embedding (kernel, positions, class token, registers),
i + 1 is block i, and what follows the blocks (last LayerNorm, pooling, head) is the last one.

A backbone is what has blocks: the whole model ("Transformer/encoderblock_0/..."), or a part of it under a name
("image/Transformer/encoderblock_0/..."), as in models of two towers or with a decoder. What is outside of it, such as a
projection or a loss's temperature, counts to the last group.
"""

import re
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float

from flexivit_jax import errors

ALL_BUT_HEAD = "all_but_head"
Decay = int | float | Sequence[tuple[str, int | float]]  # one number, or (backbone, number) pairs
_EMBEDDING = r"embedding/.*|pos_embedding|cls|registers|pre_norm/.*"
# Backbone, and the block's number; without one, all blocks are one array, layer by layer.
_BLOCK = re.compile(r"(.+/|)Transformer/encoderblock(?:_(\d+))?/.*")
Factor = float | Float[np.ndarray, "..."]


def scales(shapes: Mapping[str, Sequence[int]], decay: Decay) -> dict[str, Factor]:
  """Returns by what the update of each parameter is multiplied: decay ** (last group - its group).

  Args:
    shapes: of the parameters, by name.
    decay: from one layer to the one below, of the model's only backbone; or pairs of a backbone's name and its decay,
      ("image", 0.75); backbones without a pair have none.

  Returns:
    A number for each parameter; of stacked blocks an array [layers, 1, ...].

  Raises:
    UserError: a decay that is none; a model without blocks; a backbone that is not there or is named twice; one number
      for several backbones.
  """
  blocks = _backbones(shapes, "layer_decay")
  factors: dict[str, Factor] = dict.fromkeys(shapes, 1.0)
  for prefix, value in _by_backbone(decay, blocks).items():
    if not 0 < value <= 1:
      raise errors.UserError(f"optim.layer_decay={decay}; expected more than 0, at most 1.")
    for name, shape in shapes.items():
      if name.startswith(prefix):
        inside = name.removeprefix(prefix)
        factors[name] = factors[name] * _scale(inside, shape, value, blocks[prefix] + 1)
  return factors


def _by_backbone(decay: Decay, blocks: Mapping[str, int]) -> dict[str, int | float]:
  """The decay of each backbone, by the prefix of its parameters' names."""
  if isinstance(decay, int | float):
    return {_only(blocks, f"layer_decay={decay}", "pairs, as layer_decay=(('{}', 0.75),)"): decay}
  decays = {f"{name}/" if name else "": value for name, value in decay}
  if len(decays) != len(decay):
    raise errors.UserError(f"optim.layer_decay={decay}: a backbone is named twice; give one pair.")
  for prefix in decays:
    if prefix not in blocks:
      known = [name.removesuffix("/") for name in blocks]
      raise errors.unknown("backbone in optim.layer_decay", prefix.removesuffix("/"), known)
  return decays


def _scale(name: str, shape: Sequence[int], decay: float, last: int) -> Factor:
  """The factor of a parameter, by its name within the backbone."""
  if re.fullmatch(_EMBEDDING, name):
    return decay**last
  block = _BLOCK.fullmatch(name)
  if block is None or block[1]:  # no block, or one of another backbone inside this one
    return 1.0
  if block[2] is None:
    layers = decay ** np.arange(last - 1, 0, -1.0)
    return layers.reshape(-1, *[1] * (len(shape) - 1))
  return decay ** (last - 1 - int(block[2]))


def frozen(
  freeze: int | str | Sequence[str], shapes: Mapping[str, Sequence[int]]
) -> tuple[str, ...]:
  """Returns regular expressions of the whole names of the parameters that do not move.

  Args:
    freeze: n: the embedding and the first n blocks; "all_but_head"; or regular expressions.
    shapes: of the parameters, by name.

  Raises:
    UserError: more blocks than there are, some of those that are stacked, a number for several backbones, another word,
      nothing that moves.
  """
  if isinstance(freeze, str):
    if freeze != ALL_BUT_HEAD:
      raise errors.UserError(
        f"optim.freeze={freeze!r}; expected {ALL_BUT_HEAD!r}, how many blocks (0: the embedding alone), or a list of"
        " regular expressions."
      )
    patterns: tuple[str, ...] = (r"(?!head/).*",)
  elif isinstance(freeze, int):
    patterns = (_embedding_and(freeze, shapes),)
  else:
    patterns = tuple(freeze)
  if all(any(re.fullmatch(p, name) for p in patterns) for name in shapes):
    raise errors.UserError(
      f"optim.freeze={freeze!r} freezes all parameters, so nothing could be learned; freeze fewer."
    )
  return patterns


def _embedding_and(number: int, shapes: Mapping[str, Sequence[int]]) -> str:
  backbones = _backbones(shapes, "freeze")
  prefix = _only(backbones, f"freeze={number}", "regular expressions, as freeze=('{}/.*',)")
  blocks = backbones[prefix]
  if isinstance(number, bool) or not 0 <= number <= blocks:
    raise errors.UserError(
      f"optim.freeze={number}: the model has {blocks} blocks; expected 0 (the embedding alone) to {blocks}."
    )
  embedding = f"{re.escape(prefix)}({_EMBEDDING})"
  if not number:
    return embedding
  encoder = f"{prefix}Transformer/encoderblock"
  if not any(name.startswith(f"{encoder}/") for name in shapes):
    some = "|".join(map(str, range(number)))
    return rf"{embedding}|{re.escape(encoder)}_({some})/.*"
  if number < blocks:
    raise errors.UserError(
      f"optim.freeze={number} with model.scan=True, by which the {blocks} blocks are one array; set model.scan=False."
    )
  return rf"{embedding}|{re.escape(encoder)}/.*"


def _backbones(shapes: Mapping[str, Sequence[int]], what: str) -> dict[str, int]:
  """How many blocks each backbone has, by the prefix of its parameters' names: "" or "image/"."""
  blocks: dict[str, int] = {}
  for name, shape in shapes.items():
    if block := _BLOCK.fullmatch(name):
      number = shape[0] if block[2] is None else int(block[2]) + 1
      blocks[block[1]] = max(blocks.get(block[1], 0), number)
  if not blocks:
    raise errors.UserError(f"optim.{what}: the model has no blocks (Transformer/encoderblock_0).")
  return blocks


def _only(backbones: Mapping[str, int], got: str, instead: str) -> str:
  """The prefix of the only backbone; an error that says what to give instead where there are several."""
  if len(backbones) > 1:
    names = [prefix.removesuffix("/") for prefix in backbones]
    raise errors.UserError(
      f"optim.{got}: the model has {len(names)} backbones ({', '.join(map(repr, names))}); give"
      f" {instead.format(max(names))}."
    )
  return next(iter(backbones))
