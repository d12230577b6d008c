"""An ONNX export: a folder with a graph for each patch size and one file of weights that all of them share.

seqhw_05.onnx, seqhw_08.onnx, ...   a graph each; runs alone beside weights.bin
text.onnx                           of two towers, the text tower
weights.bin                         what no size changes once, then each size's kernel and position embeddings
record.json                         what the model is
flexivit_manifest.txt               the checksums of the files above

A Segmenter's graphs give scores of every pixel, a detector's boxes and their scores.
"""

import json
import os
import pathlib
from collections.abc import Callable, Collection, Sequence
from typing import Any, BinaryIO, NamedTuple

import jax
import numpy as np

from flexivit_jax import errors, trees
from flexivit_jax.models import (
  FlexiViT,
  OwlViT,
  Segmenter,
  TextTower,
  TwoTowers,
  vit as vit_model,
  vit_part,
)
from flexivit_jax.sizes import SeqHw, size_args, size_text
from flexivit_jax.trees import Json, Params
from flexivit_jax.weights import baking, folders, optional, tasks
from flexivit_jax.weights.export import (
  artifact,
  frameworks,
  onnx_boxes,
  onnx_graph,
  onnx_pixels,
  stablehlo,
)

FORMAT = "flexivit onnx 1"
WEIGHTS, TEXT = "weights.bin", "text.onnx"


class Place(NamedTuple):
  """Where an array lies in the file of weights, in bytes."""

  offset: int
  length: int


def write(
  out: pathlib.Path,
  model: FlexiViT | TwoTowers | Segmenter | OwlViT,
  params: Params,
  record: Json,
  *,
  image_hw: tuple[int, int],
  sizes: Sequence[SeqHw],
) -> None:
  """Writes a folder for images of `image_hw`; it appears under its name only when it is complete. Needs onnx.

  Args:
    out: a name that is not there yet and does not end in .zip.
    model, params, record: what `weights.load_with_record` or `weights.tasks.load` returns; the record goes into the
      folder. Of two towers the graphs give embeddings of length 1.
    image_hw: pixels.
    sizes: tokens per side or (per column, per row), a graph each.

  Raises:
    UserError: a detector whose queries are not fixed (`models.owl_vit.with_queries`); a size that does not divide the
      image, parameters that are not the model's, matrix products in bfloat16, a name that is there, or no onnx.
  """
  optional.require("onnx", "Writing ONNX")
  _check(out)
  vit, own, text = model, params, None
  if isinstance(model, TwoTowers):
    vit, own, text = model.parts["image"], params["image"], model.parts["text"]
    record = record | stablehlo.scalars(model, params)
  tasks.check(vit, own, "What is to be exported")
  sizes, name = list(dict.fromkeys(sizes)), vit_part(vit)
  shape = (*image_hw, (own[name] if name else own)["embedding"]["kernel"].shape[2])
  with folders.new(out) as part:
    boxes: Json = {}
    if isinstance(vit, Segmenter):
      graphs = _write_pixels(part, vit, own, image_hw, sizes)
    elif isinstance(vit, OwlViT):
      graphs = _write_boxes(part, vit, own, image_hw, sizes)
      named = {str(size_text(s)): g.outputs for s, g in zip(sizes, graphs, strict=True)}
      boxes = {"boxes": named, "outputs": model.num_classes}
    else:
      graphs = _write_images(part, vit, own, image_hw, sizes, unit=text is not None)
    if text is not None:
      _write_text(part, text, params["text"])
    described = record | {
      "format": FORMAT,
      "sizes": [size_text(size) for size in sizes],
      "image_size": list(image_hw),
      "image_shape": list(shape),
      "outputs": graphs[0].outputs,
      "opset": onnx_graph.OPSET,
      **boxes,
    }
    (part / folders.EXPORT_RECORD).write_text(json.dumps(described, allow_nan=False))


def read_record(folder: str | os.PathLike[str]) -> Json:
  """Returns the record of an export and checks each of its files. Needs neither onnx nor onnxruntime.

  Raises:
    UserError: no such export, one of another format, or a file that is missing or damaged.
  """
  return folders.read_export(pathlib.Path(folder), FORMAT)


def load(folder: pathlib.Path) -> artifact.Artifact:
  """Reads an export back, to run in onnxruntime on the CPU; as `artifact.load_artifact` for the other kind."""
  record = read_record(folder)
  programs = {size: frameworks.onnx_program(folder / name_of(size)) for size in record["sizes"]}
  text = folder / TEXT
  if not text.is_file():
    return artifact.Artifact(record, programs)
  return artifact.Artifact(record, programs, frameworks.onnx_program(text, "tokens"))


def name_of(size: SeqHw) -> str:
  """Returns the file name of a size's graph: "seqhw_08.onnx", "seqhw_04x06.onnx"."""
  numbers = size if isinstance(size, tuple) else (size,)
  return f"seqhw_{'x'.join(f'{n:02d}' for n in numbers)}.onnx"


def _check(out: pathlib.Path) -> None:
  if out.suffix == ".zip":
    raise errors.UserError(f"{out}: an ONNX export is a folder; give a name without .zip.")


