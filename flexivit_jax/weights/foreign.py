"""Other frameworks, where they are installed: the only file of the package that imports them.

Reading and writing weights needs none of them, but for PyTorch's own `.pth` and `.bin` files. What was written is run
here in the framework that it was written for, for the certificate.
"""

import importlib
import pathlib
import types
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from flexivit_jax import errors
from flexivit_jax.weights import onnx_graph

COMPARING_ONNX = "Comparing an ONNX export with its source, which --no-verify leaves out,"

_ADVICE = "pip install -r requirements-convert.txt has the versions that are tested"


def require(package: str, why: str) -> types.ModuleType:
  """Imports a package that is no dependency of ours; a UserError that says why it is needed if it is not there."""
  try:
    return importlib.import_module(package)
  except ModuleNotFoundError as e:
    if e.name != package:
      raise
    raise errors.UserError(
      f"{why} needs the package {package}, which is not installed; {_ADVICE}."
    ) from e


def save_onnx(
  path: pathlib.Path, graph: onnx_graph.Graph, location: str, places: Mapping[str, tuple[int, int]]
) -> None:
  """Writes a graph as an ONNX model whose weights lie in another file.

  Args:
    path: the file to write.
    graph: what to write.
    location: the file with the weights, float32 and little-endian, relative to the folder of `path`.
    places: (offset, length) in bytes of each of the graph's weights there; others are left alone.
  """
  onnx = require("onnx", "Writing ONNX")
  constants = [onnx.numpy_helper.from_array(a, name) for name, a in graph.constants.items()]
  weights = []
  for name, shape in graph.weights.items():
    external = onnx.TensorProto(name=name, dims=shape, data_type=onnx.TensorProto.FLOAT)
    external.data_location = onnx.TensorProto.EXTERNAL
    for key, value in zip(("location", "offset", "length"), (location, *places[name]), strict=True):
      external.external_data.add(key=key, value=str(value))
    weights.append(external)
  model = onnx.helper.make_model(
    _graph_proto(onnx, graph, [*constants, *weights]),
    producer_name="flexivit_jax",
    opset_imports=[onnx.helper.make_opsetid("", onnx_graph.OPSET)],
    ir_version=9,  # the one that came with this opset; onnx would write its own newest
  )
  path.write_bytes(model.SerializeToString(deterministic=True))


def _graph_proto(onnx: types.ModuleType, graph: onnx_graph.Graph, initializers: list) -> Any:
  def described(name: str, shape: tuple[int | str, ...]) -> Any:
    return onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)

  return onnx.helper.make_graph(
    [onnx.helper.make_node(n.op, n.inputs, [n.name], n.name, **n.attributes) for n in graph.nodes],
    "flexivit",
    [described("image", ("n", *graph.image_shape))],
    [described(graph.nodes[-1].name, ("n", graph.outputs))],
    initializers,
  )


def check_onnx(path: pathlib.Path) -> None:
  """Raises onnx's own error for a file that is no valid model, shapes included."""
  require("onnx", "Writing ONNX").checker.check_model(str(path), full_check=True)


def onnx_program(path: pathlib.Path) -> Callable[[Any], np.ndarray]:
  """Returns the function from images [n, h, w, c] to logits [n, k] of an ONNX model, in onnxruntime on the CPU."""
  runtime = require("onnxruntime", COMPARING_ONNX)
  session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
  return lambda image: session.run(None, {"image": image})[0]
