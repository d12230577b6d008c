"""Which arrays a config.json of Hugging Face's `transformers` promises: names and shapes, all of them."""

from collections.abc import Iterable, Mapping

import jax
import numpy as np

from flexivit_jax import errors, trees
from flexivit_jax.trees import Arrays
from flexivit_jax.weights.transformers.config import Spec
from flexivit_jax.weights.transformers.families import PROJECTION

Shapes = dict[str, tuple[int, ...]]

REGISTERS = "embeddings.register_tokens"
POOLER, MASK, IDS = "pooler.dense", "embeddings.mask_token", "embeddings.position_ids"
MAP = "head"  # SigLIP's attention pooling


def check(s: Spec, arrays: Arrays, prefix: str) -> None:
  """Compares arrays with those that config.json promises; `prefix` is how the tower's names begin.

  Raises:
    UserError: names, shapes or types that differ, all listed.
  """
  if s.fields["depth"] > len(arrays):
    raise errors.UserError(
      f"config.json has num_hidden_layers={s.fields['depth']}; there are {len(arrays)} arrays in all."
    )
  tower = _tower(s) | _unused(s, [name.removeprefix(prefix) for name in arrays])
  expected = {prefix + name: shape for name, shape in tower.items()} | _head(s)
  compare(expected, arrays)
  ids = arrays.get(prefix + IDS)
  if ids is not None and (ids[0] != np.arange(ids.size)).any():
    raise errors.UserError(f"{prefix}{IDS}: expected 0, 1, 2, ..., got another order.")


def compare(expected: Shapes, arrays: Arrays) -> None:
  """Raises a UserError that lists all differences between arrays and what config.json promises."""
  kind = lambda name: np.int64 if name.endswith(IDS) else np.float32  # noqa: E731
  specs = {name: jax.ShapeDtypeStruct(shape, kind(name)) for name, shape in expected.items()}
  lines = trees.diff(specs, dict(arrays), max_lines=10**6)
  if lines:
    raise errors.UserError("The arrays are not those of config.json:\n  " + "\n  ".join(lines))


def dense(name: str, out: int, in_: int, *, bias: bool = True) -> Shapes:
  """Of a linear layer."""
  return {f"{name}.weight": (out, in_)} | ({f"{name}.bias": (out,)} if bias else {})


def norm(name: str, width: int) -> Shapes:
  """Of a LayerNorm."""
  return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _tower(s: Spec) -> Shapes:
  """All arrays before the head."""
  f, names = s.fields, s.family.layout
  d = f["width"]
  parts = block(names.block, d, f["mlp_dim"], qkv_bias=s.qkv_bias)
  shapes: Shapes = {f"{names.patch}.weight": (d, s.channels, *f["patch_size"])}
  shapes[names.position] = (*names.lead, _length(s), d)
  shapes |= {name: (*names.lead, *names.lead, d) for name in names.tokens}
  if f["registers"] and len(names.tokens) == 1:  # DeiT's is a token with a position
    shapes[REGISTERS] = (1, f["registers"], d)
  # CLIP has a LayerNorm in place of the bias.
  shapes |= norm(names.pre_norm, d) if names.pre_norm else {f"{names.patch}.bias": (d,)}
  for i in range(f["depth"]):
    shapes |= {f"{names.blocks}.{i}.{name}": shape for name, shape in parts.items()}
  shapes |= norm(names.norm, d)
  return shapes | (_map(d, f["mlp_dim"]) if f["pool_type"] == "map" else {})


def _length(s: Spec) -> int:
  """Tokens with a position."""
  return len(s.family.layout.tokens) + int(np.prod(s.fields["posemb_size"]))


def block(names: Mapping[str, str], d: int, mlp: int, *, qkv_bias: bool = True) -> Shapes:
  """Of a block, without the prefix that all its names share; `names` are those of `Layout.block`."""
  shapes = norm(names["norm1"], d) | norm(names["norm2"], d)
  for part in ("query", "key", "value"):
    shapes |= dense(names[part], d, d, bias=qkv_bias)
  shapes |= dense(names["out"], d, d)
  shapes |= dense(names["fc1"], mlp, d) | dense(names["fc2"], d, mlp)
  return shapes | {names[part]: (d,) for part in ("scale1", "scale2") if part in names}


def _map(d: int, mlp: int) -> Shapes:
  return {
    f"{MAP}.probe": (1, 1, d),
    f"{MAP}.attention.in_proj_weight": (3 * d, d),
    f"{MAP}.attention.in_proj_bias": (3 * d,),
    **dense(f"{MAP}.attention.out_proj", d, d),
    **norm(f"{MAP}.layernorm", d),
    **dense(f"{MAP}.mlp.fc1", mlp, d),
    **dense(f"{MAP}.mlp.fc2", d, mlp),
  }


def _head(s: Spec) -> Shapes:
  """The dense layers at the end: one on all that the pooling concatenates, or one for each token of it."""
  classes, layers = s.fields["num_classes"], s.head.dense
  tokens = 1 + s.head.pool_type.count("+")
  shapes: Shapes = {}
  for name in layers if classes else ():
    inputs = s.fields["width"] * tokens // len(layers)
    shapes |= dense(name, classes, inputs, bias=layers != PROJECTION)
  return shapes


def _unused(s: Spec, got: Iterable[str]) -> Shapes:
  """Arrays that may be there and are no part of a FlexiViT; of a group, all or none."""
  d, names = s.fields["width"], s.family.layout
  dino, clip = "scale1" in names.block, not names.lead
  groups: dict[str, Shapes] = {}
  if clip:
    groups[IDS] = {IDS: (1, _length(s))}
  else:
    groups[MASK] = {MASK: (1, d) if dino else (1, 1, d)}
  if not (clip or dino or s.head.dense):
    groups[POOLER] = dense(POOLER, s.pooler, d)
  if clip and s.fields["pool_type"] == "gap":
    groups[MAP] = _map(d, s.fields["mlp_dim"])
  there = [group for group in groups if any(name.startswith(group) for name in got)]
  return {name: shape for group in there for name, shape in groups[group].items()}
