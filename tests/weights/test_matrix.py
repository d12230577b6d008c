"""Every fault in every format that is read: an error that names the array, or a conversion that is declared here."""

import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from flexivit_jax import trees, weights
from flexivit_jax.errors import UserError
from flexivit_jax.models import FlexiViT, vit
from flexivit_jax.running import checkpoint
from flexivit_jax.weights import big_vision, npz
from flexivit_jax.weights.timm import writer as timm_writer

FIELDS = dict(
  num_classes=5, patch_size=(8, 8), posemb_size=(3, 3), width=16, depth=2, mlp_dim=24, num_heads=4
)
RECORD = {"model": FIELDS}
BLOCK = "Transformer/encoderblock_1"


class Names(NamedTuple):
  """What the arrays are called that a fault is made in."""

  dense: str
  bias: str
  head: str
  position: str
  kernel: str


OURS = Names(
  f"{BLOCK}/MlpBlock_0/Dense_0/kernel",
  f"{BLOCK}/MlpBlock_0/Dense_1/bias",
  "head/kernel",
  "pos_embedding",
  "embedding/kernel",
)
ORIGINAL = Names(
  f"{BLOCK}/MlpBlock_3/Dense_0/kernel",
  f"{BLOCK}/MlpBlock_3/Dense_1/bias",
  "head/kernel",
  big_vision.ORIGINAL_POSITION,
  "embedding/kernel",
)
TIMM = Names(
  "blocks.1.mlp.fc1.weight",
  "blocks.1.mlp.fc2.bias",
  "head.weight",
  "pos_embed",
  "patch_embed.proj.weight",
)


@pytest.fixture(scope="module")
def arrays():
  """Random parameters of a small FlexiViT, by our names."""
  model = FlexiViT(**FIELDS)
  shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]
  rng = np.random.default_rng(0)
  flat = trees.flatten(shapes)
  return {n: rng.normal(size=s.shape).astype(np.float32) for n, s in flat.items()}


def in_original(flat):
  """The original ViT's names; there the class token has a position."""
  names = {new: old for old, new in big_vision._ORIGINAL.items()}
  parts = r"(?<=encoderblock_\d/)\w+"
  renamed = {re.sub(parts, lambda m: names.get(m[0], m[0]), n): a for n, a in flat.items()}
  grid = renamed.pop("pos_embedding")
  renamed[ORIGINAL.position] = np.concatenate([grid[:, :1], grid], 1)
  return renamed


def in_timm(flat):
  return timm_writer.to_timm(FlexiViT(**FIELDS), trees.unflatten(flat))


def save_npz(folder, flat, **more):
  np.savez(folder / "w.npz", **flat, **more)
  return folder / "w.npz"


def save_params(folder, flat, **more):
  return save_npz(folder, {f"params/{name}": array for name, array in flat.items()}, **more)


def save_own(folder, flat):
  return save_params(folder, flat, **{npz.RECORD: npz.encode(RECORD)})


def save_safetensors(folder, flat):
  save_file({name: np.ascontiguousarray(a) for name, a in flat.items()}, folder / "w.safetensors")
  return folder / "w.safetensors"


def save_run(folder, flat):
  checkpoints = checkpoint.Checkpoints(folder / "run" / "checkpoints")
  checkpoints.save(1, trees.unflatten(flat), {"step": jnp.int32(1)}, RECORD)
  checkpoints.close()
  return folder / "run"


FORMATS = {  # names, arrays in them, how they are written
  "big_vision npz": (OURS, dict, save_params),
  "original npz": (ORIGINAL, in_original, save_npz),
  "timm safetensors": (TIMM, in_timm, save_safetensors),
  "timm npz": (TIMM, in_timm, save_npz),
  "run": (OURS, dict, save_run),
  "own npz": (OURS, dict, save_own),
}


def missing(flat, names):
  return {n: a for n, a in flat.items() if n != names.bias}


def extra(flat, names):
  return flat | {names.bias + "s": flat[names.bias]}


def shape(flat, names):
  head = flat[names.head]  # one class more than the bias has
  axis = head.shape.index(5)
  return flat | {names.head: np.concatenate([head, np.take(head, [0], axis)], axis)}


def double(flat, names):
  return flat | {names.dense: flat[names.dense].astype(np.float64)}


def half(flat, names):
  return flat | {names.dense: flat[names.dense].astype(np.float16)}


def transposed(flat, names):
  return flat | {names.dense: np.ascontiguousarray(flat[names.dense].T)}


