"""Exports of any kind: one model at several patch sizes, to run without this project; read back and compared."""

import os
import pathlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from flexivit_jax import errors, sizes, weights
from flexivit_jax.budget import profile
from flexivit_jax.models import MODELS, OwlViT, TwoTowers, vit_part
from flexivit_jax.trees import Json, Params
from flexivit_jax.weights import certificate, model_records, optional, towers
from flexivit_jax.weights.export import (
  artifact,
  frameworks,
  onnx as onnx_folder,
  saved_model,
  stablehlo,
)

WRITERS: dict[str, Callable] = {
  "stablehlo": stablehlo.write,
  "onnx": onnx_folder.write,
  "saved_model": saved_model.write,
}
OF_PARTS = ("stablehlo", "onnx")  # what can hold two towers, a Segmenter, or a detector
Model = Any  # a FlexiViT, TwoTowers, a Segmenter, or an OwlViT
Read = tuple[Model, Params, Json]  # as `weights.tasks.load` returns it
Row = certificate.AnyRow
LOADERS: dict[str, Callable] = {
  "stablehlo": artifact.load_artifact,
  "onnx": onnx_folder.load,
  "saved_model": saved_model.load,
}


def export(
  source: str | os.PathLike[str],
  out: pathlib.Path,
  *,
  to: str,
  seqhw: str,
  image_size: int | None = None,
  platforms: Sequence[str] | None = None,
  verified: bool = True,
  image_only: bool = False,
  loading: Mapping[str, Any],
  adapt: Callable[[Model, Params, Json], Read] | None = None,
) -> list[Row]:
  """Writes `out` and the certificate beside it, and returns the certificate's rows; none where nothing was compared.

  Args:
    source: what `weights.load` takes.
    out: a .zip of a StableHLO export, a folder of the others; not there yet.
    to: a name in `WRITERS`.
    seqhw: the sizes as on a command line, see `sizes.parse`; a program each. "all" are those of the training.
    image_size: pixels a side; by default the model's own, or 240.
    platforms: where a StableHLO export is to run; None: its defaults.
    verified: compare with the source; without it there is no certificate.
    image_only: of two towers, the image tower alone.
    loading: arguments of `weights.load`.
    adapt: what is done to a model before it is written, such as that a detector gets its names.

  Raises:
    UserError: an unknown kind, a framework that is not installed; see also the writers and `verify`.
  """
  if seqhw != "all":
    sizes.parse(seqhw)  # before the checkpoint is read
  writing = _options(to, platforms, verified)
  model, params, record = _load(source, image_only, to, **loading)
  if adapt is not None:
    model, params, record = adapt(model, params, record)
  if to == "onnx" and model.dtype != "float32":
    model, record = _in_float32(model, record)
  weights.print_notes(record)
  hw = certificate.image_hw(record, image_size)
  record = weights.written_for(record, hw) | _measured(source, model, params)
  lacking = f"{source} does not say at which sizes it was trained"
  chosen = sizes.parse(seqhw, sizes.trained(record), lacking)
  WRITERS[to](out, model, params, record, image_hw=hw, sizes=chosen, **writing)
  rows = verify(out, model, params, to=to) if verified else []
  if rows:
    certificate.write(out, pathlib.Path(source), rows, record, hw)
  return rows


def _load(source: str | os.PathLike[str], image_only: bool, to: str, **loading: Any) -> Read:
  """Reads the model, whole; its attention is what runs everywhere, and not this machine's choice."""
  everywhere = {"attention": "einsum"}
  name = "flexivit" if image_only else weights.tasks.name_of(source)
  if (part := vit_part(MODELS[name])) is None:
    model, params, record = weights.load_with_record(source, **loading)
    return model.clone(**everywhere), params, record
  if to not in OF_PARTS:
    raise errors.UserError(
      f"--to={to} takes an image tower alone, and {source} has {model_records.named(name)}; add --image_only, or write"
      f" one of {', '.join(OF_PARTS)}."
    )
  whole, params, record = weights.tasks.load(source, **loading)
  fields: Any = {part: {**getattr(whole, part), **everywhere}}
  return whole.clone(**fields), params, record  # type: ignore[attr-defined]  # every Flax module has it


