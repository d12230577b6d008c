"""Layers by the names of their parameters: smaller steps for early layers, and which layers do not move at all.

Groups as in BEiT's fine-tuning (arXiv 2106.08254): 0 is the embedding (kernel, positions, class token, registers),
i + 1 is block i, and what follows the blocks (last LayerNorm, pooling, head) is the last one.
"""

import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from jaxtyping import Float

from flexivit_jax import errors

ALL_BUT_HEAD = "all_but_head"
_EMBEDDING = r"embedding/.*|pos_embedding|cls|registers|pre_norm/.*"
_BLOCK = re.compile(r"Transformer/encoderblock_(\d+)/.*")
_STACKED = "Transformer/encoderblock/"  # all blocks in one array, layer by layer


def scales(
  shapes: Mapping[str, Sequence[int]], decay: float
) -> dict[str, float | Float[np.ndarray, "..."]]:
  """Returns by what the update of each parameter is multiplied: decay ** (last group - its group).

  Args:
    shapes: of the parameters, by name.
    decay: from one layer to the one below.

  Returns:
    A number for each parameter; of stacked blocks an array [layers, 1, ...].

  Raises:
    UserError: a decay that is none; a model without blocks.
  """
  if not 0 < decay <= 1:
    raise errors.UserError(f"optim.layer_decay={decay}; expected more than 0, at most 1.")
  last = _blocks(shapes, "layer_decay") + 1
  return {name: _scale(name, shape, decay, last) for name, shape in shapes.items()}


def _scale(
  name: str, shape: Sequence[int], decay: float, last: int
) -> float | Float[np.ndarray, "..."]:
  if name.startswith(_STACKED):
    layers = decay ** np.arange(last - 1, 0, -1.0)
    return layers.reshape(-1, *[1] * (len(shape) - 1))
  if re.fullmatch(_EMBEDDING, name):
    return decay**last
  block = _BLOCK.fullmatch(name)
  return 1.0 if block is None else decay ** (last - 1 - int(block[1]))


def frozen(
  freeze: int | str | Sequence[str], shapes: Mapping[str, Sequence[int]]
) -> tuple[str, ...]:
  """Returns regular expressions of the whole names of the parameters that do not move.

  Args:
    freeze: n: the embedding and the first n blocks; "all_but_head"; or regular expressions.
    shapes: of the parameters, by name.

  Raises:
    UserError: more blocks than there are, some of those that are stacked, another word, nothing that moves.
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
  blocks = _blocks(shapes, "freeze")
  if isinstance(number, bool) or not 0 <= number <= blocks:
    raise errors.UserError(
      f"optim.freeze={number}: the model has {blocks} blocks; expected 0 (the embedding alone) to {blocks}."
    )
  if not number:
    return _EMBEDDING
  if not _stacked(shapes):
    return rf"{_EMBEDDING}|Transformer/encoderblock_({'|'.join(map(str, range(number)))})/.*"
  if number < blocks:
    raise errors.UserError(
      f"optim.freeze={number} with model.scan=True, by which the {blocks} blocks are one array; set model.scan=False."
    )
  return rf"{_EMBEDDING}|{_STACKED}.*"


def _stacked(names: Iterable[str]) -> bool:
  return any(name.startswith(_STACKED) for name in names)


def _blocks(shapes: Mapping[str, Sequence[int]], what: str) -> int:
  """How many blocks there are."""
  if _stacked(shapes):
    return next(shape[0] for name, shape in shapes.items() if name.startswith(_STACKED))
  blocks = {int(m[1]) for m in map(_BLOCK.fullmatch, shapes) if m}
  if not blocks:
    raise errors.UserError(f"optim.{what}: the model has no blocks (Transformer/encoderblock_0).")
  return len(blocks)