def scanned(flat, names):
  """Blocks with one more axis in front, under one name."""
  split = {n: re.fullmatch(r"(.*(?:encoderblock_|blocks\.))\d([/.].*)", n) for n in flat}
  out = {n: a for n, a in flat.items() if not split[n]}
  for match in filter(None, split.values()):
    pair = [flat[f"{match[1]}{i}{match[2]}"] for i in range(2)]
    out[match[1].rstrip("_.") + match[2]] = np.stack(pair)
  return out


def grid(flat, names):
  """Three positions more than before: 3x4 cells."""
  position = flat[names.position]
  return flat | {names.position: np.concatenate([position, position[:, :3]], 1)}


def kernel_size(flat, names):
  kernel = flat[names.kernel]
  return flat | {names.kernel: kernel[..., :5, :5] if names is TIMM else kernel[:5, :5]}


class Loads(NamedTuple):
  """A conversion: why it is one, and the fields that differ from `FIELDS`."""

  why: str
  fields: dict = {}  # noqa: RUF012


WIDENED = Loads("half precision becomes float32, exactly")
SAME = Loads("scan is a layout of the same numbers; `scan=` says which is wanted")
READ_OFF = Loads("nothing says another size than the array itself", {"patch_size": (5, 5)})
NO_SQUARE = "position grid has 12 cells, which is no square; give posemb_size"
NO_SQUARE_TIMM = "pos_embed has 12 positions, no square grid, with or without .* give posemb_size"
NO_BLOCKS = "missing .*blocks.0.mlp.fc1.weight. Did you mean 'blocks.mlp.fc1.weight'"

ALL = {  # of every format; {x} is the name of the array
  missing: r"missing {bias} float32\[16\]",
  extra: r"extra {bias}s float32\[16\]",
  shape: r"{head}: expected float32\[(16,5|5,16)\], got float32\[(16,6|6,16)\]",
  double: r"{dense}: expected float32\[(16,24|24,16)\], got float64",
  half: WIDENED,
  transposed: r"{dense}: expected float32\[(16,24|24,16)\], got float32\[(24,16|16,24)\]",
  scanned: SAME,
  grid: NO_SQUARE,
  kernel_size: READ_OFF,
}
BUT = {
  ("timm safetensors", scanned): NO_BLOCKS,
  ("timm npz", scanned): NO_BLOCKS,
  ("timm safetensors", grid): NO_SQUARE_TIMM,
  ("timm npz", grid): NO_SQUARE_TIMM,
  # A record says what the sizes are.
  ("run", grid): r"{position}: expected float32\[1,9,16\], got float32\[1,12,16\]",
  ("own npz", grid): r"{position}: expected float32\[1,9,16\], got float32\[1,12,16\]",
  ("run", kernel_size): r"{kernel}: expected float32\[8,8,3,16\], got float32\[5,5,3,16\]",
  ("own npz", kernel_size): r"{kernel}: expected float32\[8,8,3,16\], got float32\[5,5,3,16\]",
  # Our runs never write it.
  ("run", half): r"{dense}: expected float32\[16,24\], got float16",
}


@pytest.mark.parametrize("fault", ALL, ids=lambda f: f.__name__)
@pytest.mark.parametrize("format_", FORMATS)
def test_a_fault_is_named_or_a_declared_conversion(tmp_path, arrays, format_, fault):
  names, convert, save = FORMATS[format_]
  want = BUT.get((format_, fault), ALL[fault])
  path = save(tmp_path, fault(convert(arrays), names))
  given = {"num_heads": 4} if names is TIMM else {}
  if isinstance(want, Loads):
    model, params = weights.load(path, **given)
    assert {name: getattr(model, name) for name in FIELDS} == FIELDS | want.fields
    assert all(a.dtype == jnp.float32 for a in jax.tree.leaves(params))
    assert trees.flatten(params).keys() == arrays.keys()
    return
  # The original's names are told in big_vision's, which they are turned into.
  told = OURS if names is ORIGINAL else names
  message = want.format(**{n: re.escape(v) for n, v in told._asdict().items()})
  with pytest.raises(UserError, match=message):
    weights.load(path, **given)


@pytest.mark.parametrize("format_", FORMATS)
def test_without_a_fault_every_format_loads(tmp_path, arrays, format_):
  names, convert, save = FORMATS[format_]
  given = {"num_heads": 4} if names is TIMM else {}
  model, params = weights.load(save(tmp_path, convert(arrays)), **given)
  assert {name: getattr(model, name) for name in FIELDS} == FIELDS
  flat = trees.flatten(vit.unstack_blocks(params))
  for name, array in arrays.items():
    if not (names is ORIGINAL and name == "cls"):  # it has taken its position in
      np.testing.assert_array_equal(flat[name], array, err_msg=name)