def _write_graphs(
  folder: pathlib.Path,
  flat: Params,
  changed: Collection[str],
  sizes: Sequence[SeqHw],
  of_size: Callable[[SeqHw], tuple[onnx_graph.Graph, Params]],
) -> list[onnx_graph.Graph]:
  """Writes the weights and the graphs, and has onnx check each.

  Args:
    folder: where to.
    flat: the parameters by name.
    changed: names of those that each size has its own of.
    sizes: a graph each.
    of_size: returns the graph of a size, and its own arrays.
  """
  graphs = []
  with (folder / WEIGHTS).open("wb") as file:
    shared = {n: _append(file, a) for n, a in flat.items() if n not in changed}
    for size in sizes:
      graph, arrays = of_size(size)
      own = {name: _append(file, array) for name, array in arrays.items()}
      graphs.append(graph)
      frameworks.save_onnx(folder / name_of(size), graph, WEIGHTS, shared | own)
  for size in sizes:
    frameworks.check_onnx(folder / name_of(size))
  return graphs


def _write_images(
  folder: pathlib.Path,
  model: FlexiViT,
  params: Params,
  image_hw: tuple[int, int],
  sizes: Sequence[SeqHw],
  *,
  unit: bool = False,
) -> list[onnx_graph.Graph]:
  model, params = model.clone(scan=False), vit_model.unstack_blocks(params)
  channels = params["embedding"]["kernel"].shape[2]

  def of_size(size: SeqHw) -> tuple[onnx_graph.Graph, Params]:
    fixed, baked = baking.bake(model, params, image_hw=image_hw, **size_args(size))
    return onnx_graph.describe(fixed, channels, unit=unit), _own(fixed, baked)

  return _write_graphs(folder, trees.flatten(params), baking.RESAMPLED, sizes, of_size)


def _write_pixels(
  folder: pathlib.Path,
  model: Segmenter,
  params: Params,
  image_hw: tuple[int, int],
  sizes: Sequence[SeqHw],
) -> list[onnx_graph.Graph]:
  model, params = _unstacked(model, params)
  channels = params["backbone"]["embedding"]["kernel"].shape[2]

  def of_size(size: SeqHw) -> tuple[onnx_graph.Graph, Params]:
    vits = onnx_pixels.towers(model, params, image_hw, size_args(size))
    own = {
      f"{prefix}{name}": array
      for prefix, baked in vits.items()
      for name, array in _own(*baked).items()
    }
    return onnx_pixels.describe(model, vits, image_hw, channels), own

  changed = {f"{onnx_pixels.BACKBONE}{name}" for name in baking.RESAMPLED}
  return _write_graphs(folder, trees.flatten(params), changed, sizes, of_size)


def _write_boxes(
  folder: pathlib.Path,
  model: OwlViT,
  params: Params,
  image_hw: tuple[int, int],
  sizes: Sequence[SeqHw],
) -> list[onnx_graph.Graph]:
  model, params = _unstacked(*onnx_boxes.with_unit_queries(model, params))
  vit, own = model.parts["backbone"], params["backbone"]
  channels = own["embedding"]["kernel"].shape[2]

  def of_size(size: SeqHw) -> tuple[onnx_graph.Graph, Params]:
    fixed, baked = baking.bake(vit, own, image_hw=image_hw, **size_args(size))
    arrays = {f"backbone/{name}": array for name, array in _own(fixed, baked).items()}
    arrays[onnx_boxes.BIAS] = onnx_boxes.bias(model, fixed.posemb_size)
    return onnx_boxes.describe(model, fixed, channels), arrays

  return _write_graphs(folder, trees.flatten(params), baking.resampled(model), sizes, of_size)


def _unstacked(model: Any, params: Params) -> tuple[Any, Params]:
  """A model with a backbone, whose blocks stand one by one."""
  backbone = vit_model.unstack_blocks(params["backbone"])
  return model.clone(backbone={**model.backbone, "scan": False}), {**params, "backbone": backbone}


def _write_text(folder: pathlib.Path, model: TextTower, params: Params) -> None:
  """Adds the text tower: its weights to the file of weights, and its graph."""
  with (folder / WEIGHTS).open("ab") as file:
    places = {f"text/{n}": _append(file, a) for n, a in trees.flatten(params).items()}
  frameworks.save_onnx(folder / TEXT, onnx_graph.describe_text(model), WEIGHTS, places)
  frameworks.check_onnx(folder / TEXT)


def _own(model: FlexiViT, params: Params) -> Params:
  """The arrays that are one size's alone; sine-cosine positions, which no parameter holds, among them."""
  flat = trees.flatten(params)
  resampled = {name: flat[name] for name in baking.RESAMPLED if name in flat}
  if model.posemb == "sincos2d":
    resampled["pos_embedding"] = vit_model.sincos2d(model.posemb_size, model.width)
  return resampled


def _append(file: BinaryIO, array: jax.typing.ArrayLike) -> Place:
  """Writes an array, little-endian, to the end of the file."""
  array = np.ascontiguousarray(array, "<f4")
  # Files are mapped into memory by pages, which only larger arrays are worth.
  step = 4096 if array.nbytes > 2**16 else 64
  file.write(b"\0" * (-file.tell() % step))
  offset = file.tell()
  file.write(array.data)
  return Place(offset, array.nbytes)
