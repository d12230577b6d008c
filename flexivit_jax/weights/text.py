"""Text towers in: `load` turns a BERT of transformers, or the text half of two towers, into a `TextTower`."""

import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp

from flexivit_jax import errors, trees
from flexivit_jax.data import text as text_data
from flexivit_jax.models import TextTower, text as text_model
from flexivit_jax.trees import Json, Params
from flexivit_jax.weights import bare, bert, npz, reading, registry, tasks, towers
from flexivit_jax.weights.timm import folder as timm_folder
from flexivit_jax.weights.towers import Text
from flexivit_jax.weights.transformers import folder as transformers_folder

_POOLING = pathlib.Path("1_Pooling", "config.json")  # of sentence-transformers
_PICKLED = "pytorch_model.bin"


def load(
  path: str | os.PathLike[str],
  *,
  max_length: int | None = None,
  num_heads: int | None = None,
  **fields: Any,
) -> tuple[TextTower, Params, Json]:
  """Returns (model, params, record) of a file or folder with a text tower.

  These are: a BERT of transformers or sentence-transformers, as a folder or as a file alone; two towers, of which the
  text tower is taken (`towers.load`).

  Args:
    path: the file or folder, or what `registry.find` knows.
    max_length: positions of the tower, the first of the file's; default: all.
    num_heads: where nothing in or beside the file says it.
    **fields: those of `TextTower` that are to differ, or that arrays cannot tell, e.g. `pool_type`.

  Returns:
    A record with "format", "model" (all fields), "notes", and "text" (`data.text.Tokens.record`) where a tokenizer is
    beside the file.

  Raises:
    UserError: no text tower, arrays that do not fit, more positions than the file has.
  """
  file, _ = registry.find(path)
  found, format_ = _read(file, num_heads)
  notes = [*found.notes]
  if "pool_type" not in found.fields | fields:
    notes.append("Nothing beside the BERT says how its tokens are pooled; their mean is taken.")
  tower = TextTower(**(found.fields | fields))
  params = dict(found.params)
  if max_length is not None:
    tower, params = _cut(tower, params, max_length, path)
  _check(tower, params, str(path))
  model = {name: getattr(tower, name) for name in text_model.FIELDS}
  record = {"format": format_, "model": model, "notes": notes}
  if found.tokenizer:
    length = min(found.tokenizer["length"], tower.max_length)
    record["text"] = {**found.tokenizer, "length": length}
  return tower, jax.tree.map(jnp.asarray, params), record


def load_into(
  path: str | os.PathLike[str],
  model: TextTower,
  *,
  num_heads: int | None = None,
  new_head: bool = False,
) -> tuple[Params, Json]:
  """Returns (params, record) of a file for a text tower of the same architecture.

  A tower with fewer positions than the file takes the first ones. How tokens are pooled is the tower's own choice. A
  head that the file does not have is left to the tower's own initialisation.

  Args:
    path: see `load`.
    model: the tower.
    num_heads: see `load`; default: the tower's, where nothing beside the file says it.
    new_head: leave the file's head away.

  Raises:
    UserError: a file of another tower, with all differences; see `load`.
  """
  options: Json = dict(max_length=model.max_length, pool_type=model.pool_type)
  options |= dict(eos_token=model.eos_token, num_heads=num_heads or model.num_heads)
  stored, params, record = load(path, **options)
  differ = [name for name in _SAME if getattr(stored, name) != getattr(model, name)]
  if stored.num_classes and not new_head and stored.num_classes != model.num_classes:
    differ.append("num_classes")
  if differ:
    lines = [
      f"{n}: {getattr(stored, n)!r} in the file, {getattr(model, n)!r} in the model" for n in differ
    ]
    raise errors.UserError(f"{path} is of another text tower:\n  " + "\n  ".join(lines))
  return {k: v for k, v in params.items() if k != "head" or not new_head}, record


_SAME = (
  "width", "depth", "mlp_dim", "num_heads", "vocab_size", "causal", "norm_first", "pad_token", "gelu", "layer_norm_eps",
)  # fmt: skip