def _measured(source: str | os.PathLike[str], model: Model, params: Params) -> Json:
  """What the record says of the weights: their digest, and their profiles where there are any."""
  digest = towers.digest(model, params)
  own = [one for one in profile.read(profile.path_of(source, digest)) if one.weights == digest]
  return {"weights_sha256": digest} | ({"profile": profile.content_of(own)} if own else {})


def verify(out: pathlib.Path, model: Model, params: Params, *, to: str = "stablehlo") -> list[Row]:
  """Reads what was written back and compares what it gives with the model, on the CPU; no rows if it cannot run there.

  Raises:
    UserError: they differ. What was written is removed then, and after any other error.
  """
  try:
    rows = _compare(out, model, params, LOADERS[to])
    for row in rows:
      if not row.is_close:
        raise errors.UserError(
          f"The artifact differs at seqhw={sizes.size_text(row.seqhw)} by {row.difference:.1e}, more than"
          f" {row.limit:.1e}; nothing is written. Please report this."
        )
  except Exception:
    shutil.rmtree(out) if out.is_dir() else out.unlink()
    raise
  return rows


def _compare(out: pathlib.Path, model: Model, params: Params, load: Callable) -> list[Row]:
  cpu = _cpu()
  with jax.default_device(cpu):
    loaded = load(out)
    if cpu is None or "cpu" not in loaded.record.get("platforms", ["cpu"]):
      return []
    *hw, channels = loaded.record["image_shape"]
    image, params = certificate.images(tuple(hw), channels), jax.tree.map(np.asarray, params)
    return [_row(loaded, model, params, image, size) for size in loaded.sizes]


def _row(
  loaded: artifact.Artifact, model: Model, params: Params, image: np.ndarray, size: sizes.SeqHw
) -> Row:
  target = loaded.predict(image, size)
  if isinstance(model, OwlViT):
    source = certificate.boxes(model, params, image, size)
    names = certificate.Boxes._fields
    return certificate.row_of(size, source, [target[name] for name in names])
  if not isinstance(model, TwoTowers):
    return certificate.row_of(size, certificate.logits(model, params, image, size), target)
  tokens = certificate.texts(model.parts["text"])
  embedded, text = (
    certificate.embeddings(model, params, image, tokens, size),
    loaded.encode(tokens),
  )
  products = loaded.record["scale"] * target @ text.T + loaded.record["bias"]
  return certificate.TowersRow(size, embedded, certificate.Embeddings(target, text, products))


def _cpu() -> jax.Device | None:
  try:
    return jax.devices("cpu")[0]
  except RuntimeError:  # JAX_PLATFORMS leaves it out
    return None


def _options(to: str, platforms: Sequence[str] | None, verified: bool) -> dict[str, Any]:
  """What only one kind of export takes; all that can be wrong before the checkpoint is read."""
  if to not in WRITERS:
    raise errors.unknown("kind of export, --to", to, WRITERS)
  if to == "stablehlo":
    return {} if platforms is None else {"platforms": platforms}
  if platforms is not None:
    raise errors.UserError(
      f"--platforms has no effect with --to={to}, which runs wherever its framework does; remove it."
    )
  if to == "saved_model":
    optional.require("tensorflow", "Writing a SavedModel")
    return {}
  optional.require("onnx", "Writing ONNX")
  if verified:
    optional.require("onnxruntime", frameworks.COMPARING_ONNX)
  return {}


def _in_float32(model: Model, record: Json) -> tuple[Model, Json]:
  """The same model with its matrix products in float32, as ONNX graphs have them, and a note of that."""
  note = f"ONNX graphs are in float32; the model's own matrix products are in {model.dtype}."
  print(f"note: {note}")
  changed = {"model": record["model"] | {"dtype": "float32"}, "notes": [*record["notes"], note]}
  return model.clone(dtype="float32"), record | changed
