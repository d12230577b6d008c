"""Photos of one's own on a page without a server: what onnxruntime-web needs beside it, and how images are prepared."""

import inspect
import pathlib
import shutil
from collections.abc import Sequence
from importlib import resources
from typing import Any

from flexivit_jax import data, errors
from flexivit_jax.inference import predictor
from flexivit_jax.sizes import SeqHw, size_text
from flexivit_jax.trees import Json
from flexivit_jax.weights.export import onnx

# Of the npm package onnxruntime-web, which we do not ship: 14 MB.
SCRIPTS = ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")
METHODS = ("linear", "area", "cubic", "pil_bilinear", "pil_bicubic")
_EXPECTED = (
  f"expected decode, resize or resize_small ({', '.join(METHODS)}), central_crop, value_range"
)


def check(package: pathlib.Path, out: pathlib.Path, kind: str, channels: int) -> None:
  """Raises a UserError for another model than a classifier of RGB images, a package without files, a model in OUT."""
  if kind != "classes" or channels != 3:
    raise errors.UserError(
      "--onnxruntime_web is for models with classes of their own, of images with 3 channels."
    )
  for name in SCRIPTS:
    if not (package / "dist" / name).is_file():
      raise errors.UserError(
        f"{package} has no dist/{name}; expected the unpacked npm package onnxruntime-web: `npm pack onnxruntime-web`"
        " and `tar -xf` give a folder `package`."
      )
  earlier = (out / "index.html").is_file() and (out / "model" / "record.json").is_file()
  if (out / "model").exists() and not earlier:
    raise errors.UserError(
      f"{out / 'model'} is there already, of something else; give another --static, or remove it."
    )


def steps(pp: str) -> Json:
  """Returns how the page prepares a photo: {"steps": [...], "hw": [h, w], "range": [low, high]}.

  A step is {"resize": [h, w]} or {"small": pixels of the shorter side, "rounding": ...}, both with "method", or
  {"crop": [h, w], "half": ...}, as in `data.geometry`.

  Args:
    pp: the model's preprocessing.

  Raises:
    UserError: it does something else; a page that prepared photos otherwise would give other answers.
  """
  listed: list[Json] = []
  found: Json = {}
  least: Any = None  # sides that every photo has
  for op in data.parse(predictor.of_images(pp)).ops:
    given: Any = inspect.signature(op.function).bind_partial(None, *op.args, **op.kwargs)
    given.apply_defaults()
    value = given.arguments
    if "range" in found:
      raise errors.UserError(f"--onnxruntime_web: {op.text} follows value_range; {_EXPECTED}.")
    if op.function is data.OPS["value_range"]:
      found["range"] = [float(value["vmin"]), float(value["vmax"])]
    elif op.function is data.OPS["resize"] and value["method"] in METHODS:
      least = found["hw"] = _sides(value["size"])
      listed.append({"resize": least, "method": value["method"]})
    elif op.function is data.OPS["resize_small"] and value["method"] in METHODS:
      least = _sides(value["size"])
      found.pop("hw", None)
      step = {"small": least[0], "rounding": value["rounding"], "method": value["method"]}
      listed.append(step)
    elif op.function is data.OPS["central_crop"] and least and _fits(value["size"], least):
      least = found["hw"] = _sides(value["size"])
      listed.append({"crop": least, "half": value["half"]})
    elif op.function is not data.OPS["decode"] or value["exif"] is False or value["bits"] != 16:
      raise errors.UserError(
        f"--onnxruntime_web: the page cannot do {op.text} of this model's images; {_EXPECTED}."
      )
  if "hw" not in found or "range" not in found:
    raise errors.UserError(
      f"--onnxruntime_web: {pp} does not end in images of one shape and value_range; {_EXPECTED}."
    )
  return found | {"steps": listed}


def _sides(size: Any) -> list[int]:
  return [int(size)] * 2 if isinstance(size, int) else [int(n) for n in size]


def _fits(size: Any, least: list[int]) -> bool:
  return all(n <= most for n, most in zip(_sides(size), least, strict=True))


def add(
  out: pathlib.Path, loaded: predictor.Loaded, sizes: Sequence[SeqHw], package: pathlib.Path
) -> Json:
  """Writes OUT/model, the graphs and their weights, and OUT/ort, the files of the package; returns the page's part.

  The model of an earlier page goes only when the new one is written.

  Args:
    out: the folder of the page.
    loaded: a classifier.
    sizes: of the page.
    package: the unpacked npm package onnxruntime-web.

  Raises:
    UserError: see `steps` and `onnx.write`.
  """
  prepared = steps(loaded.pp)
  out.mkdir(parents=True, exist_ok=True)
  new = out / "model.new"
  shutil.rmtree(new, ignore_errors=True)  # of a command that was stopped
  onnx.write(
    new,
    loaded.model,
    loaded.params,
    loaded.record,
    image_hw=(prepared["hw"][0], prepared["hw"][1]),
    sizes=sizes,
  )
  shutil.rmtree(out / "model", ignore_errors=True)
  new.rename(out / "model")
  (out / "ort").mkdir(exist_ok=True)
  for name in SCRIPTS:
    shutil.copyfile(package / "dist" / name, out / "ort" / name)
  names: Any = predictor.names_of(loaded)
  graphs = {str(size_text(size)): onnx.name_of(size) for size in sizes}
  return {**prepared, "graphs": graphs, "names": [*names]}


def script() -> str:
  """What the page runs for it, a script of its own."""
  return resources.files("flexivit_jax.demo").joinpath("in_browser.js").read_text("utf-8")