def _read(file: pathlib.Path, num_heads: int | None) -> tuple[Text, str]:
  """What a file or folder holds of a text tower, and the name of its format."""
  folder = file if file.is_dir() else file.parent
  arrays = _arrays(file)
  if arrays is None or not bert.is_bert(arrays):
    if tasks.is_whole(file):
      return _of_parts(file), "text tower of a detector"
    text = towers.text_of(file)
    if text is None:
      raise errors.UserError(_NONE.format(file))
    return text, "text tower of two towers"
  config = folder / transformers_folder.CONFIG
  stated = timm_folder.read_json(config) if config.is_file() else {}
  found = bert.convert(arrays, stated, num_heads)
  fields, notes = found.fields, [*found.notes]
  pooling = folder / _POOLING
  pool = bert.pool_type(timm_folder.read_json(pooling)) if pooling.is_file() else None
  if pool is not None:
    fields |= {"pool_type": pool}
  tokenizer, more = _tokenizer(folder, fields)
  return Text(found.params, fields, {}, tokenizer, [*notes, *more]), "BERT of transformers"


_NONE = (
  "{} holds no text tower; expected a BERT of transformers, two towers, or a detector with texts (a run, .npz or folder"
  " of transformers)."
)


def _of_parts(file: pathlib.Path) -> Text:
  """The text tower of a model of parts, such as a detector."""
  model, params, record = tasks.load(file)
  tower = getattr(model, "parts", {}).get("text")
  if tower is None:
    raise errors.UserError(_NONE.format(file))
  fields = {name: getattr(tower, name) for name in text_model.FIELDS if name != "dtype"}
  return Text(params["text"], fields, {}, record.get("text"))


def _arrays(file: pathlib.Path) -> dict | None:
  """The arrays of a file, or of a folder of transformers; None: it is a run, or an .npz."""
  if file.is_dir():
    if not transformers_folder.is_folder(file):
      return None
    single = [file / name for name in (transformers_folder.WEIGHTS, transformers_folder.INDEX)]
    pickled = file / _PICKLED
    if pickled.is_file() and not any(one.is_file() for one in single):
      return bare.read(pickled).arrays
    return transformers_folder.read_arrays(file)
  if not file.exists():
    raise errors.UserError(
      f"{file} does not exist; expected a BERT of transformers, or two towers."
    )
  if file.suffix.lower() == ".npz" or not bare.has_reader(file):
    return None
  if file.suffix.lower() == ".safetensors":
    return npz.read_safetensors(file)[0]
  return bare.read(file).arrays


def _tokenizer(folder: pathlib.Path, fields: Json) -> tuple[Json | None, list[str]]:
  """The entry "text" of a record, where there is a tokenizer.json; and a note where it cannot be used."""
  if not (folder / "tokenizer.json").is_file():
    return None, [towers.NO_TOKENIZER]
  try:
    pad, end = fields.get("pad_token", 0), "[SEP]"
    tokens = text_data.load(folder, length=fields["max_length"], pad=pad, end=end)
  except errors.UserError as e:
    return None, [f"The tokenizer.json is not used: {e}"]
  return tokens.record(), []


def _cut(
  tower: TextTower, params: Params, max_length: int, path: str | os.PathLike[str]
) -> tuple[TextTower, Params]:
  """The tower with the first positions alone."""
  if max_length > tower.max_length:
    raise errors.UserError(
      f"{path} has {tower.max_length} positions, max_length is {max_length}; expected at most as many."
    )
  positions = params["pos_embedding"][:, :max_length]
  return tower.clone(max_length=max_length), params | {"pos_embedding": positions}


def _check(tower: TextTower, params: Params, what: str) -> None:
  """Raises a UserError that lists every array that is missing, extra, of another shape, or not finite."""
  reading.check_finite(params, what)
  tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
  without_head = tower.clone(num_classes=tower.num_classes if "head" in params else 0)
  expected = jax.eval_shape(without_head.init, jax.random.key(0), tokens)["params"]
  if lines := trees.diff(expected, params, max_lines=10**6):
    raise errors.UserError(f"{what} does not fit its text tower:\n  " + "\n  ".join(lines))
