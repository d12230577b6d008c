"""What training tools put around weights, taken off: prefixes of names, levels of dicts, heads of pre-training.

Nothing here knows the tools. A Vision Transformer is found by its patch embedding, wherever it stands among the names:
what is before is a wrapper. Where there are several of them, a rule chooses one, and a note says so.
"""

import collections
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from flexivit_jax import errors

# The array by which each layout is recognised: timm's, big_vision's and the original ViT's, OpenCLIP's, torchvision's,
# and those of transformers.
ANCHORS = (
  "patch_embed.proj.weight",
  "embedding/kernel",
  "class_embedding",
  "conv_proj.weight",
  "embeddings.patch_embeddings.projection.weight",
  "embeddings.patch_embedding.weight",
)
# How names of transformers begin in a model with a head, whose own names do not begin so.
_BASE = re.compile(
  r"(?<![^.])(vit|deit|dinov2|dinov2_with_registers|((owlvit|owlv2)\.)?vision_model)\.$"
)
# Words that tools put around a module inside a network, e.g. around each block.
_INNER = re.compile(
  r"(?:(?<=\.)|^)(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
_OPEN_CLIP = ("class_embedding", "conv1.weight")

_EMA = re.compile(
  r"(^|[._/])(\w*_)?(ema|shadow|swa|averag(e|ed|ing))(_\w*)?([._/]|$)", re.IGNORECASE
)
# Of two networks that learn from each other, the one that is used afterwards comes first.
_ROLES = (
  r"teacher|target_encoder|base_encoder|encoder_q|online",
  r"",
  r"student|context_encoder|momentum|encoder_k|target",
)
# Arrays that only pre-training uses, by the beginning of their names in the network.
_TRAINING_ONLY = {
  "mask_token": "the token in the place of masked patches",
  "masked_embed": "the token in the place of masked patches",
  "decoder": "a decoder",
  "dino_head.": "DINO's head",
  "ibot_head.": "iBOT's head",
  "dino_loss.": "DINO's loss",
  "ibot_patch_loss.": "iBOT's loss",
  "head.last_layer.": "DINO's head",
  "projector.": "a projector",
  "projection_head.": "a projector",
  "proj_head.": "a projector",
  "predictor.": "a predictor",
  "prototypes.": "prototypes",
  "queue": "a queue of other examples' features",
  "contrastive_head.": "a contrastive head",
  "rel_pos_bias.relative_position_index": "an index",
}


_ANCHOR_INSIDE = re.compile(
  rf"patch_embed\.(?:{_INNER.pattern})*proj\.(?:{_INNER.pattern})*weight$"
)


Named = dict[
  str, Any
]  # arrays by name; of their values only the shapes of patch embeddings are read


class Unwrapped(NamedTuple):
  """Arrays by their bare names, and notes for the user."""

  arrays: Named
  notes: list[str]


def unwrap(arrays: Named, *, ema: bool = False) -> Unwrapped:
  """Takes wrappers off the names of arrays; nothing of the arrays is read.

  Args:
    arrays: by name; the levels of nested dicts are joined by dots.
    ema: take the exponential moving average (EMA) of the weights where both are there.

  Returns:
    Where no Vision Transformer is found among the names, the arrays without what `strip_common` takes off.

  Raises:
    UserError: several networks between which no rule decides; no EMA although it is asked for.
  """
  prefixes = _prefixes(arrays)
  if not prefixes and not ema:
    return strip_common(arrays)
  prefix, notes = _choose(arrays, prefixes, ema)
  inside = _own(arrays, prefix, prefixes)
  outside = [name for name in arrays if name not in inside]
  bare = {name.removeprefix(prefix): array for name, array in arrays.items() if name in inside}
  if prefix not in ("", "params/"):
    notes = [f"{prefix!r} is taken off the names of the arrays.", *notes]
  if outside:
    notes.append(f"Left out: {groups(outside, prefix)}.")
  bare, inner = _without_inner(bare)
  network, more = _without_training_only(bare)
  flat, renumbered = _renumbered(network)
  return Unwrapped(flat, notes + inner + more + renumbered)


_COMMON = ("module", "_orig_mod", "state_dict", "model_state_dict", "model", "net")


def strip_common(arrays: Named) -> Unwrapped:
  """Takes off wrappers that all names share, of a layout whose own names have a first part: that of transformers."""
  stripped, taken = dict(arrays), []
  while stripped:
    first = {name.partition(".")[0] for name in stripped}
    if len(first) != 1 or (word := first.pop()) not in _COMMON:
      break
    taken.append(word)
    stripped = {name.removeprefix(f"{word}."): array for name, array in stripped.items()}
  prefix = ".".join([*taken, ""])
  return Unwrapped(stripped, [f"{prefix!r} is taken off the names of the arrays."] if taken else [])


def without_other_base(arrays: Named, base: str) -> Unwrapped:
  """Takes off a word that all names share and that is the base of another model of transformers, not of this one."""
  firsts = {name.partition(".")[0] + "." for name in arrays}
  if len(firsts) == 1 and (first := firsts.pop()) != base and _BASE.fullmatch(first):
    bare = {name.removeprefix(first): array for name, array in arrays.items()}
    return Unwrapped(bare, [f"{first!r} is taken off the names of the arrays."])
  return Unwrapped(dict(arrays), [])


def groups(names: Sequence[str], prefix: str = "") -> str:
  """Names by their first part that is not in a prefix, each with the number of arrays below it."""
  counts = collections.Counter(_first_beside(name, prefix) for name in names)
  shown = [part if part[-1] not in "./" else f"{part}* ({n})" for part, n in counts.items()]
  more = f" and {len(shown) - 8} more" if len(shown) > 8 else ""
  return ", ".join(shown[:8]) + more


def _first_beside(name: str, prefix: str) -> str:
  parts, others = (re.split(r"(?<=[./])", text) for text in (name, prefix))
  same = next((k for k, (a, b) in enumerate(zip(parts, others, strict=False)) if a != b), 0)
  return "".join(parts[: same + 1])


def _prefixes(arrays: Named) -> list[str]:
  """What stands before each Vision Transformer's names, e.g. "state_dict.module."."""
  prefixes = {}
  for full in arrays:
    name = _ANCHOR_INSIDE.sub(ANCHORS[0], full)
    for anchor in ANCHORS:
      prefix = name[: len(name) - len(anchor)]
      if not name.endswith(anchor) or (prefix and prefix[-1] not in "./"):
        continue
      if anchor in _OPEN_CLIP and any(f"{prefix}{other}" not in arrays for other in _OPEN_CLIP):
        continue
      prefixes[_BASE.sub("", prefix) if anchor.startswith("embeddings.") else prefix] = True
  return list(prefixes)


def _without_inner(arrays: Named) -> Unwrapped:
  """Takes off what tools put around modules inside the network; names that would become the same stay."""
  new = {name: _INNER.sub("", name) for name in arrays}
  words = sorted({word for name in arrays for word in _INNER.findall(name)})
  if not words or len({*new.values()}) < len(new):
    return Unwrapped(dict(arrays), [])
  note = f"{', '.join(map(repr, words))} is taken out of the names of the arrays."
  return Unwrapped({new[name]: array for name, array in arrays.items()}, [note])


def _choose(arrays: Named, prefixes: Sequence[str], ema: bool) -> tuple[str, list[str]]:
  averaged = [p for p in prefixes if _EMA.search(p)]
  if ema and not averaged:
    shown = ", ".join(repr(p) for p in prefixes) or "none"
    raise errors.UserError(
      f"No EMA of the weights is in the file (networks below: {shown}); leave --ema out."
    )
  raw = [p for p in prefixes if p not in averaged]
  candidates, notes = (averaged if ema or not raw else raw), []
  if raw and averaged:
    taken, other = ("EMA", "raw weights") if ema else ("raw weights", "EMA")
    how = "leave --ema out" if ema else "--ema (in Python ema=True)"
    notes.append(
      f"The file has raw weights and their EMA; the {taken} are taken, {how} for the {other}."
    )
  for role in _ROLES:
    chosen = [p for p in candidates if (re.search(role, p) if role else _role(p) is None)]
    if chosen:
      others = [p for p in candidates if p not in chosen]
      sizes = {_size(arrays, _own(arrays, p, prefixes), p) for p in (chosen[0], *others)}
      if len(sizes) > 1:
        break  # no two copies of a network that learn from each other, but a distillation
      if others:
        notes.append(
          f"The file has {' and '.join(map(repr, candidates))}; {chosen[0]!r} is taken, which is the one that is used"
          " after training."
        )
      candidates = chosen
      break
  if len(candidates) > 1:
    raise errors.UserError(
      f"The file holds several Vision Transformers, below {' and below '.join(map(repr, candidates))}; save the one"
      " that you mean in a file of its own."
    )
  return candidates[0], notes


def _own(arrays: Named, prefix: str, prefixes: Sequence[str]) -> set[str]:
  """The names of one network. Another may stand inside it, such as an EMA that is a module of the model."""
  inside = tuple(p for p in prefixes if p != prefix and p.startswith(prefix))
  return {name for name in arrays if name.startswith(prefix) and not name.startswith(inside)}


def _size(arrays: Named, names: Iterable[str], prefix: str) -> tuple[object, int]:
  """The shape of a network's patch embedding, and the number of its blocks."""
  anchor = next(n for n in sorted(names) if _ANCHOR_INSIDE.sub(ANCHORS[0], n).endswith(ANCHORS))
  shape = getattr(arrays[anchor], "shape", None)
  blocks = {m[0] for name in names if (m := _BLOCK.search(name.removeprefix(prefix)))}
  return shape, len(blocks)


def _role(prefix: str) -> str | None:
  return next((role for role in _ROLES if role and re.search(role, prefix)), None)


def _without_training_only(arrays: Named) -> Unwrapped:
  """Leaves out what only pre-training uses, with a note for each kind."""
  network, left = {}, collections.defaultdict(list)
  for name, array in arrays.items():
    part = next((p for p in _TRAINING_ONLY if name.startswith(p)), None)
    if re.match(r"head\.mlp\.(\d|weight|bias)", name):  # SigLIP's pooling has head.mlp.fc1
      left["for only pre-training uses it: DINO's head"].append(name)
    elif part is not None:
      left[f"for only pre-training uses it: {_TRAINING_ONLY[part]}"].append(name)
    elif re.match(r"head\.\d", name):
      left["for a FlexiViT has one layer there: a head of several layers"].append(name)
    else:
      network[name] = array
  notes = [
    f"Left out, {what} ({names[0]}{', ...' * (len(names) > 1)})." for what, names in left.items()
  ]
  return Unwrapped(network, notes)


_BLOCK = re.compile(r"^.*?(blocks|layers?|encoder_layer_|encoderblock_)[._]?\d+(\.\d+)?(?=[./])")
_CHUNKED = re.compile(r"blocks\.(\d+)\.(\d+)\.(.*)")


def _renumbered(arrays: Named) -> Unwrapped:
  """DINOv2's training keeps blocks in chunks, blocks.0.5.* is the sixth; others' names stay."""
  blocks = [name for name in arrays if name.startswith("blocks.")]
  chunked = {name: match for name in blocks if (match := _CHUNKED.fullmatch(name))}
  if not blocks or len(chunked) != len(blocks):
    return Unwrapped(dict(arrays), [])
  new = {name: f"blocks.{match[2]}.{match[3]}" for name, match in chunked.items()}
  if len({*new.values()}) != len(new):  # each chunk counts from 0: not DINOv2's
    return Unwrapped(dict(arrays), [])
  flat = {new.get(name, name): array for name, array in arrays.items()}
  return Unwrapped(
    flat, ["Blocks in chunks (blocks.CHUNK.BLOCK, as DINOv2 trains) are numbered on."]
  )
